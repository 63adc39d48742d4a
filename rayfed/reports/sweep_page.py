"""The page of a sweep, written when the sweep ends."""

from __future__ import annotations

import sys
from pathlib import Path

from rayfed.reports.run_page import write_page


def write_sweep_page(out: Path) -> None:
    """Writes `report.html` into the directory of a sweep that has ended. If that fails, says why on stderr."""
    if reason := write_page(out):
        print(f"rayfed: {reason}", file=sys.stderr)
