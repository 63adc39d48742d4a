"""The section `sweep`: one file that describes many runs. The rest of the file is what they have in common.

`load_sweep` splits the file; what it returns has a valid section, and base settings that only a trial's overrides may
make whole. A value that varies is written as a space: `{grid: [...]}` (each of them), or one of `{choice: [...]}`,
`{uniform: [low, high]}` and `{loguniform: [low, high]}` (drawn, `samples` times). With a `search` there is no list of
points: what a trial is depends on those before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from rayfed.config.load import assign, parse_override, read_settings, shown, validate_as
from rayfed.config.search import LIVE, SEARCHED, Asha, FlascSearch, Optuna, Population
from rayfed.config.types import Names, Section
from rayfed.errors import UserError

DRAWN = ("choice", "uniform", "loguniform")
SPACES = ("grid", *DRAWN)
FORMS = "{grid: [...]}, {choice: [...]}, {uniform: [low, high]} or {loguniform: [low, high]}"
SEED = "seed"


class Sweep(Section):
    """What varies between the trials of a sweep, and how they are compared."""

    parameters: dict = Field({}, description=f"Dotted setting -> its values: {FORMS}. All grids are crossed.")
    cases: dict | list | None = Field(
        None,
        description="Settings that change together: a list of mappings, or label -> mapping, from dotted settings to "
        "values (or spaces, crossed within the case). Every case is crossed with `parameters`.",
    )
    samples: PositiveInt = Field(
        1, description="Draws for choice, uniform and loguniform; every point of the grid gets the same ones."
    )
    metric: str = Field(
        "eval/accuracy", description="Key of metrics.jsonl that `tune` chooses by; measured on validation data."
    )
    mode: Literal["max", "min"] = Field("max", description="Whether more or less of the metric is better.")
    at: Literal["last", "best"] = Field(
        "last", description="The round whose figures count: the last measured one, or the one with the best metric."
    )
    report: str | None = Field(
        None, description="Key of metrics.jsonl shown beside the metric; null: its test twin where there is one."
    )
    tune: Names = Field(
        (),
        description="Swept settings of which the table shows only the best value per row, chosen by the mean metric "
        "over the seeds.",
    )
    tune_seeds: PositiveInt | None = Field(
        None,
        description="How many seeds choose the values of `tune`: the first ones of the grid of `seed`. The other seeds "
        "then run with the chosen values only; null: all seeds run everything.",
    )
    search: FlascSearch | Optuna | Population | None = Field(
        None,
        discriminator="kind",
        description="What decides by itself what runs: flasc looks for rank and density, in place of `parameters` and "
        "`cases`; optuna and pbt choose from their spaces. null: every point, or `samples` draws, of the spaces.",
    )
    stop: Asha | None = Field(None, description="Stops trials early; null: all run to their end.")
    concurrency: PositiveInt | None = Field(None, description="Trials at a time; null: as many as fit.")

    @model_validator(mode="after")
    def _spaces_are_whole(self) -> Sweep:
        if self.search is None:
            mistakes = [*self._in_parameters(), *self._in_cases(), *self._in_the_rest()]
        elif isinstance(self.search, FlascSearch):
            mistakes = [*self._beside(self.search), *self.search.mistakes()]
        else:
            spaces = [*self._in_parameters(), *self._in_cases()]
            mistakes = [*self._beside(self.search), *(spaces or self._searched(self.search)), *self.search.mistakes()]
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _in_parameters(self) -> Iterator[str]:
        for key, space in self.parameters.items():
            where = f"sweep.parameters.{key}"
            if not is_space(space):
                yield f"{where}: got {shown(space)}, but it should be {FORMS}"
            else:
                yield from _space_mistakes(where, space)

    def _in_cases(self) -> Iterator[str]:
        if self.cases is None:
            return
        if not self.cases:
            yield f"sweep.cases: got {shown(self.cases)}, but it needs at least one case"
        for label, case in self.labelled():
            where = f"sweep.cases.{label}"
            if not isinstance(case, dict) or not all(isinstance(key, str) for key in case):
                yield f"{where}: got {shown(case)}, but a case is a mapping from dotted settings to values"
                continue
            for key, value in case.items():
                if key in self.parameters:
                    yield f"{where}.{key}: got {shown(value)}, but sweep.parameters varies it already"
                if is_space(value):
                    yield from _space_mistakes(f"{where}.{key}", value)

    def _in_the_rest(self) -> Iterator[str]:
        spaces = list(self.spaces())
        if not spaces and self.cases is None:
            yield "sweep.parameters: got {}, but a sweep needs parameters or cases"
        kinds = {next(iter(space)) for _, space in spaces if is_space(space)}
        if self.samples > 1 and not kinds & set(DRAWN):
            yield f"sweep.samples: got {self.samples}, but nothing is drawn: all spaces are grids"
        varied = {key for key, _ in spaces} - {SEED}
        for key in self.tune:
            if key not in varied:
                allowed = f"the settings that vary are {', '.join(sorted(varied)) or 'none'}"
                yield f"sweep.tune: got {key!r}, but {allowed}"
        if self.tune_seeds is not None:
            seeds = self.parameters.get(SEED, {}).get("grid", [])
            if not self.tune:
                yield f"sweep.tune_seeds: got {self.tune_seeds}, but sweep.tune names nothing to choose"
            elif self.tune_seeds > len(seeds):
                yield f"sweep.tune_seeds: got {self.tune_seeds}, but sweep.parameters.seed.grid has {len(seeds)} values"

    def _beside(self, search: FlascSearch | Optuna | Population) -> Iterator[str]:
        for name in search.replaces:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                told = "a section" if name == "stop" else shown(value)
                yield f"sweep.{name}: got {told}, but sweep.search decides by itself what runs"
        if self.at == "best" and not isinstance(search, Optuna):
            one = "probe" if isinstance(search, FlascSearch) else "member"
            yield f"sweep.at: got 'best', but a {one}'s earlier rounds are those of the {one} it continues: last"

    def _searched(self, search: Optuna | Population) -> Iterator[str]:
        """What is wrong with spaces that are right by themselves, where ``search`` chooses from them."""
        optuna = isinstance(search, Optuna)
        for where, key, space in self._placed():
            if "grid" in space and not (optuna and where == f"sweep.parameters.{SEED}"):
                yield f"{where}: got {shown(space)}, but sweep.search={search.kind} takes choice, uniform or loguniform"
            elif "grid" not in space and key == SEED:
                yield f"{where}: got {shown(space)}, but a search compares at the same seeds{': a grid' * optuna}"
            elif not optuna and key not in LIVE:
                yield (
                    f"{where}: got {shown(space)}, but pbt changes settings within a run's life, which goes for "
                    f"{', '.join(LIVE)}"
                )
        if all(key == SEED for key, _ in self.spaces()) and len(self.labelled()) < 2:
            yield (
                f"sweep.parameters: got {shown(self.parameters)}, but sweep.search={search.kind} needs something to "
                "choose: choice, uniform or loguniform"
            )

    def labelled(self) -> list[tuple[str, Any]]:
        """(label, overrides) of every case; in a list a case's label is its number."""
        cases = self.cases or {}
        pairs = cases.items() if isinstance(cases, dict) else enumerate(cases, 1)
        return [(str(label), case) for label, case in pairs]

    def spaces(self) -> Iterator[tuple[str, Any]]:
        """(dotted setting, space) of everything that varies on its own, `parameters` first."""
        yield from ((key, space) for _, key, space in self._placed())

    def _placed(self) -> Iterator[tuple[str, str, Any]]:
        """(where it is written, dotted setting, space), in that order."""
        yield from ((f"sweep.parameters.{key}", key, space) for key, space in self.parameters.items())
        for label, case in self.labelled():
            if isinstance(case, dict):
                where = f"sweep.cases.{label}"
                yield from ((f"{where}.{key}", key, value) for key, value in case.items() if is_space(value))


