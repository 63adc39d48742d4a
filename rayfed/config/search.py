"""Two parts of the section `sweep`: what looks for settings by itself, and what ends hopeless trials early.

Here is what a user may write and how it is checked by itself; what comes of it is in `rayfed.sweeps`: `walk` (flasc),
`suggest` (optuna), `evolve` (pbt) and `asha`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rayfed.config.types import Density, NonNegative, Section

Factor = Annotated[int, Field(ge=2)]
ROUNDED = 1 + 1e-9  # densities are products of floats
SEARCHED = ("lora.rank", "wire.down.density", "wire.up.density")  # the settings that FLASC-FlascSearch sets
# What may change between two rounds of one run: no tensor that a checkpoint holds has another shape or meaning by it.
# Clients' optimizers are fresh in every round; moments of the server's outlast another rate, momentum or decay.
LIVE = (
    "client.lr", "client.momentum", "client.eps", "client.weight_decay", "client.clip_norm", "client.batch_size",
    "client.epochs", "client.steps", "server.lr", "server.momentum", "server.weight_decay", "wire.down.density",
    "wire.up.density", "lora.dropout",
)  # fmt: skip


class Decider(Section):
    """What all kinds of searches share."""

    replaces: ClassVar[tuple[str, ...]] = ("samples", "tune", "tune_seeds", "stop")
    """The settings beside it in the section `sweep` that it leaves no room for."""

    def mistakes(self) -> Iterator[str]:
        """What is wrong by itself, whatever the other settings: one line each."""
        yield from ()


class FlascSearch(Decider):
    """FLASC-FlascSearch: from a small rank and density, grow whichever of the two helps more.

    A probe trains one configuration for some rounds. All neighbours that a step compares send the same share of
    `factor` times what the kept configuration sends. Client work is counted in rounds: times server.cohort, in
    client-rounds.
    """

    kind: Literal["flasc"] = Field(..., description="`flasc`: FLASC-FlascSearch.")
    rank: PositiveInt = Field(1, description="lora.rank of the first probe.")
    density: Density = Field(1 / 64, description="wire.down.density and wire.up.density of the first probe.")
    factor: Factor = Field(4, description="By how much a step raises the communication, as rank or as density.")
    max_rank: PositiveInt = Field(64, description="No probe has a larger rank.")
    max_density: Density = Field(1.0, description="No probe has a larger density.")
    rounds: PositiveInt = Field(
        ..., description="Rounds of a probe; it continues from the kept probe's checkpoint, at a constant rate."
    )
    budget: PositiveInt | None = Field(
        None,
        description="Most rounds of all probes and the final run together; a step that does not fit whole is not "
        "begun. null: until no neighbour gains, or there is none.",
    )
    directions: Literal["both", "separate"] = Field(
        "both",
        description="`both`: download and upload have one density; `separate`: a step also tries to give all of the "
        "growth to the downloads, or to the uploads.",
    )
    stay: bool = Field(
        False,
        description="Also probe the kept configuration itself in each step, so that a gain is the configuration's and "
        "not the further rounds'; one probe more a step.",
    )
    gain: NonNegative = Field(
        0.0, description="The search ends where the metric gains no more than this over the kept configuration."
    )
    final: bool = Field(
        True, description="Then run what was kept from the start, for server.rounds, with the file's own schedules."
    )

    replaces: ClassVar[tuple[str, ...]] = ("parameters", "cases", *Decider.replaces)

    def mistakes(self) -> Iterator[str]:
        if self.rank > self.max_rank:
            yield f"sweep.search.rank: got {self.rank}, but no rank may exceed sweep.search.max_rank={self.max_rank}"
        elif self.density > self.max_density:
            yield (
                f"sweep.search.density: got {self.density}, but no density may exceed "
                f"sweep.search.max_density={self.max_density}"
            )
        elif self.rank * self.factor > self.max_rank and self.density * self.factor > self.max_density * ROUNDED:
            yield (
                f"sweep.search.factor: got {self.factor}, but then the first probe has no neighbour: rank "
                f"{self.rank * self.factor} is above max_rank={self.max_rank} and density "
                f"{self.density * self.factor:g} above max_density={self.max_density:g}"
            )


class Optuna(Decider):
    """Optuna: every point of `parameters` and `cases` is suggested by what the points before it came to.

    It needs the extra `optuna`. Of grids it takes that of `seed` alone: a point then runs at each of these seeds, and
    its figures are means over them.
    """

    kind: Literal["optuna"] = Field(
        ..., description="`optuna`: points from choice, uniform, loguniform and cases; the extra `optuna`."
    )
    trials: PositiveInt = Field(
        ..., description="Points asked for. One that was asked for before counts, but does not run again."
    )
    batch: PositiveInt = Field(
        4, description="Points asked for at a time: they run side by side, and the next ones know what came of them."
    )
    sampler: Literal["tpe", "nsga2", "random"] = Field(
        "tpe",
        description="`tpe`: tree-structured Parzen estimator, of all settings together; `nsga2`: genetic, a generation "
        "is a batch; `random`: learns nothing.",
    )
    startup: PositiveInt = Field(10, description="For `tpe`: points drawn at random before the first that is learnt.")
    against: Literal["bytes/total", "bytes/down", "bytes/up", "params/down", "params/up"] | None = Field(
        None,
        description="A second aim: less of it, over all rounds, is better. The table then marks the Pareto front. "
        "null: the metric alone.",
    )

    def mistakes(self) -> Iterator[str]:
        default = type(self).model_fields["startup"].default
        if self.sampler != "tpe" and self.startup != default:
            yield f"sweep.search.startup: got {self.startup}, but that belongs to sampler=tpe, not {self.sampler}"
        if self.sampler == "nsga2" and self.batch < 2:
            yield f"sweep.search.batch: got {self.batch}, but a batch is a generation of nsga2, and needs 2 or more"


class Population(Decider):
    """Population Based Training (Jaderberg et al., arXiv 1711.09846), all members in step.

    After every generation the worst members go on from the checkpoint of one of the best, with its settings perturbed;
    the others go on as they were. All members have the file's seed, and rates that are constant within a generation.
    """

    kind: Literal["pbt"] = Field(..., description="`pbt`: Population Based Training.")
    population: Annotated[int, Field(ge=2)] = Field(8, description="Members; the first ones' settings are drawn.")
    rounds: PositiveInt = Field(
        ..., description="Rounds of a generation. A member's whole life is server.rounds, a multiple of it."
    )
    quantile: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.25, description="Share of the members that copies, and that is copied from, rounded up; 0: none."
    )
    factors: Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False)] = Field(
        (0.8, 1.2),
        description="A copied number is multiplied by one of these, within its limits; a choice moves to a neighbour.",
    )
    resample: Annotated[float, Field(ge=0, le=1)] = Field(
        0.25, description="How often a copied setting is drawn anew instead."
    )
    replaces: ClassVar[tuple[str, ...]] = ("cases", *Decider.replaces)


class Asha(Section):
    """Asynchronous successive halving: at rounds grace, grace * factor, ... only the best 1 / factor go on."""

    kind: Literal["asha"] = Field(..., description="`asha`: asynchronous successive halving. The only kind.")
    grace: PositiveInt = Field(..., description="Rounds before a trial may be stopped.")
    factor: Factor = Field(3, description="A trial goes on where it is among the best 1 / factor that came so far.")

    def rungs(self, rounds: int) -> list[int]:
        """The rounds after which trials of so many rounds are compared: all before the last one."""
        rungs = []
        at = self.grace
        while at < rounds:
            rungs.append(at)
            at *= self.factor
        return rungs
