"""Population Based Training (Jaderberg et al., arXiv 1711.09846): members copy checkpoints and change their settings.

A member is a run whose settings change as it trains. After every generation, a fixed number of rounds:

    rank       the members by the metric; members that failed or diverged are last
    exploit    each of the worst `quantile` continues the checkpoint of a random one of the best `quantile`
    explore    and changes each setting: with probability `resample` a new draw; else a number is multiplied by one of
               `factors`, and a choice moves to a neighbour in its list
    others     continue their own checkpoint with their own settings

From the paper: truncation selection, the factors 0.8 and 1.2, new draws. Derived here: all members train the same
rounds at a time, so the result depends on the metrics only; a member without a metric copies whatever the quantile;
numbers stay within their range. Every draw is keyed by (seed, generation, member, setting).

A generation is a stage (see `rayfed.sweeps.stages`). A member of a generation has its own run directory, `g03-m05`,
which starts from a checkpoint of the generation before (see `rayfed.sweeps.warm_start`); its metrics and bytes include
the earlier rounds. All members have the file's seed: the same data, cohorts and starts. Schedules are constant after
the file's warm-up, because the search itself changes the rates.

After a generation, search.jsonl has its metrics, and a resumed search decides by these. So a failed member that
succeeds when it runs again changes no later decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rayfed import seeding
from rayfed.config.describe import format_value
from rayfed.config.search import PbtSettings
from rayfed.config.sweep import Sweep
from rayfed.errors import UserError
from rayfed.sweeps.plan import Trial, check_trials, make_trials
from rayfed.sweeps.space import Point, corners, draw, rounded, value_at
from rayfed.sweeps.stages import CONSTANT, SearchState, StagedSearch, read_search
from rayfed.sweeps.table import TrialRow, format_mb, format_mean, value_columns
from rayfed.sweeps.warm_start import check_live_change
from rayfed.tracking import Table

Spaces = Mapping[str, Any]


@dataclass(frozen=True)
class Member:
    """Member ``number`` in a generation, both from 1. ``parent`` is the member whose checkpoint it continues."""

    generation: int
    number: int
    settings: Mapping[str, Any]
    parent: Member | None = None

    @property
    def name(self) -> str:
        return f"g{self.generation:02d}-m{self.number:02d}"

    @property
    def lineage(self) -> list[Member]:
        """The members whose rounds are in its checkpoint: from the first generation to itself."""
        return [*(self.parent.lineage if self.parent else []), self]

    @property
    def copied(self) -> bool:
        """Whether it continues another member's checkpoint."""
        return self.parent is not None and self.parent.number != self.number

    @property
    def line(self) -> dict[str, Any]:
        """The member in search.jsonl."""
        parent = self.parent.name if self.parent else None
        return {"trial": self.name, "from": parent, "settings": dict(self.settings)}


def first_generation(search: PbtSettings, spaces: Spaces, seed: int) -> list[Member]:
    """Members with random settings: the same draws as in a sweep without a search."""
    return [
        Member(1, i + 1, {key: draw(space, key, seed, i) for key, space in spaces.items()})
        for i in range(search.population)
    ]


