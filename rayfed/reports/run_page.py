"""The page of one run, written when the run ends, in the process that runs the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rayfed.engine.callbacks import Callback
from rayfed.reports import read, write_report
from rayfed.tracking import RunInfo
from rayfed.tracking.events import EventSink

PAGE = "report.html"


class ReportCallback(Callback):
    """Writes `report.html` into the run directory when the run has ended, before W&B takes the run's files.

    `rayfed run` uses it. From Python: `rayfed.run(experiment, callbacks=[rayfed.ReportCallback()])`. A page that cannot
    be written changes neither the results nor the exit code; events.log has the reason.
    """

    def on_start(self, info: RunInfo) -> None:
        self.out = Path(info.out)

    def on_finish(self, summary: Mapping[str, Any]) -> None:
        write_page(self.out)


def write_page(out: Path) -> str | None:
    """Writes `report.html` into the directory of a run or sweep that has ended. Returns the reason if that fails.

    The results are on the disk already. So a failure changes neither the results nor the exit code; events.log has the
    reason.
    """
    reason = f"no {PAGE}: matplotlib is not installed (pip install -e '.[report]' in a clone)"
    if find_spec("matplotlib") is not None:
        try:
            write_report(read([out]), out, files=False)
        except Exception as error:
            reason = f"no {PAGE}: {type(error).__name__}: {error}"
        else:
            return None
    EventSink(out / "events.log").event(reason)
    return reason
