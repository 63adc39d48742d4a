"""The section `sweep`: one file that describes many runs. All other sections of the file are common to the runs.

`load_sweep` splits the file into the section and the common settings. The section is valid; the common settings may
lack a value that each trial sets. A value that varies is written as a space: `{grid: [...]}` (every value), or
`{choice: [...]}`, `{uniform: [low, high]}` or `{loguniform: [low, high]}` (a random draw, `samples` times). With a
`search`, the settings of a trial depend on the results of earlier trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rayfed.config.describe import format_value, mistake
from rayfed.config.load import assign, parse_override, read_settings, validate_as
from rayfed.config.marks import flat, live, searched
from rayfed.config.search import AshaSettings, FlascSearchSettings, OptunaSettings, PbtSettings
from rayfed.config.types import MOST_NAME, MOST_TRIALS, Name, Names, Printable, Section, TextMistake, Trials, Workers
from rayfed.errors import UserError

SPACES = ("grid", "choice", "uniform", "loguniform")
DRAWN = "choice, uniform or loguniform"
FORMS = "{grid: [...]}, {choice: [...]}, {uniform: [low, high]} or {loguniform: [low, high]}"
SEED = "seed"
MOST_SETTINGS = 100  # that vary together


class Sweep(Section):
    """The settings that vary between the trials of a sweep, and how trials are compared."""

    parameters: dict[str, Any] = Field({}, max_length=MOST_SETTINGS)
    """Dotted setting -> its values: {grid: [...]}, {choice: [...]}, {uniform: [low, high]} or
    {loguniform: [low, high]}. Every combination of the grids runs.
    """
    cases: dict | list | None = None
    """Settings that change together: a list of cases, or label -> case. A case is a mapping from dotted settings to
    values or spaces. Every case runs with every point of `parameters`. null: no cases. A sweep has at most 5000 points.
    """
    samples: Trials = 1
    """Draws from choice, uniform and loguniform. Every point of the grid gets the same draws."""
    metric: Name = "eval/accuracy"
    """Key of metrics.jsonl by which trials are compared; keys with `eval/` are measured on validation data."""
    fallback: Name | None = None
    """Key by which trials are compared that never measure `metric`: eval/accuracy for eval/accuracy_masked, where
    clients get the whole model in some trials and a sparse one in others. null: such trials have no metric.
    """
    mode: Literal["max", "min"] = "max"
    """max: a larger metric is better; min: a smaller one."""
    at: Literal["last", "best"] = "last"
    """The round that counts: the last measured round, or the round with the best metric."""
    report: Name | None = None
    """Key of metrics.jsonl shown beside the metric; null: the metric on test data, if measured."""
    tune: Names = ()
    """Swept settings of which the table shows only the best value per row, by the mean metric over the seeds."""
    tune_seeds: Trials | None = None
    """The first so many seeds of the grid of `seed` choose the values of `tune`; the other seeds run with the chosen
    values only. null: all seeds run all values.
    """
    search: FlascSearchSettings | OptunaSettings | PbtSettings | None = Field(None, discriminator="kind")
    """A search that chooses settings by results: flasc searches rank and density, in place of `parameters` and `cases`;
    optuna and pbt choose from the spaces. null: every point of the spaces runs.
    """
    stop: AshaSettings | None = None
    """Rule that stops trials early; null: none."""
    concurrency: Workers | None = None
    """Most trials at a time; null: as many as fit on the cluster."""

    def mistakes(self) -> Iterator[str]:
        search = self.search
        for name in search.replaces if search else ():
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                got = "a section" if name == "stop" else format_value(value)
                yield f"sweep.{name}: got {got}, but sweep.search chooses the trials"
        if search and self.at == "best" and not isinstance(search, OptunaSettings):
            yield mistake("sweep.at", "best", f"in sweep.search={search.kind} trials share rounds; allowed is last")
        if not isinstance(search, FlascSearchSettings):
            together = self._search_mistakes(search.kind) if search else self._list_mistakes()
            yield from [*self._value_mistakes()] or together
        if self.fallback is not None and (search or self.stop):
            yield mistake("sweep.fallback", self.fallback, "sweep.search and sweep.stop know one metric")

    def _value_mistakes(self) -> Iterator[str]:
        for key, space in self.parameters.items():
            if not is_space(space):
                yield mistake(f"sweep.parameters.{key}", space, f"it should be {FORMS}")
        if self.cases is not None and not self.cases:
            yield mistake("sweep.cases", self.cases, "it needs at least one case")
        for label, case in self.labelled():
            where = f"sweep.cases.{label}"
            try:
                Printable(MOST_NAME)(label)
            except TextMistake as text:
                yield f"sweep.cases: got the label {format_value(label)}, but {text}"
                continue
            if not isinstance(case, dict) or len(case) > MOST_SETTINGS or not all(isinstance(key, str) for key in case):
                mapping = f"a mapping from dotted settings, at most {MOST_SETTINGS}, to values"
                yield mistake(where, case, f"a case is {mapping}")
                continue
            for key in case.keys() & self.parameters.keys():
                yield mistake(f"{where}.{key}", case[key], "sweep.parameters already varies that setting")
        for where, _, space in self.spaces():
            yield from _space_mistakes(where, space)

    def _search_mistakes(self, kind: str) -> Iterator[str]:
        """One line for each valid space that a search of this kind does not take, or where it has nothing to choose."""
        for where, key, space in self.spaces():
            if "grid" in space and (kind == "pbt" or where != f"sweep.parameters.{SEED}"):
                yield mistake(where, space, f"sweep.search={kind} takes {DRAWN}")
            elif "grid" not in space and key == SEED:
                yield mistake(where, space, f"a search compares at the same seeds{': a grid' * (kind == 'optuna')}")
            elif kind == "pbt" and key not in live():
                yield mistake(where, space, f"pbt changes settings during a run; allowed are {', '.join(live())}")
        if all(key == SEED for _, key, _ in self.spaces()) and len(self.labelled()) < 2:
            yield mistake(
                "sweep.parameters", self.parameters, f"sweep.search={kind} needs something to choose: {DRAWN}"
            )

    def _list_mistakes(self) -> Iterator[str]:
        """One line for each way in which valid spaces do not go together, without a search."""
        if not self.parameters and self.cases is None:
            yield mistake("sweep.parameters", {}, "a sweep needs parameters or cases")
        points = sum(self._points(case) for _, case in self.labelled())
        if points > MOST_TRIALS:
            yield f"sweep: got {points} points (cases x grids x samples), but at most {MOST_TRIALS} are allowed"
        if self.samples > 1 and all("grid" in space for _, _, space in self.spaces()):
            yield mistake("sweep.samples", self.samples, "nothing is drawn: all spaces are grids")
        varied = {key for _, key, _ in self.spaces()} - {SEED}
        for key in self.tune:
            if key not in varied:
                yield mistake("sweep.tune", key, f"the settings that vary are {', '.join(sorted(varied)) or 'none'}")
        if self.tune_seeds is not None:
            seeds = len(self.parameters.get(SEED, {}).get("grid", []))
            if not self.tune:
                yield mistake("sweep.tune_seeds", self.tune_seeds, "sweep.tune names nothing to choose")
            elif self.tune_seeds > seeds:
                yield mistake("sweep.tune_seeds", self.tune_seeds, f"sweep.parameters.seed.grid has {seeds} values")

    def _points(self, case: Mapping[str, Any]) -> int:
        """The number of points of a case."""
        spaces = [space for space in {**self.parameters, **case}.values() if is_space(space)]
        drawn = any("grid" not in space for space in spaces)
        return math.prod(len(space["grid"]) for space in spaces if "grid" in space) * self.samples**drawn

    def labelled(self) -> list[tuple[str, Any]]:
        """(label, overrides) of every case; without cases, of one that sets nothing. In a list, labels are numbers."""
        cases = self.cases or [{}]
        pairs = cases.items() if isinstance(cases, dict) else enumerate(cases, 1)
        return [(str(label), case) for label, case in pairs]

    def spaces(self) -> Iterator[tuple[str, str, Any]]:
        """(where the space is written, dotted setting, space): those of `parameters`, then those of the cases."""
        places = [("sweep.parameters", self.parameters)]
        places += [(f"sweep.cases.{label}", case) for label, case in self.labelled() if isinstance(case, dict)]
        for where, values in places:
            yield from ((f"{where}.{key}", key, value) for key, value in values.items() if is_space(value))


class _File(Section):
    """What a file says of the sweep itself. Validated so, mistakes have names that begin with `sweep`."""

    sweep: Sweep
    name: Name = "sweep"


def is_space(value: Any) -> bool:
    """Whether the value is a space, valid or not: a mapping whose only key is the name of a kind of space."""
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in SPACES


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Sweep]:
    """(settings that all trials share, the section `sweep`) of a YAML file with `key=value` overrides applied.

    `sweep.parameters.KEY={...}` sets a parameter; with null it removes the parameter. Raises UserError, one line per
    mistake, if the section is wrong. The shared settings are validated trial by trial, see `rayfed.sweeps.plan`.
    """
    settings = read_settings(path)
    given = [(*parse_override(override), override) for override in overrides]
    for key, value, override in given:
        assign(settings, key, value, override)
    section = settings.get("sweep")
    if isinstance(section, dict) and isinstance(section.get("parameters"), dict):  # nested, or with dotted names
        parameters = dict(flat(section["parameters"], leaf=lambda value: not value or is_space(value)))
        section["parameters"] = {key: space for key, space in parameters.items() if space is not None}
    if section is None:
        raise UserError(f"sweep: {path} has no section `sweep`; `rayfed run` takes it; `rayfed init` lists sweeps")
    sweep = validate_as(_File, {"sweep": settings.pop("sweep"), "name": settings.get("name", "sweep")}).sweep
    by_search = searched() if isinstance(sweep.search, FlascSearchSettings) else ()
    for key, _, override in given:
        if key in sweep.parameters or key in by_search or all(key in case for _, case in sweep.labelled()):
            raise UserError(f"{key}: got {override!r}, but the sweep itself sets it, so the override would do nothing")
    return settings, sweep


def _space_mistakes(where: str, space: Mapping[str, Any]) -> Iterator[str]:
    ((kind, values),) = space.items()
    where = f"{where}.{kind}"
    if not isinstance(values, list) or not 1 <= len(values) <= MOST_TRIALS:
        yield mistake(where, values, f"it should be a list of 1 to {MOST_TRIALS} values")
    elif kind == "grid":
        for twice in [value for i, value in enumerate(values) if value in values[:i]][:1]:
            yield f"{where}: got {format_value(twice)} twice"
    elif kind != "choice":
        least = 1e-30 if kind == "loguniform" else -1e30
        numbers = len(values) == 2 and all(type(value) in (int, float) for value in values)
        if not numbers or not least <= values[0] < values[1] <= 1e30:
            yield mistake(where, values, f"it should be [low, high] with low < high, both in [{least}, 1e+30]")
