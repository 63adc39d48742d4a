"""Runs against each other: what counts, which runs are one setting at several seeds, who reaches a target for how much.

The best round of a run is chosen by its validation accuracy; what is reported of that round is its test accuracy, which
never took part in the choice. The known-answer problem has neither: there the gap after the last round counts.
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

CLOSE = 0.95  # the default target: so much of the way that the best goes


@dataclass(frozen=True)
class Measure:
    """The figure that curves show and targets are set in, and its twin that is reported."""

    key: str
    report: str | None
    label: str
    falls: bool = False
    chooses: bool = True

    def better(self, a: float, b: float) -> bool:
        return a < b if self.falls else a > b

    def reaches(self, value: float, target: float) -> bool:
        return value <= target if self.falls else value >= target


ACCURACY = Measure("eval/accuracy", "test/accuracy", "validation accuracy")
TEST_ONLY = Measure("test/accuracy", None, "test accuracy", chooses=False)
GAP = Measure("eval/gap", None, "share of the gap left", falls=True, chooses=False)


@dataclass(frozen=True)
class Reading:
    """One run in figures. ``value`` and ``report`` are of the ``round`` that counts; None where nothing is finite."""

    round: int | None
    value: float | None
    report: float | None
    masked: float | None
    last_report: float | None
    bytes_then: int | None
    down: int
    up: int
    target_round: int | None
    target_bytes: int | None

    @property
    def bytes(self) -> int:
        return self.down + self.up


@dataclass(frozen=True, eq=False)
class RunGroup:
    """Runs that differ in their seed alone. Means are over ``counted``: those that came to their end, if any did."""

    label: str
    runs: tuple[Run, ...]
    counted: tuple[Run, ...]
    readings: tuple[Reading, ...]  # of those that count

    def values(self, figure: Callable[[Reading], float | None]) -> list[float]:
        return [value for reading in self.readings if (value := figure(reading)) is not None]

    def mean(self, figure: Callable[[Reading], float | None]) -> float | None:
        return mean(values) if (values := self.values(figure)) else None

    def deviation(self, figure: Callable[[Reading], float | None]) -> float | None:
        """Sample deviation over the seeds (n - 1 below); None for fewer than two."""
        return stdev(values) if len(values := self.values(figure)) > 1 else None

    @property
    def score(self) -> float | None:
        """The mean of the figure that chooses; None where it was not finite at some seed."""
        return self.mean(lambda r: r.value) if all(r.value is not None for r in self.readings) else None

    @property
    def target_bytes(self) -> float | None:
        """Mean bytes to the target, if every seed that counts reached it."""
        values = self.values(lambda r: r.target_bytes)
        return mean(values) if len(values) == len(self.readings) else None

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.runs[0].settings


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything a report shows. ``differing``: dotted setting -> its value in each group, None where it has none."""

    measure: Measure
    groups: tuple[RunGroup, ...]
    target: float | None
    given_target: bool
    differing: Mapping[str, tuple[Any, ...]]
    notes: tuple[str, ...]

    @property
    def ranked(self) -> list[RunGroup]:
        """Groups from the best figure that chooses to the worst; those without one last."""
        sign = 1 if self.measure.falls else -1
        return sorted(self.groups, key=lambda g: (g.score is None, sign * (g.score or 0.0)))

    @property
    def front(self) -> list[RunGroup]:
        """Groups that no other beats in both the figure that chooses and the bytes to it, fewest bytes first."""
        points = [(g, g.mean(lambda r: r.bytes_then), g.score) for g in self.groups]
        known = [(g, size, score) for g, size, score in points if size is not None and score is not None]
        front, best = [], None
        for group, _, score in sorted(known, key=lambda p: (p[1], p[2] if self.measure.falls else -p[2])):
            if best is None or self.measure.better(score, best):
                front.append(group)
                best = score
        return front


