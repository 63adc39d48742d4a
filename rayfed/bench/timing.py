"""Paired timing: A and B in turn, so that whatever slows the machine slows both."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rayfed.files import atomic_write


@dataclass(frozen=True)
class Row:
    """One comparison: seconds (the best of each side), how many times faster A is (median of the pairs, and range)."""

    name: str
    a: str
    b: str
    seconds_a: float
    seconds_b: float
    ratio: float
    ratio_low: float
    ratio_high: float
    facts: dict[str, Any] = field(default_factory=dict)  # whatever else was measured: errors, sizes


def paired(
    name: str, a: tuple[str, Callable[[], object]], b: tuple[str, Callable[[], object]], pairs: int = 5,
    facts: dict[str, Any] | None = None,
) -> Row:  # fmt: skip
    """Runs A and B ``pairs`` times each, in turn, after one call of A to warm up. ``ratio`` is B's time over A's."""
    a[1]()
    times = [(_seconds(a[1]), _seconds(b[1])) for _ in range(pairs)]
    ratios = [slow / fast for fast, slow in times]
    return Row(
        name, a[0], b[0], min(t for t, _ in times), min(t for _, t in times), statistics.median(ratios), min(ratios),
        max(ratios), facts or {},
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [("", "seconds", "against", "seconds", "times faster (range)", "")]
    for row in rows:
        spread = f"{row.ratio:.3g} ({row.ratio_low:.3g} to {row.ratio_high:.3g})"
        facts = ", ".join(f"{key} {value:.2g}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in row.facts.items())  # fmt: skip
        lines.append((f"{row.name}: {row.a}", f"{row.seconds_a:.4g}", row.b, f"{row.seconds_b:.4g}", spread, facts))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def machine() -> dict[str, Any]:
    """Where it was measured."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(path: Path, name: str, rows: list[Row]) -> None:
    """Rows and machine as JSON."""
    report = {"benchmark": name, "machine": machine(), "rows": [asdict(row) for row in rows]}
    atomic_write(path, json.dumps(report, indent=2) + "\n")


def _seconds(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
