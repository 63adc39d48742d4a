"""A round between its training and its line in the books.

Its evaluation may be done by workers that have nothing left to do in the next round's training. Until then it is kept
here, and with it, as it was, what the next round changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayfed.clients.jobs import Result
from rayfed.server.checkpoint import Snapshot
from rayfed.server.evaluate import Evaluation

Record = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """A round's record, without what its evaluation finds; ``dense``: what its messages would have weighed in fp32.

    ``snapshot`` is there where a checkpoint will be due when the next round has been trained.
    """

    record: Record
    evaluation: Evaluation
    dense: int
    snapshot: Snapshot | None = None

    def evaluated(self, results: Sequence[Result]) -> Trained:
        """The same with its figures; ``results`` in the order of the evaluation's tasks."""
        return replace(self, record=self.record | self.evaluation.metrics(results))
