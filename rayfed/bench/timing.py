"""Paired timing: A and B in turn, so that a slow phase of the machine slows both.

There are two clocks: wall time, and the processor time of this process over all its threads. Other processes disturb
processor time less.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
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

    ``cpu_...``: the same by processor time; None where other processes do the work. ``threads`` are torch's. ``facts``
    are further measurements: errors, sizes.
    """

    name: str
    a: str
    b: str
    seconds_a: float
    seconds_b: float
    ratio: float
    ratio_low: float
    ratio_high: float
    cpu_a: float | None
    cpu_b: float | None
    cpu_ratio: float | None
    threads: int
    facts: dict[str, Any] = field(default_factory=dict)


def paired(
    name: str, a: tuple[str, Callable[[], object]], b: tuple[str, Callable[[], object]], pairs: int = 5,
    facts: dict[str, Any] | None = None,
) -> Row:  # fmt: skip
    """Runs A and B ``pairs`` times each, in turn, after one call of A to warm up. ``ratio`` is B's time over A's."""
    a[1]()
    times = [(timed(a[1])[0], timed(b[1])[0]) for _ in range(pairs)]
    return compared(name, a[0], b[0], [fast for fast, _ in times], [slow for _, slow in times], facts)


def compared(
    name: str, a: str, b: str, fast: Sequence[Times], slow: Sequence[Times], facts: dict[str, Any] | None = None,
    elsewhere: bool = False,
) -> Row:  # fmt: skip
    """The row of A's and B's times, pair by pair. ``elsewhere``: other processes did the work."""
    import torch

    pairs = list(zip(fast, slow, strict=True))
    ratios = [theirs.wall / mine.wall for mine, theirs in pairs]
    wall = min(mine.wall for mine in fast), min(theirs.wall for theirs in slow)
    cpu: tuple[float | None, float | None, float | None] = (None, None, None)
    if not elsewhere:
        by_cpu = statistics.median(theirs.cpu / mine.cpu for mine, theirs in pairs)
        cpu = min(mine.cpu for mine in fast), min(theirs.cpu for theirs in slow), by_cpu
    spread = statistics.median(ratios), min(ratios), max(ratios)
    return Row(name, a, b, *wall, *spread, *cpu, torch.get_num_threads(), facts or {})


def one_thread(measure: Callable[_P, _T]) -> Callable[_P, _T]:
    """A decorator: the benchmark runs with one thread of torch, so its figures are per core."""

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
        both = ((row.seconds_a, row.cpu_a), (row.seconds_b, row.cpu_b))
        times = [f"{wall:.3g}" + (f" ({cpu:.3g})" if cpu is not None else "") for wall, cpu in both]
        by_cpu = "-" if row.cpu_ratio is None else f"{row.cpu_ratio:.3g}"
        lines.append((f"{row.name}: {row.a}", times[0], row.b, times[1], spread, by_cpu, facts))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def machine() -> dict[str, Any]:
    """The machine: processor, cores, versions of Python and torch."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"processor": _processor(), "cores": os.cpu_count(), **versions}


def write(path: Path, name: str, rows: list[Row]) -> None:
    """Writes rows and machine as JSON."""
    report = {"benchmark": name, "machine": machine(), "rows": [asdict(row) for row in rows]}
    atomic_write(path, json.dumps(report, indent=2) + "\n")


class Times(NamedTuple):
    """Seconds on both clocks."""

    wall: float
    cpu: float


def timed(function: Callable[[], _T]) -> tuple[Times, _T]:
    """Times one call: (its times, its result)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    # Not 0, because ratios divide by these times and a clock may be coarse.
    return Times(max(time.perf_counter() - wall, 1e-9), max(time.process_time() - cpu, 1e-9)), result


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
