"""Two parts of the section `sweep`: `search`, which chooses settings by results, and `stop`, which ends trials early.

The classes here hold and check what a user may write. The algorithms are in `rayfed.sweeps`: `flasc_search`,
`optuna_search`, `pbt` and `search`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rayfed.config.describe import mistake
from rayfed.config.types import UNSIGNED, Density, Fraction, NonNegative, Positive, Rank, Rounds, Section, Trials

Factor = Annotated[int, Field(ge=2, le=1000)]
ROUNDED = 1 + 1e-9  # densities are products of floats


class SearchSettings(Section):
    """The base class of the settings of a search."""

    replaces: ClassVar[tuple[str, ...]] = ("samples", "tune", "tune_seeds", "stop")
    """The other settings of the section `sweep` that are refused beside the search."""


class FlascSearchSettings(SearchSettings):
    """FLASC-Search: starts at a small rank and density, and raises the one that improves the metric more.

    A probe trains one configuration for some rounds. All configurations that one step compares send equally many
    entries: `factor` times the entries of the best configuration so far.
    """

    kind: Literal["flasc"]
    """`flasc`: FLASC-Search."""
    rank: Rank = 1
    """lora.rank of the first probe."""
    density: Density = 1 / 64
    """wire.down.density and wire.up.density of the first probe."""
    factor: Factor = 4
    """Factor of one step on the rank, or on the density."""
    max_rank: Rank = 64
    """Largest rank of a probe."""
    max_density: Density = 1.0
    """Largest density of a probe."""
    rounds: Rounds
    """Rounds of a probe. A probe continues from the checkpoint of the best probe so far, at constant learning rates."""
    budget: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Most rounds of all probes and the final run together; a step that would exceed them does not start. null: no
    limit; the search ends when no configuration is better, or none is left.
    """
    directions: Literal["both", "separate"] = "both"
    """`both`: one density for download and upload; `separate`: a step also tries to raise only the download density,
    and only the upload density.
    """
    stay: bool = False
    """In each step, also train the best configuration so far for the same rounds, and compare with it. It takes one
    more probe per step.
    """
    gain: NonNegative = 0.0
    """The search ends when the metric of the best configuration improves by no more than this."""
    final: bool = True
    """After the search, run the best configuration from the start: for server.rounds, with the file's schedules."""

    replaces: ClassVar[tuple[str, ...]] = ("parameters", "cases", *SearchSettings.replaces)

    def mistakes(self) -> Iterator[str]:
        for limited in ("rank", "density"):
            got, most = getattr(self, limited), getattr(self, f"max_{limited}")
            if got > most:
                yield mistake(
                    f"sweep.search.{limited}", got, f"no {limited} may exceed sweep.search.max_{limited}={most}"
                )
                return
        rank, density = self.rank * self.factor, self.density * self.factor
        if rank > self.max_rank and density > self.max_density * ROUNDED:
            above = f"rank {rank} is above max_rank={self.max_rank}"
            above += f" and density {density:g} above max_density={self.max_density:g}"
            yield mistake("sweep.search.factor", self.factor, f"then the first probe has no neighbour: {above}")


class OptunaSettings(SearchSettings):
    """Optuna suggests every point of `parameters` and `cases` from the results of earlier points.

    It needs the extra `optuna`. Only `seed` may have a grid: a point then runs at each of these seeds, and its metric
    is the mean over the seeds.
    """

    kind: Literal["optuna"]
    """`optuna`: points from choice, uniform, loguniform and cases. Needs the extra `optuna`."""
    trials: Trials
    """Points to ask Optuna for. A repeated point counts, but does not run again."""
    batch: Annotated[int, Field(ge=1, le=1000)] = 4
    """Points that are open at a time. They run side by side; later points depend on their results."""
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    """`tpe`: tree-structured Parzen estimator over all settings together; `nsga2`: genetic algorithm with generations
    of `batch` points; `random`: random points.
    """
    startup: Trials = 10
    """For `tpe`: random points before the first suggested point."""
    against: Literal["bytes/total", "bytes/down", "bytes/up", "params/down", "params/up"] | None = None
    """A second objective, summed over all rounds: less is better. The table then marks the Pareto front. null: the
    metric alone.
    """

    def mistakes(self) -> Iterator[str]:
        default = type(self).model_fields["startup"].default
        if self.sampler != "tpe" and self.startup != default:
            yield mistake("sweep.search.startup", self.startup, f"that belongs to sampler=tpe, not {self.sampler}")
        if self.sampler == "nsga2" and self.batch < 2:
            yield mistake("sweep.search.batch", self.batch, "a batch is a generation of nsga2, and needs 2 or more")


class PbtSettings(SearchSettings):
    """Population Based Training (Jaderberg et al., arXiv 1711.09846). All members train the same rounds at a time.

    After every generation, each of the worst members continues from the checkpoint of one of the best members, with
    changed settings. The other members continue unchanged. All members have the same seed, and constant learning rates.
    """

    kind: Literal["pbt"]
    """`pbt`: Population Based Training."""
    population: Annotated[int, Field(ge=2, le=1000)] = 8
    """Members. Their first settings are random draws."""
    rounds: Rounds
    """Rounds of a generation. server.rounds, the total, is a multiple of them; eval.every divides them."""
    quantile: Annotated[float, Field(ge=0, le=0.5), UNSIGNED] = 0.25
    """Share of the members that copy, and of the members to copy from, rounded up; 0: none. A member that failed is
    left out.
    """
    factors: Annotated[tuple[Positive, Positive], Field(strict=False)] = (0.8, 1.2)
    """A copied number is multiplied by one of the two, within its limits. A copied choice moves to the next or the
    previous value of its list.
    """
    resample: Fraction = 0.25
    """Probability that a copied setting is a new random draw instead."""
    replaces: ClassVar[tuple[str, ...]] = ("cases", *SearchSettings.replaces)


class AshaSettings(Section):
    """Asynchronous successive halving: at rounds grace, grace * factor, ... only the best 1 / factor continue."""

    kind: Literal["asha"]
    """`asha`: asynchronous successive halving. The only kind."""
    grace: Rounds
    """Rounds before a trial may stop."""
    factor: Factor = 3
    """A trial continues if it is among the best 1 / factor so far."""
    brackets: Annotated[int, Field(ge=1, le=20)] = 1
    """Brackets of asynchronous Hyperband: the trials of bracket s have their first comparison after
    grace * factor^s rounds. 1: successive halving alone.
    """
