"""The memory of the device on which clients train: what to do when it runs out, how much is taken, how much is free.

On a GPU torch's own allocator counts. On a CPU it is the process's resident memory. Linux alone can forget its peak, so
that a lower one is seen after it; elsewhere the peak is that of the process's whole life, and so rather too high.
"""

from __future__ import annotations

import gc
import os
import re
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from rayfed.config.execution import Engine
from rayfed.errors import RunError

T = TypeVar("T")
R = TypeVar("R")

NO_MORE = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")  # in errors that have no class of their own
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LIMIT, USED = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))


def ran_out(error: BaseException) -> bool:
    """Whether the error says that the device's memory did not do."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in NO_MORE)


def in_halves(
    items: Sequence[T], work: Callable[[Sequence[T]], R], device: torch.device, alone: Callable[[T], str]
) -> list[R]:
    """What ``work`` makes of all items; where memory does not do, of each half, and so on: one result a part.

    The rule is fixed (halves in order; of an odd number, the first is the larger), so the bits are those of a plan with
    these parts.

    Raises:
        RunError: one item is too much; ``alone`` says which.
    """
    try:
        return [work(items)]
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    # Behind the error, nothing refers to what was half done any more.
    if len(items) == 1:
        raise too_little(alone(items[0]), device)
    let_go(device)
    middle = -(-len(items) // 2)
    return [result for part in (items[:middle], items[middle:]) for result in in_halves(part, work, device, alone)]


def too_little(what: str, device: torch.device) -> RunError:
    """What to say where the smallest part does not fit."""
    return RunError(
        f"{what} needs more memory than {device} has; lower client.batch_size or data.max_tokens, or set "
        "engine.gradient_checkpointing"
    )


def let_go(device: torch.device) -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak(device: torch.device) -> int:
    """Starts a new peak; returns the bytes that are taken now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        FORGET.write_text("5")  # proc(5): sets the peak to what is resident now
    return _status("VmRSS") or peak(device)


def peak(device: torch.device) -> int:
    """Bytes taken at the peak since it was last forgotten."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    whole_life = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _status("VmHWM") or whole_life


def free(engine: Engine) -> int:
    """Bytes that this process may still take: its share of what is free, if others train on the device, too."""
    if engine.device == "cuda":
        nobodys, _ = torch.cuda.mem_get_info()
        own = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        shared = engine.kind == "ray" and engine.gpus < 1
        return int((nobodys + own) * (engine.gpus if shared else 1))
    return _free_on_this_machine() // (engine.workers if engine.kind == "ray" else 1)


def _free_on_this_machine() -> int:
    """What the kernel would hand out without swapping, and no more than is left of a container's limit."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        available = int(found[1]) * 1024 if found else None
    except OSError:
        available = None
    if available is None:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # some of it is in use
    try:
        return min(available, int(LIMIT.read_text()) - int(USED.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available


def _status(name: str) -> int:
    """A line of Linux's account of this process, in bytes; 0 where there is none."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
