"""Two parts of the section `sweep`: what looks for a setting by itself, and what ends hopeless trials early.

Here is what a user may write and how it is checked; what comes of it is in `rayfed.sweeps.walk` and
`rayfed.sweeps.asha`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rayfed.config.schema import Density, NonNegative, Section

Factor = Annotated[int, Field(ge=2)]
ROUNDED = 1 + 1e-9  # densities are products of floats
SEARCHED = ("lora.rank", "wire.down.density", "wire.up.density")  # the settings that a search sets


class Search(Section):
    """FLASC-Search: from a small rank and density, grow whichever of the two helps more.

    A probe trains one configuration for some rounds. All neighbours that a step compares send the same share of
    `factor` times what the kept configuration sends. Client work is counted in rounds: times server.cohort, in
    client-rounds.
    """

    kind: Literal["flasc"] = Field(..., description="`flasc`: FLASC-Search. The only kind.")
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

    def mistakes(self) -> Iterator[str]:
        """What is wrong by itself, whatever the other settings: one line each."""
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
