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
        events = EventSink(self.out / "events.log")
        if find_spec("matplotlib") is None:
            events.event(f"no {PAGE}: matplotlib is not installed (pip install -e '.[report]' in a clone)")
            return
        try:
            write_report(read([self.out]), self.out, files=False)
        except Exception as error:
            events.event(f"no {PAGE}: {type(error).__name__}: {error}")