def next_generation(
    members: Sequence[Member], metrics: Sequence[float | None], search: PbtSettings, spaces: Spaces, mode: str,
    seed: int,
) -> list[Member]:  # fmt: skip
    """The next generation. ``metrics``: one a member; None if it failed or diverged. ``mode``: `max` or `min`.

    ValueError if no member has a metric.
    """
    sign = 1 if mode == "max" else -1
    finite = {member.number: sign * metric for member, metric in zip(members, metrics) if metric is not None}
    if not finite:
        raise ValueError("no member has a metric")
    ranked = sorted((member for member in members if member.number in finite), key=lambda m: -finite[m.number])
    count = min(math.ceil(search.quantile * len(members)), len(members) // 2)
    without = len(members) - len(ranked)
    continuing = {member.number for member in ranked[: len(ranked) - max(count - without, 0)]}
    best = ranked[: max(count, 1)]
    generation = members[0].generation + 1
    following = []
    for member in members:
        parent, settings = member, member.settings
        if member.number not in continuing:
            rng = seeding.numpy_rng(seed, "sweep.pbt.exploit", generation, member.number)
            parent = best[int(rng.integers(len(best)))]
            settings = explore(parent.settings, search, spaces, seed, generation, member.number)
        following.append(Member(generation, member.number, settings, parent))
    return following


def explore(
    settings: Mapping[str, Any], search: PbtSettings, spaces: Spaces, seed: int, generation: int, member: int
) -> dict[str, Any]:
    """The changed settings of a member that has copied ``settings``, for the generation that begins."""
    changed = {}
    for key, space in spaces.items():
        rng = seeding.numpy_rng(seed, "sweep.pbt.explore", generation, member, key)
        resample, quantile, factor = (float(u) for u in rng.random(3))
        ((kind, values),) = space.items()
        if resample < search.resample:
            changed[key] = value_at(space, quantile)
        elif kind == "choice":
            i = values.index(settings[key])
            neighbours = [j for j in (i - 1, i + 1) if 0 <= j < len(values)] or [i]
            changed[key] = values[neighbours[int(factor * len(neighbours))]]
        else:
            low, high = (rounded(limit) for limit in values)
            changed[key] = min(max(rounded(settings[key] * search.factors[int(factor * 2)]), low), high)
    return changed


class PbtSearch(StagedSearch):
    """The search of a sweep in the directory ``out``. UserError where its settings are wrong."""

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        super().__init__(settings, sweep, out)
        assert isinstance(sweep.search, PbtSettings)
        self.search = sweep.search
        ends = [self._point(point.overrides, self.search.rounds) for point in corners(sweep, {})]
        self.checked = make_trials(settings, ends, ["check"] * len(ends))
        (unsearched,) = make_trials(settings, [Point({}, {})], ["check"])
        experiment = unsearched.experiment
        rounds = experiment.server.rounds
        if rounds % self.search.rounds or rounds < 2 * self.search.rounds:
            raise UserError(
                f"server.rounds: got {rounds}, but it should be two or more generations of "
                f"sweep.search.rounds={self.search.rounds}"
            )
        check_live_change(experiment, sweep.parameters)
        self.federations = check_trials(self.checked, sweep)
        self.seed, self.cohort = experiment.seed, experiment.server.cohort
        self.generations = rounds // self.search.rounds
        self.ended_generations: list[TrialRow] = [line for line in read_search(out) if "generation" in line]
        self.members: list[Member] = []  # the newest generation
        self.state()  # UserError if the directory was made with other settings

    def state(self) -> SearchState:
        trials: list[Trial] = []
        pending: list[Trial] = []
        members = first_generation(self.search, self.sweep.parameters, self.seed)
        ended = None
        while ended is None:
            generation = members[0].generation
            recorded = generation <= len(self.ended_generations)
            if recorded:
                self._check_recorded(members)
            own = [self.trial(member) for member in members]
            trials += own
            missing = [trial for trial in own if not self.has_ended(trial)]
            pending += missing
            if not recorded:
                if missing:
                    break
                self.ended_generations.append(self._line(members))
            metrics = [line["metric"] for line in self.ended_generations[generation - 1]["members"]]
            if all(metric is None for metric in metrics):
                ended = "no member has a finite metric"
            elif generation == self.generations:
                ended = f"all of {generation} generations"
            else:
                mode = self.sweep.mode
                members = next_generation(members, metrics, self.search, self.sweep.parameters, mode, self.seed)
        lines = list(self.ended_generations)
        if pending:
            ended = None
        elif ended:
            rounds = len(trials) * self.search.rounds
            work = {"rounds": rounds, "client_rounds": rounds * self.cohort}
            lines.append({**self._best_line(members), "ended": ended, **work})
        self.members = members
        stage = f"generation {members[0].generation} of {self.generations}"
        return SearchState(trials, pending, stage, ended, self._result(), lines)

    def trial(self, member: Member) -> Trial:
        """The member's trial. Its rounds include those of the members before it."""
        point = self._point(member.settings, member.generation * self.search.rounds)
        return self.trial_at(member.name, point, member.parent.name if member.parent else None)

    def _point(self, settings: Mapping[str, Any], rounds: int) -> Point:
        return Point({**settings, "server.rounds": rounds, **CONSTANT}, dict(settings))

    def _check_recorded(self, members: Sequence[Member]) -> None:
        """UserError if search.jsonl has another generation in the place of this one."""
        generation = members[0].generation
        line = self.ended_generations[generation - 1]
        if line["metric"] != self.sweep.metric:
            self.refuse_resume(f"values of {line['metric']}", f"compares {self.sweep.metric}")
        if [{k: v for k, v in one.items() if k != "metric"} for one in line["members"]] != [m.line for m in members]:
            self.refuse_resume(f"members of generation {generation}", "comes to other members")

    def _line(self, members: Sequence[Member]) -> TrialRow:
        lines = [{**member.line, "metric": self.metric(self.trial(member))} for member in members]
        return {"generation": members[0].generation, "metric": self.sweep.metric, "members": lines}

    def _best(self, members: Sequence[Member]) -> Member | None:
        """The member with the best metric, the first of equal ones; None if none has a metric."""
        finite = {m.number: self.sign * x for m in members if (x := self.metric(self.trial(m))) is not None}
        return max((m for m in members if m.number in finite), key=lambda m: finite[m.number], default=None)

    def _best_line(self, members: Sequence[Member]) -> TrialRow:
        """The best member, and the settings of its lineage by rounds."""
        best = self._best(members)
        if best is None:
            return {"best": None}
        n = self.search.rounds
        schedule = [
            {"rounds": [(member.generation - 1) * n + 1, member.generation * n], "trial": member.name}
            | dict(member.settings)
            for member in best.lineage
        ]
        return {"best": best.name, "metric": self.metric(self.trial(best)), "schedule": schedule}

    def _result(self) -> str:
        best = self._best(self.members)
        if best is None:
            return f"{len(self.members)} members in generation {self.members[0].generation}"
        metric = self.sweep.metric
        return f"best is {best.name} with {metric} {format_mean(self.metric(self.trial(best)), None, metric)}"

    def table(self, trials: Sequence[Trial], rows: Mapping[str, TrialRow]) -> Table:
        """A row for each member of the newest generation, with the settings of its lineage, in order."""
        values = value_columns(self.checked[0], self.sweep)
        best = self._best(self.members)
        body = []
        for member in self.members:
            row = rows[member.name]
            body.append(
                (
                    member.name,
                    *(_history(member, key) for key in self.sweep.parameters),
                    ", ".join(own.parent.name for own in member.lineage if own.parent and own.copied),
                    *(format_mean(row.get(key), None, title) for key, title in values),
                    format_mb(row.get("bytes")),
                    ("best" if member is best else "") if row["status"] == "done" else row["status"],
                )
            )
        titles = (title for _, title in values)
        columns = ("member", *self.sweep.parameters, "copied", *titles, "MB both ways", "")
        return Table(f"Population Based Training: {self._result()}", columns, tuple(body))


def _history(member: Member, key: str) -> str:
    """`0.01 x 2 -> 0.012`: the setting in each generation, and how many times in a row."""
    values = (format_value(own.settings[key], quotes=False) for own in member.lineage)
    runs = [(value, len(list(same))) for value, same in groupby(values)]
    return " -> ".join(value if count == 1 else f"{value} x {count}" for value, count in runs)
