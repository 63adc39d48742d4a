"""What a run remembers of its evaluations: the best round by validation accuracy, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rayfed.config.training import EarlyStop


@dataclass
class Progress:
    """Chosen on validation, reported on test: the test figures of the best round never chose it."""

    best_round: int | None = None
    best_accuracy: float | None = None  # validation, 0 to 1
    best_test_accuracy: float | None = None
    last_accuracy: float | None = None
    last_test_accuracy: float | None = None
    last_test_accuracy_masked: float | None = None
    last_test_accuracy_clients: float | None = None  # the mean over the clients, see server.per_client
    last_gap: float | None = None  # where the answer is known: share of the initial gap that is left
    dense_bytes: int = 0  # what the messages so far would have weighed dense, in fp32
    stale: int = 0  # evaluations since the last improvement that counted
    mark: float | None = None  # the accuracy an improvement is measured from
    stopped: bool = False

    def see(self, round: int, metrics: Mapping[str, float | None], rule: EarlyStop | None) -> None:
        """Takes in one round's metrics; rounds without evaluation change nothing."""
        if metrics.get("test/accuracy") is not None:
            self.last_test_accuracy = metrics["test/accuracy"]
            self.last_test_accuracy_masked = metrics.get("test/accuracy_masked")
            self.last_test_accuracy_clients = metrics.get("test/accuracy_clients")
        self.last_gap = metrics.get("eval/gap", self.last_gap)
        accuracy = metrics.get("eval/accuracy")
        if accuracy is None:
            return
        self.last_accuracy = accuracy
        if self.best_accuracy is None or accuracy > self.best_accuracy:
            self.best_round, self.best_accuracy = round, accuracy
            self.best_test_accuracy = metrics.get("test/accuracy")
        if rule is None:
            return
        if self.mark is None or accuracy > self.mark + rule.min_delta:
            self.mark, self.stale = accuracy, 0
        else:
            self.stale += 1
        self.stopped = self.stale >= rule.patience

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
