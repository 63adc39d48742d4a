"""Compares runs: which of them differ in the seed alone, their results, and their bytes to a target.

A run's result is that of its last evaluated round, whose model it exports. Runs are ranked by the validation accuracy;
the test accuracy is reported and has no part in the choice. The known-answer problem has no test data; there the gap
counts. Where a task has no accuracy, the loss counts. The best round on validation is shown beside the last one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from rayfed.errors import UserError
from rayfed.reports.labels import differing_settings, labels_of, printable
from rayfed.reports.runs import Run, listed

CLOSE = 0.95  # the default target, as a share of the best result


@dataclass(frozen=True)
class Measure:
    """The metric ``key`` that ranks runs, and the metric ``report`` that is only reported.

    ``share``: whether values are shares, which are shown in percent, 0 to 1 for an accuracy. ``between``: the metric of
    rounds that have no ``key``, for curves only.
    """

    key: str
    report: str | None
    label: str
    lower_is_better: bool = False
    between: str | None = None
    report_label: str = "test accuracy"
    share: bool = True

    def better(self, a: float, b: float) -> bool:
        return a < b if self.lower_is_better else a > b


ACCURACY = Measure("eval/accuracy", "test/accuracy", "validation accuracy", between="eval_subset/accuracy")
TEST_ONLY = Measure("test/accuracy", None, "test accuracy")
GAP = Measure("eval/gap", None, "share of the gap left", lower_is_better=True)
LOSS = Measure(
    "eval/loss", "test/loss", "validation loss", lower_is_better=True, between="eval_subset/loss",
    report_label="test loss", share=False,
)  # fmt: skip
MEASURES = (GAP, ACCURACY, TEST_ONLY, LOSS)  # the first one that all runs have counts


@dataclass(frozen=True)
class RunSummary:
    """The numbers of one run. ``value``, ``report`` and ``masked`` are those of the last evaluated round.

    They are None if the run diverged. ``best_report`` is the reported metric of ``best_round``, the best on validation.
    Bytes are sums over all clients: ``down`` and ``up`` of all rounds, ``target_bytes`` up to ``target_round``.
    """

    value: float | None
    report: float | None
    masked: float | None
    best_round: int | None
    best_report: float | None
    down: int
    up: int
    target_round: int | None
    target_bytes: int | None

    @property
    def bytes(self) -> int:
        return self.down + self.up


@dataclass(frozen=True, eq=False)
class RunGroup:
    """Runs that differ in the seed alone.

    Means are over ``counted``: the finished runs, or all runs if none is finished. Each has an entry in ``summaries``.
    """

    label: str
    runs: tuple[Run, ...]
    counted: tuple[Run, ...]
    summaries: tuple[RunSummary, ...]

    def values(self, number: Callable[[RunSummary], float | None]) -> list[float]:
        """The number for each summary that has it."""
        return [value for summary in self.summaries if (value := number(summary)) is not None]

    def mean(self, number: Callable[[RunSummary], float | None]) -> float | None:
        """Mean over the seeds that have the number; None if none has."""
        return mean(values) if (values := self.values(number)) else None

    def deviation(self, number: Callable[[RunSummary], float | None]) -> float | None:
        """Sample standard deviation (n - 1) over the seeds; None for fewer than two."""
        return stdev(values) if len(values := self.values(number)) > 1 else None

    @property
    def score(self) -> float | None:
        """The mean of the measure; None if a seed has no finite value."""
        return self._mean_of_all(lambda r: r.value)

    @property
    def target_bytes(self) -> float | None:
        """Mean bytes to the target; None if a seed did not reach it."""
        return self._mean_of_all(lambda r: r.target_bytes)

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.runs[0].settings

    def _mean_of_all(self, number: Callable[[RunSummary], float | None]) -> float | None:
        return mean(values) if len(values := self.values(number)) == len(self.summaries) else None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything a report shows.

    ``target`` is a value of the measure. ``differing`` maps a dotted setting to its value in each group; the value is
    None if a group has no such setting. ``notes`` are one-line remarks on runs that are left out.
    """

    measure: Measure
    groups: tuple[RunGroup, ...]
    target: float | None
    given_target: bool
    differing: Mapping[str, tuple[Any, ...]]
    notes: tuple[str, ...]

    @property
    def ranked(self) -> list[RunGroup]:
        """Groups from the best score to the worst; groups without a score last."""
        sign = 1 if self.measure.lower_is_better else -1
        return sorted(self.groups, key=lambda g: (g.score is None, sign * (g.score or 0.0)))

    @property
    def shown(self) -> tuple[str, Callable[[RunSummary], float | None]]:
        """(name, number) of what maps show: the reported metric, or the measure where a group has no reported value."""
        reported = self.measure.report and all(g.values(lambda r: r.report) for g in self.groups if g.score is not None)
        return (self.measure.report_label, lambda r: r.report) if reported else (self.measure.label, lambda r: r.value)

    @property
    def best_of_methods(self) -> list[RunGroup]:
        """The best group of each method, from the best to the worst. A method without a score is left out."""
        best: dict[str, RunGroup] = {}
        for group in self.ranked:
            if group.score is not None:
                best.setdefault(group.settings["method.name"], group)
        return list(best.values())

    @property
    def points(self) -> dict[RunGroup, tuple[float, float]]:
        """Group -> (bytes, score), for the groups with a score."""
        sizes = {group: group.mean(lambda r: r.bytes) or 0.0 for group in self.groups}
        return {group: (sizes[group], group.score) for group in self.groups if group.score is not None}

    @property
    def front(self) -> list[RunGroup]:
        """The Pareto front of score and bytes, fewest bytes first."""
        points, front = self.points, []
        best = None
        for group in sorted((g for g in self.ranked if g in points), key=lambda g: points[g][0]):
            if best is None or self.measure.better(points[group][1], best):  # of equal sizes the best comes first
                front.append(group)
                best = points[group][1]
        return front


