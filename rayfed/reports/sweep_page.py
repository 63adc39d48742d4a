"""The page of a sweep, written when the sweep ends."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from rayfed.reports import read, write_report
from rayfed.tracking.events import EventSink


def write_sweep_page(out: Path) -> None:
    """Writes `report.html` into the directory of a sweep that has ended. If that fails, events.log has the reason.

    The results are already on the disk. So a failure changes neither the results nor the exit code.
    """
    events = EventSink(out / "events.log")
    if find_spec("matplotlib") is None:
        events.event("no report.html: matplotlib is not installed (pip install -e '.[report]' in a clone)")
        return
    try:
        write_report(read([out]), out, files=False)
    except Exception as error:
        events.event(f"no report.html: {type(error).__name__}: {error}")
        print(f"rayfed: no report.html: {error}", file=sys.stderr)
