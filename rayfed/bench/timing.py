"""Paired timing: A and B in turn, so that a slow phase of the machine slows both.

There are two clocks: wall time, and the processor time of this process over all its threads. Other processes disturb
processor time less.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from rayfed.files import write_json

T = TypeVar("T")


class Times(NamedTuple):
    """Seconds on both clocks."""

    wall: float
    cpu: float


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
    facts: dict[str, Any]


def timed(function: Callable[[], T]) -> tuple[Times, T]:
    """Times one call: (its times, its result)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    # Not 0, because ratios divide by these times and a clock may be coarse.
    return Times(max(time.perf_counter() - wall, 1e-9), max(time.process_time() - cpu, 1e-9)), result


def paired(
    name: str, a: tuple[str, Callable[[], object]], b: tuple[str, Callable[[], object]], pairs: int,
    facts: dict[str, Any] | None = None,
) -> Row:  # fmt: skip
    """Runs A and B ``pairs`` times each, in turn, after one call of A to warm up. ``ratio`` is B's time over A's."""
    a[1]()
    times = [(timed(a[1])[0], timed(b[1])[0]) for _ in range(pairs)]
    return compared(name, a[0], b[0], times, facts or {})


def compared(
    name: str, a: str, b: str, times: Sequence[tuple[Times, Times]], facts: dict[str, Any], elsewhere: bool = False
) -> Row:
    """The row of pairs of times, A's and B's. ``elsewhere``: other processes did the work."""
    seconds = np.array(times)  # (pairs, sides, clocks)
    ratios = seconds[:, 1] / seconds[:, 0]  # (pairs, clocks)
    (wall_a, cpu_a), (wall_b, cpu_b) = seconds.min(0).tolist()
    ratio, cpu_ratio = np.median(ratios, 0).tolist()
    low, high = float(ratios[:, 0].min()), float(ratios[:, 0].max())
    if elsewhere:
        cpu_a = cpu_b = cpu_ratio = None
    return Row(
        name, a, b, wall_a, wall_b, ratio, low, high, cpu_a, cpu_b, cpu_ratio, torch.get_num_threads(), facts
    )  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch, so that figures are per core. `@one_thread()` makes a whole function run so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [("", "seconds (cpu)", "against", "seconds (cpu)", "times faster (range)", "by cpu", "")]
    for row in rows:
        times = [
            f"{wall:.3g}" if cpu is None else f"{wall:.3g} ({cpu:.3g})"
            for wall, cpu in ((row.seconds_a, row.cpu_a), (row.seconds_b, row.cpu_b))
        ]
        spread = f"{row.ratio:.3g} ({row.ratio_low:.3g} to {row.ratio_high:.3g})"
        by_cpu = "-" if row.cpu_ratio is None else f"{row.cpu_ratio:.3g}"
        facts = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                 for key, value in row.facts.items()]  # fmt: skip
        lines.append((f"{row.name}: {row.a}", times[0], row.b, times[1], spread, by_cpu, ", ".join(facts)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def machine() -> dict[str, Any]:
    """The machine: processor, cores, versions of Python and torch."""
    linux = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", linux.read_text(encoding="utf-8")) if linux.exists() else None
    return {
        "processor": name[1] if name else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(path: Path, name: str, rows: list[Row]) -> None:
    """Writes rows and machine as JSON."""
    write_json(path, {"benchmark": name, "machine": machine(), "rows": [asdict(row) for row in rows]})
