"""A run in figures: what it says of itself at its start; the best round, early stopping, summary and closing table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayfed import wire
from rayfed.clients.plan import RunPlan
from rayfed.config.training import EarlyStop, Server
from rayfed.profiles.client_profiles import describe
from rayfed.server.evaluation.baselines import Baselines
from rayfed.server.evaluation.experiences import forgetting
from rayfed.tracking import RunInfo, Table
from rayfed.tracking.sinks import Scalar
from rayfed.wire.ledger import DIRECTIONS

NAMED = 4  # largest number of ranks that the closing table names


def run_info(plan: RunPlan, out: Path, entries: int, done: int) -> RunInfo:
    """The run in the directory ``out`` after ``done`` rounds. ``entries``: of the largest adapter that trains."""
    sizes, metric = plan.federation.sizes, plan.task.metric or "accuracy"
    facts: dict[str, float | int | str | None] = {
        "clients": plan.federation.clients,
        "clients without data": int((sizes == 0).sum()),
        "training rows": int(sizes.sum()),
        "trainable parameters": entries,
        "frozen parameters": plan.model.parameters,
        "base in": f"{plan.model.base_format} on {plan.capability}",
        "padding": str(plan.model.batching),
        "ranks": describe(plan.profiles.rank_mix(sizes)),
    }
    return RunInfo(plan.name, out, plan.digest, dict(plan.settings), plan.rounds, done, facts, metric)


@dataclass
class Progress:
    """The task's metric (`Task.metric`) over the rounds so far: the best round is chosen on validation, never on
    test."""

    best_round: int | None = None
    best: float | None = None  # on validation
    best_test: float | None = None  # the test metric of the best round
    last: float | None = None  # on validation
    last_test: float | None = None
    last_test_masked: float | None = None
    last_test_clients: float | None = None  # the mean over the clients, see `rayfed.server.evaluation.per_client`
    last_test_unseen: float | None = None  # on the rows of clients that never took part
    last_gap: float | None = None  # where the answer is known: the share of the initial gap that is left
    ranks: list[int] = field(default_factory=list)  # at which a client trained, ascending
    dense_bytes: int = 0  # of the messages so far, had every entry travelled in fp32
    stale: int = 0  # evaluations since the last improvement that counted
    mark: float | None = None  # the value from which an improvement is measured
    stopped: bool = False
    experience: int | None = None  # of `partition.sequence`, from 1
    accuracies: list[list[float | None]] = field(default_factory=list)  # see `rayfed.server.evaluation.experiences`
    seen_accuracies: list[float | None] = field(default_factory=list)  # after each experience, on all seen classes

    def add(
        self, record: Mapping[str, Any], metric: str | None, dense_bytes: int, rule: EarlyStop | None, server: Server
    ) -> None:  # fmt: skip
        """Adds a round's record, and the bytes of its messages had they been dense. Decides whether the run ends.

        A round that was not evaluated changes neither the best round nor early stopping. Rounds of two experiences are
        measured on different rows, so the best round is one of the last experience.
        """
        self.stopped = server.spent(record["bytes/total"])
        self._add_experience(record, metric)
        self.dense_bytes += dense_bytes
        self.ranks = sorted({*self.ranks, *(rank for _, rank in record["clients/trained"])})
        self.last_gap = record.get("eval/gap", self.last_gap)
        if record.get(f"test/{metric}") is not None:
            self.last_test = record[f"test/{metric}"]
            self.last_test_masked = record.get(f"test/{metric}_masked")
            self.last_test_clients = record.get(f"test/{metric}_clients")
            self.last_test_unseen = record.get(f"test/{metric}_unseen")
        value = record.get(f"eval/{metric}")
        if value is None:
            return
        self.last = value
        if self.best is None or value > self.best:
            self.best_round, self.best, self.best_test = record["round"], value, record.get(f"test/{metric}")
        if rule is None:
            return
        if self.mark is None or value > self.mark + rule.min_delta:
            self.mark, self.stale = value, 0
        else:
            self.stale += 1
        self.stopped |= self.stale >= rule.patience

    def _add_experience(self, record: Mapping[str, Any], metric: str | None) -> None:
        now = record.get("sequence/experience")
        if now != self.experience:
            self.experience, self.best_round, self.best, self.best_test = now, None, None, None
        if now is None:
            return
        keys = [f"test/{metric}_experience_{j + 1}" for j in range(now)]
        if keys[0] in record:
            self.accuracies[now - 1 :] = [[record[key] for key in keys]]
            self.seen_accuracies[now - 1 :] = [record.get(f"test/{metric}")]

    def sequence(self) -> dict[str, Any]:
        """The figures of a run with `partition.sequence` for its summary; none for another run."""
        if self.experience is None:
            return {}
        known = [value for value in self.seen_accuracies if value is not None]
        return {
            "sequence/accuracies": self.accuracies,
            "sequence/average_accuracy": sum(known) / len(known) if known else None,
            "sequence/forgetting": forgetting(self.accuracies),
        }


def summarize(
    plan: RunPlan, progress: Progress, ledger: wire.Ledger, rounds: int, baselines: Baselines | None
) -> dict[str, Any]:
    """The summary as one flat mapping: metrics (accuracies from 0 to 1), bytes both ways, bytes had all been dense.

    `final/...` is measured on the state of the last evaluated round: for a finished run, the one that is exported.
    `bytes/down_total` and such add up what `bytes/down` and such are in each round.
    """
    metric = plan.task.metric or "accuracy"
    return {
        "rounds": rounds,
        "best/round": progress.best_round,
        f"best/eval_{metric}": progress.best,
        f"best/test_{metric}": progress.best_test,
        f"final/eval_{metric}": progress.last,
        f"final/test_{metric}": progress.last_test,
        f"final/test_{metric}_masked": progress.last_test_masked,
        f"final/test_{metric}_clients": progress.last_test_clients,
        f"final/test_{metric}_unseen": progress.last_test_unseen,
        "final/gap": progress.last_gap,
        **{f"{key}_total": count for key, count in ledger.totals().items()},
        "bytes/total": ledger.total_bytes,
        "bytes/dense": progress.dense_bytes,
        f"head_only/test_{metric}": baselines.same_rounds if baselines else None,
        f"head_only/test_{metric}_central": baselines.central if baselines else None,
        **progress.sequence(),
    }


def closing_table(plan: RunPlan, summary: dict[str, Any], ranks: Sequence[int]) -> Table:
    """The table at the end: the exported model, what clients receive of it, the messages sent dense, the bare base.

    ``ranks`` are those at which clients trained, ascending.
    """
    metric, rounds = plan.task.metric or "accuracy", summary["rounds"]
    name = f"{plan.settings['method']['name']}{_ranks(ranks)}, density {_densities(plan, rounds)}"
    final, sent, dense = f"final/test_{metric}", summary["bytes/total"], summary["bytes/dense"]
    rank, lost = summary["export/rank"], summary["export/lost_energy"]
    exported = f"  adapter/, whose rank of {rank} loses {lost:.2%} of the energy"
    rows = [
        (name, summary[final], sent),
        (exported, summary[f"export/test_{metric}"], None),
        ("  mean over the experiences, on all rows seen so far", summary.get("sequence/average_accuracy"), None),
        ("  forgetting: the mean loss of the earlier experiences", summary.get("sequence/forgetting"), None),
        ("  as clients receive it, sparse", summary[f"{final}_masked"], None),  # what FLASC's own code evaluates
        ("  mean over the clients, each on data like its own", summary[f"{final}_clients"], None),
        ("  on the rows of clients that never took part", summary[f"{final}_unseen"], None),
        (f"  the same messages sent dense: {dense / max(sent, 1):.1f}x", None, dense if sent < dense else None),
        ("frozen base, only the head trained, same rounds", summary[f"head_only/test_{metric}"], None),
        ("  trained centrally to convergence", summary[f"head_only/test_{metric}_central"], None),
    ]
    rows = [row for row in rows if row[1] is not None or row[2] is not None]
    cells = [
        (label, "" if value is None else f"{100 * value:.1f} %", "" if size is None else f"{size / 1e6:.2f}")
        for label, value, size in rows
    ]
    values: list[tuple[Scalar, ...]] = [(*row[:2], None if row[2] is None else row[2] / 1e6) for row in rows]
    if (gap := summary["final/gap"]) is not None:
        label = "share of the initial gap to the optimum that is left"
        cells.append((label, f"{gap:.3%}", ""))
        values.append((label, gap, None))
        if (cut := summary["export/gap"]) is not None:
            cells.append((exported, f"{cut:.3%}", ""))
            values.append((exported, cut, None))
    columns = ("", f"test {metric}", "MB both ways")
    return Table(f"After {rounds} rounds", columns, tuple(cells), tuple(values))


def _ranks(used: Sequence[int]) -> str:
    """`, rank 16`, `, ranks 4, 8 and 16`, or their range where there are many."""
    numbers = [str(rank) for rank in used]
    if len(numbers) < 2:
        return "".join(f", rank {number}" for number in numbers)
    if len(numbers) > NAMED:
        return f", {len(numbers)} ranks from {numbers[0]} to {numbers[-1]}"
    return f", ranks {', '.join(numbers[:-1])} and {numbers[-1]}"


def _densities(plan: RunPlan, rounds: int) -> str:
    """`1/4 down, 1/4 up`: as the wire had them, from the least to the largest where tiers or rounds differ."""
    tiers, found = plan.profiles.tier_mix(plan.federation.sizes), []
    for way in DIRECTIONS:
        settings, owns = getattr(plan.wire, way), [getattr(tier, f"density_{way}") for tier in tiers]
        used = sorted({settings.density_at(t, own) for own in owns for t in (0, max(rounds - 1, 0))})
        span = used if len(used) == 1 else (used[0], used[-1])
        found.append(f"{' to '.join(map(_density, span))} {way}")
    return ", ".join(found)


def _density(value: float) -> str:
    return f"1/{1 / value:g}" if value < 1 and (1 / value).is_integer() else f"{value:g}"
