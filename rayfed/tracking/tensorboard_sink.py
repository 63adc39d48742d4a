"""TensorBoard: the numbers of `metrics.jsonl` as scalars, one step a round, in `<out>/tensorboard`.

The files are written by tensorboardX, which comes with Ray Tune. To look at them, install TensorBoard itself:
`tensorboard --logdir runs`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rayfed.errors import allowed
from rayfed.tracking.sinks import Record, RunInfo, Sink


class TensorBoardSink(Sink):
    """Writes event files into ``folder``. UserError if tensorboardX is not installed."""

    def __init__(self, folder: Path) -> None:
        if find_spec("tensorboardX") is None:
            raise allowed("tracking.tensorboard", True, "tensorboardX is not installed: `pip install tensorboardX`")
        self._folder = folder
        self._writer: Any = None

    def start(self, info: RunInfo) -> None:
        """Opens a new file, named by the round after which the run continues.

        TensorBoard drops what earlier files have of the rounds that are run again.
        """
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=info.start + 1, filename_suffix=f".{info.start}")

    def round(self, record: Record) -> None:
        """Writes the numbers of the round."""
        for key, value in record.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, record["round"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
