"""Paired timing: A and B in turn, so that whatever slows the machine slows both.

Two clocks: wall time, and the processor time of this process over all its threads, which others on the machine disturb
less.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from rayfed.files import atomic_write

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Row:
    """One comparison: seconds (the best of each side), how many times faster A is (median of the pairs, and range).

    ``cpu_...``: the same by processor time.
    """

    name: str
    a: str
    b: str
    seconds_a: float
    seconds_b: float
    ratio: float
    ratio_low: float
    ratio_high: float
    cpu_a: float
    cpu_b: float
    cpu_ratio: float
    threads: int  # of torch
    facts: dict[str, Any] = field(default_factory=dict)  # whatever else was measured: errors, sizes


def paired(
    name: str, a: tuple[str, Callable[[], object]], b: tuple[str, Callable[[], object]], pairs: int = 5,
    facts: dict[str, Any] | None = None,
) -> Row:  # fmt: skip
    """Runs A and B ``pairs`` times each, in turn, after one call of A to warm up. ``ratio`` is B's time over A's."""
    import torch

    a[1]()
    times = [(_seconds(a[1]), _seconds(b[1])) for _ in range(pairs)]
    ratios = [slow.wall / fast.wall for fast, slow in times]
    return Row(
        name,
        a[0],
        b[0],
        min(fast.wall for fast, _ in times),
        min(slow.wall for _, slow in times),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        min(fast.cpu for fast, _ in times),
        min(slow.cpu for _, slow in times),
        statistics.median(slow.cpu / fast.cpu for fast, slow in times),
        torch.get_num_threads(),
        facts or {},
    )


def one_thread(measure: Callable[_P, _T]) -> Callable[_P, _T]:
    """Runs a benchmark on one of torch's threads: its figures are per core."""

    @wraps(measure)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return measure(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return alone


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [("", "seconds (cpu)", "against", "seconds (cpu)", "times faster (range)", "by cpu", "")]
    for row in rows:
        spread = f"{row.ratio:.3g} ({row.ratio_low:.3g} to {row.ratio_high:.3g})"
        facts = ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in row.facts.items())  # fmt: skip
        times = [f"{wall:.3g} ({cpu:.3g})" for wall, cpu in ((row.seconds_a, row.cpu_a), (row.seconds_b, row.cpu_b))]
        lines.append((f"{row.name}: {row.a}", times[0], row.b, times[1], spread, f"{row.cpu_ratio:.3g}", facts))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def machine() -> dict[str, Any]:
    """Where it was measured."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(path: Path, name: str, rows: list[Row]) -> None:
    """Rows and machine as JSON."""
    report = {"benchmark": name, "machine": machine(), "rows": [asdict(row) for row in rows]}
    atomic_write(path, json.dumps(report, indent=2) + "\n")


class _Times(NamedTuple):
    """Seconds on both clocks."""

    wall: float
    cpu: float


def _seconds(function: Callable[[], object]) -> _Times:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    # A clock too coarse for what was measured must not divide by zero.
    return _Times(max(time.perf_counter() - wall, 1e-9), max(time.process_time() - cpu, 1e-9))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