class _File(Section):
    """Gives the section's mistakes their full names."""

    sweep: Sweep


def is_space(value: Any) -> bool:
    """Whether the value is a space, well formed inside or not: a mapping with one of their names as its only key."""
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in SPACES


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Sweep]:
    """(settings that all trials share, the section `sweep`) of a YAML file with `key=value` overrides applied.

    `sweep.parameters.KEY={...}` sets or, with null, removes a parameter. UserError, one line a mistake, where the
    section is wrong; the shared settings are validated trial by trial, see `rayfed.sweeps.plan`.
    """
    settings = read_settings(path)
    given = [(*parse_override(override), override) for override in overrides]
    for key, value, override in given:
        name = key.removeprefix("sweep.parameters.")
        parameters = _parameters(settings) if name != key else None
        if parameters is None:
            assign(settings, key, value, override)
        elif value is None:
            parameters.pop(name, None)
        else:
            parameters[name] = value
    if settings.get("sweep") is None:
        raise UserError(f"sweep: {path} has no section `sweep`; `rayfed run` takes it, or see configs/sweeps/")
    sweep = validate_as(_File, {"sweep": settings.pop("sweep")}).sweep
    for key, _, override in given:
        cases = [case for _, case in sweep.labelled()]
        if (
            key in sweep.parameters
            or (isinstance(sweep.search, FlascSearch) and key in SEARCHED)
            or (cases and all(key in case for case in cases))
        ):
            raise UserError(f"{key}: got {override!r}, but the sweep itself sets it, so that would do nothing")
    return settings, sweep


def _parameters(settings: dict[str, Any]) -> dict[str, Any] | None:
    """The mapping `sweep.parameters`, made where there is none; None where something else is in its place."""
    place: Any = settings
    for name in ("sweep", "parameters"):
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            return None
    return place


def _space_mistakes(where: str, space: Mapping[str, Any]) -> Iterator[str]:
    ((kind, values),) = space.items()
    if not isinstance(values, list) or not values:
        yield f"{where}.{kind}: got {shown(values)}, but it should be a list of values"
    elif kind == "grid":
        twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
        if twice is not None:
            yield f"{where}.grid: got {shown(twice)} twice"
    elif kind in ("uniform", "loguniform"):
        numbers = len(values) == 2 and all(type(value) in (int, float) for value in values)
        low = 0 if kind == "loguniform" else float("-inf")
        if not numbers or not low < values[0] < values[1] < float("inf"):
            positive = ", both above 0" if kind == "loguniform" else ""
            yield f"{where}.{kind}: got {shown(values)}, but it should be [low, high] with low < high{positive}"
