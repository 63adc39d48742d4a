"""The sections that say what is trained, sent and put together, and by what clients: lora, method, wire, profiles."""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from rayfed.config.types import (
    Densities,
    Density,
    Indices,
    Names,
    Ranks,
    Section,
    Share,
    ValueFormat,
    Weights,
    section,
)


class Lora(Section):
    """The adapters, in PEFT's words."""

    rank: PositiveInt = Field(16, description="Rank r of every adapter.")
    alpha: PositiveFloat = Field(16.0, description="A layer's change is alpha / r * B A (alpha / sqrt(r) with rslora).")
    rslora: bool = Field(False, description="Rank-stabilised scale alpha / sqrt(r).")
    dropout: Share = Field(0.0, description="Dropout on the adapter's input while training, keyed per client.")
    target_modules: str | Names | None = Field(
        None, description="PEFT's target_modules: names, a regular expression or `all-linear`; null: PEFT's choice."
    )
    layers_to_transform: Indices | None = Field(
        None, description="Only these layer indices, from 0, get adapters; null: all. Needs target_modules as a list."
    )
    train: Literal["all", "head"] = Field(
        "all", description="`all`: adapters and head train; `head`: only the head does (the frozen-base baseline)."
    )

    @model_validator(mode="after")
    def _layers_of_named_modules(self) -> Lora:
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"lora.layers_to_transform: got {list(self.layers_to_transform)}, but PEFT takes it only with "
                f"target_modules as a list of names, not the string {self.target_modules!r}"
            )
        return self


class Method(Section):
    """What is sent to clients, what trains, and how uploads become the next global state."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str = Field("flasc", description="One of `rayfed methods`. Further keys are the method's own options.")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Direction(Section):
    """How much travels in one direction, and how its values are written."""

    density: Density = Field(1.0, description="Share of the entries that travel, in (0, 1].")
    decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Density of round t is density * decay^(t // every), t from 0."
    )
    every: PositiveInt = Field(1, description="Rounds between two steps of the decay.")
    values: ValueFormat = Field("fp32", description="How values are written: fp32 (lossless), bf16, fp16 or int8.")

    def density_at(self, t: int, first: float | None = None) -> float:
        """The density of round ``t`` (0 is the first), in (0, 1]. ``first``: a client's own, in place of `density`."""
        return (self.density if first is None else first) * self.decay ** (t // self.every)


class Wire(Section):
    """Sparsity and number format, per direction."""

    down: Direction = section(Direction, "Server to client.")
    up: Direction = section(Direction, "Client to server.")


class Profiles(Section):
    """What each client's device and link allow: its rank, and how much of it travels. The same in every round.

    FLASC's system tiers are `tiers` with ranks [1, 4, 16, 64] at lora.rank 64, or with densities [1/64, 1/16, 1/4, 1].
    """

    kind: Literal["same", "list", "tiers", "uniform", "heavy_tailed", "normal", "function"] = Field(
        "same",
        description="`same`: lora.rank and the wire's densities for all; `list`: one entry a client; `tiers`: a few "
        "kinds of clients; `uniform`: any rank from low to high; `heavy_tailed`: of `ranks`, the large ones rare; "
        "`normal`: a rounded normal variable, cut to [low, high]; `function`: yours. Draws are keyed per client.",
    )
    ranks: Ranks | None = Field(
        None,
        description="Rank by client (`list`) or tier (`tiers`), or the ranks to draw from (`heavy_tailed`). None may "
        "exceed lora.rank, the server's; null: lora.rank for all, where densities are given.",
    )
    densities_down: Densities | None = Field(
        None,
        description="Aligned with ranks: share of the entries that travel to such a client, in place of "
        "wire.down.density; the wire's decay still applies. null: the wire's.",
    )
    densities_up: Densities | None = Field(None, description="The same for wire.up.density.")
    scale: Literal["own", "server"] = Field(
        "own",
        description="`own`: a client's change is lora.alpha over its own rank (its root, with rslora) times B A, as in "
        "PEFT; `server`: over lora.rank for all, so that one learning rate means the same step on every client.",
    )
    weights: Weights | None = Field(
        None,
        description="For `tiers`: their shares of the clients, to any sum; null: client id modulo tiers, no draw.",
    )
    exponent: Annotated[float, Field(ge=-10, le=10)] = Field(
        1.0,
        description="For `heavy_tailed`: the share of rank r falls as r^-exponent; below 0 the small ranks are rare.",
    )
    low: PositiveInt = Field(1, description="For `uniform` and `normal`: the smallest rank.")
    high: PositiveInt | None = Field(None, description="For `uniform` and `normal`: the largest rank; null: lora.rank.")
    mean: PositiveFloat | None = Field(
        None, description="For `normal`: mean before it is cut, within [low, high]; null: their middle."
    )
    std: PositiveFloat | None = Field(
        None, description="For `normal`: standard deviation before it is cut; null: a quarter of high - low."
    )
    function: str | None = Field(
        None,
        description="For `function`: `package.module:function`, called by name with client (its id), examples (rows it "
        "holds) and seed (the run's); returns a rank or (rank, density_down, density_up), the same at every call. "
        "The digest of the settings has its name, not its code.",
    )

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> Profiles:
        for field, kinds in PROFILE_FIELDS.items():
            value = getattr(self, field)
            if self.kind not in kinds and value != Profiles.model_fields[field].default:
                shown = list(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"profiles.{field}: got {reprlib.repr(shown)}, but that belongs to profiles.kind="
                    f"{' or '.join(kinds)}, and the kind is {self.kind}"
                )
        if self.kind in PROFILE_FIELDS["ranks"]:
            self._lists_are_aligned()
        if self.kind == "function":
            module, _, name = (self.function or "").partition(":")
            if not all(part.isidentifier() for part in (*module.split("."), name)):
                got = "null" if self.function is None else repr(self.function)
                raise ValueError(f"profiles.function: got {got}, but it is written package.module:function")
        return self

    def _lists_are_aligned(self) -> None:
        given = self.lists
        if "ranks" not in given and (self.kind == "heavy_tailed" or given.keys() <= {"weights"}):
            needs = "ranks" if self.kind == "heavy_tailed" else "ranks or densities"
            raise ValueError(f"profiles.ranks: got null, but profiles.kind={self.kind} needs {needs}")
        first, *others = given
        if not given[first]:
            raise ValueError(f"profiles.{first}: got [], but it needs at least one value")
        for name in others:
            if len(given[name]) != len(given[first]):
                raise ValueError(
                    f"profiles.{name}: got {len(given[name])} values, but profiles.{first} has {len(given[first])}, "
                    "and they go together one by one"
                )

    @property
    def lists(self) -> dict[str, tuple[float, ...]]:
        """The lists that are given, by name. They go together one by one: an entry a client (`list`) or tier."""
        return {name: own for name in ALIGNED if (own := getattr(self, name)) is not None}

    @property
    def entries(self) -> int:
        """How many entries these lists have; 0 where none is given."""
        return len(next(iter(self.lists.values()), ()))


ALIGNED = ("ranks", "densities_down", "densities_up", "weights")
PROFILE_FIELDS = {  # the kinds that each field of `profiles` belongs to
    "ranks": ("list", "tiers", "heavy_tailed"),
    "densities_down": ("list", "tiers", "heavy_tailed"),
    "densities_up": ("list", "tiers", "heavy_tailed"),
    "weights": ("tiers",),
    "exponent": ("heavy_tailed",),
    "low": ("uniform", "normal"),
    "high": ("uniform", "normal"),
    "mean": ("normal",),
    "std": ("normal",),
    "function": ("function",),
}