@dataclass(frozen=True)
class Curve:
    """A group's mean over its seeds, and the lowest and highest of them, where all of them were measured."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def compare(runs: Sequence[Run], notes: Sequence[str] = (), target: float | None = None) -> Comparison:
    """Groups the runs and reads them. UserError, one line, where they share no measure or the target is none."""
    if target is not None and not 0 < target < 1:
        raise UserError(f"--target: got {target:g}, but it should be a share between 0 and 1, such as 0.8")
    runs, left_out = _measured(runs)
    measure = measure_of(runs)
    members = _members(runs)
    differing = differing_settings([group[0] for group in members])
    labels = labels_of(members, differing)
    counted = [tuple(run for run in group if run.finished) or tuple(group) for group in members]
    goal = default_target(measure, counted) if target is None else target
    groups = tuple(
        RunGroup(label, tuple(group), whole, tuple(read(run, measure, goal) for run in whole))
        for label, group, whole in zip(labels, members, counted)
    )
    said = (*notes, *left_out, *_unfinished(groups))
    return Comparison(measure, groups, goal, target is not None, differing, said)


def measure_of(runs: Sequence[Run]) -> Measure:
    """What all runs can be compared by; UserError where there is no such figure."""
    known = [run.known_answer for run in runs]
    if all(known):
        return GAP
    if any(known):
        one, other = runs[known.index(True)], runs[known.index(False)]
        raise UserError(
            f"DIR: {one.folder} has a known answer and {other.folder} has not, so they share no figure to compare"
        )
    for measure in (ACCURACY, TEST_ONLY):
        if all(run.series(measure.key) for run in runs):
            return measure
    tested = [run for run in runs if not run.series(TEST_ONLY.key)]
    raise UserError(f"DIR: {tested[0].folder if tested else runs[0].folder} shares no accuracy with the others")


def default_target(measure: Measure, groups: Sequence[Sequence[Run]]) -> float | None:
    """95 % of the best mean accuracy; for a gap, what is left after 95 % of the best's way. None without a best."""
    best: float | None = None
    for group in groups:
        values = [read(run, measure, None).value for run in group]
        known = [value for value in values if value is not None]
        if len(known) == len(group) and (best is None or measure.better(mean(known), best)):
            best = mean(known)
    if best is None:
        return None
    return 1 - CLOSE * (1 - best) if measure.falls else CLOSE * best


def read(run: Run, measure: Measure, target: float | None) -> Reading:
    """The run's figures, at its best round by validation, or where nothing chooses, at its last measured one."""
    series = run.series(measure.key)
    total = {record["round"]: record["bytes/total"] for record in run.rounds}
    at = None
    if measure.chooses:
        at = max(series, key=lambda t: series[t], default=None)  # the first of equals
    elif series and not run.diverged(measure.key):
        at = max(series)
    reports = run.series(measure.report) if measure.report else series
    reached = [t for t, value in series.items() if target is not None and measure.reaches(value, target)]
    return Reading(
        round=at,
        value=None if at is None else series[at],
        report=None if at is None else reports.get(at),
        masked=None if at is None else run.series("test/accuracy_masked").get(at),
        last_report=None if run.diverged(measure.key) or not reports else reports[max(reports)],
        bytes_then=None if at is None else total[at],
        down=sum(record["bytes/down"] for record in run.rounds),
        up=sum(record["bytes/up"] for record in run.rounds),
        target_round=reached[0] if reached else None,
        target_bytes=total[reached[0]] if reached else None,
    )


def curve(runs: Sequence[Run], key: str, x: Callable[[Run], Mapping[int, float]] | None = None) -> Curve:
    """The figure against rounds or what ``x`` gives for each round, at the rounds that every run has of both."""
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
            out = ", ".join(f"seed {run.seed}" for run in group.runs if run not in group.counted)
            yield f"{group.label}: not finished and not in its means: {out}"
        elif not group.counted[0].finished:
            yield f"{group.label}: not finished, read as far as it came"


def _measured(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs with an evaluation, and a note on the trials without; UserError for a run without."""
    kept, without = [], []
    for run in runs:
        if run.known_answer or run.series(ACCURACY.key) or run.series(TEST_ONLY.key):
            kept.append(run)
        elif run.trial:
            without.append(run.folder.name)
        else:
            raise UserError(f"DIR: got {str(run.folder)!r}, but that run has not been evaluated yet")
    if not kept:
        raise UserError(f"DIR: {listed('trial', without)}, but none has been evaluated yet")
    return kept, [f"{listed('trial', without)} left out, not evaluated so far"] if without else []


def _members(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs by their settings but for the seed, each list by seed. A seed run twice starts a list of its own."""
    found: dict[tuple[str, int], list[Run]] = {}
    times: Counter[tuple[str, int]] = Counter()
    for run in runs:
        settings = json.dumps(run.deciding(), sort_keys=True, default=str)
        found.setdefault((settings, times[settings, run.seed]), []).append(run)
        times[settings, run.seed] += 1
    return [sorted(group, key=lambda run: run.seed) for group in found.values()]