@dataclass(frozen=True)
class Curve:
    """The mean, lowest and highest value over the seeds, at the points ``x`` that all seeds measured.

    ``full``: the indices of the points that were measured on the whole split, see `eval.subset`.
    """

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    full: list[int]


def compare(runs: Sequence[Run], notes: Sequence[str] = (), target: float | None = None) -> Comparison:
    """Groups the runs over their seeds and summarises them. ``target``: a share, 0 to 1 exclusive.

    UserError if the runs have no measure in common, a run was not evaluated, or the target is no such share.
    """
    if target is not None and not 0 < target < 1:
        raise UserError(f"--target: got {target:g}, but it should be a share between 0 and 1, such as 0.8")
    runs, left_out = _evaluated(runs)
    measure = measure_of(runs)
    members = _members(runs)
    differing = differing_settings([group[0] for group in members])
    labels = [printable(label) for label in labels_of(members, differing)]

    def grouped(goal: float | None) -> tuple[RunGroup, ...]:
        groups = []
        for label, own in zip(labels, members):
            counted = tuple(run for run in own if run.finished) or tuple(own)
            summaries = tuple(summarise(run, measure, goal) for run in counted)
            groups.append(RunGroup(label, tuple(own), counted, summaries))
        return tuple(groups)

    goal = default_target(measure, grouped(None)) if target is None else target
    groups = grouped(goal)
    return Comparison(measure, groups, goal, target is not None, differing, (*notes, *left_out, *_unfinished(groups)))


def measure_of(runs: Sequence[Run]) -> Measure:
    """The measure that all runs have. UserError if there is none."""
    for measure in MEASURES:
        if all(run.measured(measure.key) for run in runs):
            return measure
    found = listed("run", [str(run.folder) for run in runs])
    raise UserError(f"DIR: got {found}, but they have none of {', '.join(m.key for m in MEASURES)} in common")


