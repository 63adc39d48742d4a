"""The end of a run in figures: accuracy reached, bytes sent, and what the alternatives would have cost."""

from __future__ import annotations

from typing import Any

from rayfed import wire
from rayfed.config import Experiment
from rayfed.server.evaluation.baselines import Controls
from rayfed.server.stopping import Progress
from rayfed.tracking import Table


def summarize(progress: Progress, ledger: wire.Ledger, rounds: int, controls: Controls | None) -> dict[str, Any]:
    """Flat figures: accuracies (0 to 1), bytes both ways, the bytes of the same run sent dense in fp32."""
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
        "head_only/test_accuracy": controls.same_rounds if controls else None,
        "head_only/test_accuracy_central": controls.central if controls else None,
    }


def closing_table(experiment: Experiment, summary: dict[str, Any]) -> Table:
    """What a reader should see last: this run, the same run sent dense, the frozen base."""
    down, up = experiment.wire.down, experiment.wire.up
    name = f"{experiment.method.name}, density {_density(down.density)} down, {_density(up.density)} up"
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
