"""Compares runs: which of them differ in the seed alone, their best rounds, and their bytes to a target.

The best round of a run is the one with the best validation accuracy. The report shows its test accuracy, which has no
part in the choice. The known-answer problem has no test data; there the gap after the last round counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from rayfed.errors import UserError
from rayfed.reports.labels import differing_settings, labels_of
from rayfed.reports.runs import Run, listed

CLOSE = 0.95  # the default target, as a share of the best result


@dataclass(frozen=True)
class Measure:
    """The metric ``key`` of curves and targets, and the metric ``report`` that is reported for the best round.

    Values are shares, 0 to 1 for an accuracy. Without ``selects_round`` the last measured round counts, not the best.
    """

    key: str
    report: str | None
    label: str
    lower_is_better: bool = False
    selects_round: bool = True

    def better(self, a: float, b: float) -> bool:
        return a < b if self.lower_is_better else a > b

    def reaches(self, value: float, target: float) -> bool:
        return value <= target if self.lower_is_better else value >= target


ACCURACY = Measure("eval/accuracy", "test/accuracy", "validation accuracy")
TEST_ONLY = Measure("test/accuracy", None, "test accuracy", selects_round=False)
GAP = Measure("eval/gap", None, "share of the gap left", lower_is_better=True, selects_round=False)


@dataclass(frozen=True)
class RunSummary:
    """The numbers of one run. ``value``, ``report``, ``masked`` and ``best_bytes`` belong to ``round``, which counts.

    They are None if no round counts. Bytes are sums over all clients: ``down`` and ``up`` of all rounds, ``best_bytes``
    and ``target_bytes`` of the rounds up to ``round`` and ``target_round``.
    """

    round: int | None
    value: float | None
    report: float | None
    masked: float | None
    last_report: float | None
    best_bytes: int | None
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
    def front(self) -> list[RunGroup]:
        """The Pareto front of score and bytes up to the best round, fewest bytes first."""
        points = [(g.mean(lambda r: r.best_bytes), g.score, g) for g in self.ranked]
        known = [(size, score, g) for size, score, g in points if size is not None and score is not None]
        front, best = [], None
        for _, score, group in sorted(known, key=lambda point: point[0]):  # of equal sizes the best comes first
            if best is None or self.measure.better(score, best):
                front.append(group)
                best = score
        return front


@dataclass(frozen=True)
class Curve:
    """The mean, lowest and highest value over the seeds, at the points ``x`` that all seeds measured."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


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
    labels = labels_of(members, differing)

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
    known = [run.known_answer for run in runs]
    if all(known):
        return GAP
    if any(known):
        one, other = runs[known.index(True)], runs[known.index(False)]
        raise UserError(
            f"DIR: {one.folder} has a known answer and {other.folder} has not, so they have no measure in common"
        )
    for measure in (ACCURACY, TEST_ONLY):
        if all(run.series(measure.key) for run in runs):
            return measure
    tested = [run for run in runs if not run.series(TEST_ONLY.key)]
    raise UserError(f"DIR: {tested[0].folder if tested else runs[0].folder} has no accuracy in common with the others")


def default_target(measure: Measure, groups: Sequence[RunGroup]) -> float | None:
    """95 % of the best accuracy; for a gap, what is left after 95 % of the best reduction. None without a score."""
    scores = [group.score for group in groups if group.score is not None]
    if not scores:
        return None
    return 1 - CLOSE * (1 - min(scores)) if measure.lower_is_better else CLOSE * max(scores)


def summarise(run: Run, measure: Measure, target: float | None) -> RunSummary:
    """The numbers of the run at its best round by validation or, if the measure selects no round, at its last one."""
    series = run.series(measure.key)
    total = {record["round"]: record["bytes/total"] for record in run.rounds}
    at = None
    if measure.selects_round:
        at = max(series, key=lambda t: series[t], default=None)  # the first of equal rounds
    elif series and not run.diverged(measure.key):
        at = max(series)
    reports = run.series(measure.report) if measure.report else series
    reached = next((t for t, value in series.items() if target is not None and measure.reaches(value, target)), None)
    return RunSummary(
        round=at,
        value=None if at is None else series[at],
        report=None if at is None else reports.get(at),
        masked=None if at is None else run.series("test/accuracy_masked").get(at),
        last_report=None if run.diverged(measure.key) or not reports else reports[max(reports)],
        best_bytes=None if at is None else total[at],
        down=sum(record["bytes/down"] for record in run.rounds),
        up=sum(record["bytes/up"] for record in run.rounds),
        target_round=reached,
        target_bytes=None if reached is None else total[reached],
    )


def curve(runs: Sequence[Run], key: str, x: Callable[[Run], Mapping[int, float]] | None = None) -> Curve:
    """The metric ``key`` against rounds, or against ``x`` of each round, at the rounds where every run has both."""
    ys = [run.series(key) for run in runs]
    xs = [x(run) if x else {t: float(t) for t in y} for run, y in zip(runs, ys)]
    shared = [t for t in ys[0] if all(t in known for known in (*ys, *xs))]
    columns = [[y[t] for y in ys] for t in shared]
    return Curve(
        [mean(own[t] for own in xs) for t in shared],
        [mean(values) for values in columns],
        [min(values) for values in columns],
        [max(values) for values in columns],
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
    evaluated, without = [], []
    for run in runs:
        if run.known_answer or run.series(ACCURACY.key) or run.series(TEST_ONLY.key):
            evaluated.append(run)
        elif run.trial:
            without.append(run.folder.name)
        else:
            raise UserError(f"DIR: got {str(run.folder)!r}, but that run has not been evaluated yet")
    if not evaluated:
        raise UserError(f"DIR: {listed('trial', without)}, but none has been evaluated yet")
    return evaluated, [f"{listed('trial', without)} left out, not evaluated yet"] if without else []


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