def default_target(measure: Measure, groups: Sequence[RunGroup]) -> float | None:
    """95 % of the best accuracy; for a gap, what is left after 95 % of the best reduction.

    None without a score, and for a loss, of which no share means anything.
    """
    scores = [group.score for group in groups if group.score is not None]
    if not scores or not measure.share:
        return None
    return 1 - CLOSE * (1 - min(scores)) if measure.lower_is_better else CLOSE * max(scores)


def summarise(run: Run, measure: Measure, target: float | None) -> RunSummary:
    """The numbers of the run; those of the last evaluated round are None if the run diverged."""
    series = run.comparable(measure.key)
    total = {record["round"]: record["bytes/total"] for record in run.rounds}
    last = max(series) if series and not run.diverged(measure.key) else None
    choose = min if measure.lower_is_better else max  # of equal rounds the first one
    best = choose(series, key=lambda t: series[t], default=None) if measure.report else None
    reports = run.series(measure.report) if measure.report else {}
    reached = next((t for t, value in series.items() if target is not None and not measure.better(target, value)), None)
    return RunSummary(
        value=None if last is None else series[last],
        report=None if last is None else reports.get(last),
        masked=None if last is None else run.series("test/accuracy_masked").get(last),
        best_round=best,
        best_report=None if best is None else reports.get(best),
        down=sum(record["bytes/down"] for record in run.rounds),
        up=sum(record["bytes/up"] for record in run.rounds),
        target_round=reached,
        target_bytes=None if reached is None else total[reached],
    )


def curve(runs: Sequence[Run], measure: Measure, x: Mapping[Run, Mapping[int, float]] | None = None) -> Curve:
    """The measure against rounds, or against ``x`` of each round, at the rounds where every run has both."""
    full = [run.series(measure.key) for run in runs]
    ys = [(run.series(measure.between) if measure.between else {}) | own for run, own in zip(runs, full)]
    xs = [x[run] if x else {t: float(t) for t in y} for run, y in zip(runs, ys)]
    shared = sorted(t for t in ys[0] if all(t in known for known in (*ys, *xs)))
    columns = [[y[t] for y in ys] for t in shared]
    return Curve(
        [mean(own[t] for own in xs) for t in shared],
        [mean(values) for values in columns],
        [min(values) for values in columns],
        [max(values) for values in columns],
        [i for i, t in enumerate(shared) if t in full[0]],
    )


def _unfinished(groups: Sequence[RunGroup]) -> Iterator[str]:
    for group in groups:
        if len(group.counted) < len(group.runs):
            seeds = ", ".join(f"seed {run.seed}" for run in group.runs if run not in group.counted)
            yield f"{group.label}: left out of the means, not finished: {seeds}"
        elif not group.counted[0].finished:
            yield f"{group.label}: not finished, shown up to its last round"


def _evaluated(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs with an evaluation, and a note on the trials without one. UserError for another run without one."""
    without = [run for run in runs if not any(run.measured(measure.key) for measure in MEASURES)]
    if given := [run.folder for run in without if not run.trial]:
        raise UserError(f"DIR: got {str(given[0])!r}, but that run has not been evaluated yet")
    trials = listed("trial", [run.folder.name for run in without])
    if len(without) == len(runs):
        raise UserError(f"DIR: {trials}, but none has been evaluated yet")
    return [run for run in runs if run not in without], [f"{trials} left out, not evaluated yet"] if without else []


def _members(runs: Sequence[Run]) -> list[list[Run]]:
    """Lists of runs with the same settings except the seed, in the order of the seed.

    If a seed occurs twice, the second run starts another list.
    """
    found: dict[tuple[str, int], list[Run]] = {}
    times: Counter[tuple[str, int]] = Counter()
    for run in runs:
        settings = json.dumps(run.result_settings(), sort_keys=True, default=str)
        found.setdefault((settings, times[settings, run.seed]), []).append(run)
        times[settings, run.seed] += 1
    return [sorted(group, key=lambda run: run.seed) for group in found.values()]
