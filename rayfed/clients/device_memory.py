"""The memory of the device on which clients train: what happens when it runs out, how much is used, how much is free.

On a GPU, torch's allocator counts. On a CPU, the resident memory of the process counts. Only Linux can reset the peak;
on other systems the peak is that of the process's life, and so too high.
"""

from __future__ import annotations

import gc
import re
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from rayfed.config.execution import Engine
from rayfed.errors import RunError

T = TypeVar("T")
R = TypeVar("R")

NO_MORE = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")  # in errors that have no class of their own
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LIMIT, USED = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))


def ran_out(error: BaseException) -> bool:
    """Whether the error says that the device ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in NO_MORE)


def in_halves(
    items: Sequence[T], work: Callable[[Sequence[T]], R], device: torch.device, alone: Callable[[T], str]
) -> list[R]:
    """[work(items)]; where memory runs out, the results of both halves, and so on: one result a part.

    The rule is fixed (halves in order; of an odd number, the first is the larger), so the bits are those of a plan with
    these parts. RunError where a single item does not fit; ``alone`` names the item.
    """
    try:
        return [work(items)]
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    # Outside the handler, the error's traceback does not keep the failed attempt's tensors alive.
    if len(items) == 1:
        raise too_little(alone(items[0]), device)
    free_unused(device)
    middle = -(-len(items) // 2)
    return [result for part in (items[:middle], items[middle:]) for result in in_halves(part, work, device, alone)]


def too_little(what: str, device: torch.device) -> RunError:
    """The error where the smallest part does not fit."""
    return RunError(
        f"{what} needs more memory than {device} has; lower client.batch_size or data.max_tokens, or set "
        "engine.gradient_checkpointing"
    )


def free_unused(device: torch.device) -> None:
    """Frees memory to which nothing refers any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def private() -> int:
    """Bytes of its machine's memory that this process uses now, without what it shares with others.

    Libraries and the weights of a base in safetensors are mapped from files: all workers of a node share them.
    """
    used = psutil.Process().memory_info()
    return int(used.rss - getattr(used, "shared", 0))  # Linux alone tells


def forget_peak(device: torch.device) -> int:
    """Resets the peak; returns the bytes that are used now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        FORGET.write_text("5")  # proc(5): sets the peak to what is resident now
    return int(psutil.Process().memory_info().rss)


def peak(device: torch.device) -> int:
    """Bytes used at the peak since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free(engine: Engine) -> int:
    """Bytes that this process may still use: its share of the free memory where other workers use the device, too."""
    if engine.device == "cuda":
        unused, _ = torch.cuda.mem_get_info()
        own = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int((unused + own) * (min(engine.gpus, 1) if engine.kind == "ray" else 1))
    available = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        available = min(available, int(LIMIT.read_text()) - int(USED.read_text()))
    return available // engine.processes
