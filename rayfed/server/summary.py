"""The end of a run in figures: the best round, early stopping, the summary and the closing table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rayfed import wire
from rayfed.clients.plan import RunPlan
from rayfed.config.training import EarlyStop
from rayfed.server.evaluation.baselines import Baselines
from rayfed.tracking import Table


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

    def add(self, record: Mapping[str, Any], dense_bytes: int, rule: EarlyStop | None) -> None:
        """Adds a round's record, and its messages' bytes had they been dense; rounds without evaluation change no best."""
        self.dense_bytes += dense_bytes
        if record.get("test/accuracy") is not None:
            self.last_test_accuracy = record["test/accuracy"]
            self.last_test_accuracy_masked = record.get("test/accuracy_masked")
            self.last_test_accuracy_clients = record.get("test/accuracy_clients")
        self.last_gap = record.get("eval/gap", self.last_gap)
        accuracy = record.get("eval/accuracy")
        if accuracy is None:
            return
        self.last_accuracy = accuracy
        if self.best_accuracy is None or accuracy > self.best_accuracy:
            self.best_round, self.best_accuracy = record["round"], accuracy
            self.best_test_accuracy = record.get("test/accuracy")
        if rule is None:
            return
        if self.mark is None or accuracy > self.mark + rule.min_delta:
            self.mark, self.stale = accuracy, 0
        else:
            self.stale += 1
        self.stopped = self.stale >= rule.patience

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(progress: Progress, ledger: wire.Ledger, rounds: int, baselines: Baselines | None) -> dict[str, Any]:
    """Unpadded figures: accuracies (0 to 1), bytes both ways, the bytes of the same run sent dense in fp32."""
    return {
        "rounds": rounds,
        "best/round": progress.best_round,
        "best/eval_accuracy": progress.best_accuracy,
        "best/test_accuracy": progress.best_test_accuracy,
        "final/eval_accuracy": progress.last_accuracy,
        "final/test_accuracy": progress.last_test_accuracy,
        "final/test_accuracy_masked": progress.last_test_accuracy_masked,
        "final/test_accuracy_clients": progress.last_test_accuracy_clients,
        "final/gap": progress.last_gap,
        **ledger.totals(),
        "bytes/total": ledger.total_bytes,
        "bytes/dense": progress.dense_bytes,
        "head_only/test_accuracy": baselines.same_rounds if baselines else None,
        "head_only/test_accuracy_central": baselines.central if baselines else None,
    }


def closing_table(plan: RunPlan, summary: dict[str, Any]) -> Table:
    """What a reader should see last: this run, the same run sent dense, the frozen base."""
    down, up = plan.wire.down, plan.wire.up
    name = f"{plan.settings['method']['name']}, density {_density(down.density)} down, {_density(up.density)} up"
    accuracy, masked = summary["final/test_accuracy"], summary["final/test_accuracy_masked"]
    rows = [(name, accuracy, summary["bytes/total"])]
    if masked is not None:  # what FLASC's own code evaluates
        rows = [
            (f"{name}, as clients receive it", masked, summary["bytes/total"]),
            ("  the server's dense copy", accuracy, None),
        ]
    rows.append(("  mean over the clients, each on data like its own", summary["final/test_accuracy_clients"], None))
    if summary["bytes/total"] < summary["bytes/dense"]:
        times = summary["bytes/dense"] / summary["bytes/total"]
        rows.append((f"  the same messages sent dense: {times:.1f}x", None, summary["bytes/dense"]))
    rows.append(("frozen base, only the head trained, same rounds", summary["head_only/test_accuracy"], None))
    rows.append(("  trained centrally to convergence", summary["head_only/test_accuracy_central"], None))
    shown = tuple(
        (label, "" if accuracy is None else f"{100 * accuracy:.1f} %", "" if size is None else f"{size / 1e6:.2f}")
        for label, accuracy, size in rows
        if accuracy is not None or size is not None
    )
    if summary["final/gap"] is not None:
        shown += (("share of the initial gap to the optimum that is left", f"{summary['final/gap']:.3%}", ""),)
    return Table(f"After {summary['rounds']} rounds", ("", "test accuracy", "MB both ways"), shown)


def _density(value: float) -> str:
    return f"1/{1 / value:g}" if value < 1 and (1 / value).is_integer() else f"{value:g}"
