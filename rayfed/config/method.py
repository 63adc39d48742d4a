"""The sections that say what trains, what is sent, and what single clients can do: lora, method, wire, profiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from rayfed.config.describe import format_value, mistake
from rayfed.config.types import UNSIGNED, Density, Live, Names, Positive, Rank, Rounds, Searched, Section, Text, section

Indices = Annotated[tuple[Annotated[int, Field(ge=0, le=10_000)], ...], Field(strict=False, max_length=1000)]
# For larger populations, `profiles.function` takes the place of a list.
Ranks = Annotated[tuple[Rank, ...], Field(strict=False, max_length=10_000)]
Densities = Annotated[tuple[Density, ...], Field(strict=False, max_length=10_000)]
Weights = Annotated[tuple[Positive, ...], Field(strict=False, max_length=10_000)]
ALIGNED = ("ranks", "densities_down", "densities_up", "weights")
LEAST_DENSITY = 2.0**-31  # one entry of the longest message that can be sent
PROFILE_FIELDS = {  # field of `profiles` -> the kinds that use the field
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


class Lora(Section):
    """The adapters, with the settings of PEFT."""

    decides = ("model",)

    rank: Searched[Rank] = 16
    """Rank r of every adapter, and the largest rank of a client."""
    alpha: Positive = 16.0
    """A layer changes by alpha / r * B A, or alpha / sqrt(r) with rslora."""
    rslora: bool = False
    """Use the rank-stabilised scale alpha / sqrt(r)."""
    dropout: Live[Annotated[float, Field(ge=0, le=0.999), UNSIGNED]] = 0.0
    """Dropout probability on the input of the adapters in training."""
    target_modules: Text | Names | None = None
    """PEFT's target_modules: names, a regular expression or `all-linear`; null: PEFT's choice."""
    layers_to_transform: Indices | None = None
    """Indices, from 0, of the layers with adapters; null: all. Needs target_modules as a list."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the operands in products with adapters, which are float32 themselves; auto: model.dtype. With
    bfloat16, operands and results are rounded, as torch's autocast does; it needs model.dtype=bfloat16.
    """
    train: Literal["all", "head"] = "all"
    """`all`: adapters and head train; `head`: only the head trains, on the frozen base model."""

    @model_validator(mode="before")
    @classmethod
    def _plain_lora(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and settings.get("use_dora"):
            what = "DoRA's magnitudes are no low-rank change, so no method here can average them; use LoRA or rslora"
            raise ValueError(f"lora.use_dora: got {format_value(settings['use_dora'])}, but {what}")
        return settings

    def mistakes(self) -> Iterator[str]:
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            names = f"PEFT takes it only with target_modules as a list of names, not the string {self.target_modules!r}"
            yield mistake("lora.layers_to_transform", self.layers_to_transform, names)


class Method(Section):
    """The federated method: what is sent to clients, what trains, how uploads become the next global state."""

    model_config = ConfigDict(extra="allow")
    name: Text = "flasc"
    """One of `rayfed methods`. All other keys are options of the method."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Direction(Section):
    """Density and number format of the messages in one direction."""

    density: Live[Searched[Density]] = 1.0
    """Share of the entries that are sent; at least one entry is."""
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the density every `every` rounds: round t, from 0, has density * decay^(t // every)."""
    every: Rounds = 1
    """Rounds between two steps of the decay."""
    values: Literal["fp32", "bf16", "fp16", "int8", "qsgd2", "qsgd3", "qsgd4", "qsgd5", "qsgd6", "qsgd7", "qsgd8"] = (
        "fp32"
    )
    """Number format of the values in a message; only fp32 is lossless. qsgd2 to qsgd8 round at random and without bias
    to 2 to 8 bits a value.
    """

    def density_at(self, t: int, first: float | None = None) -> float:
        """The density in round ``t`` (from 0), in (0, 1]. ``first``: a client's own density, in place of `density`.

        A decayed density does not fall below 2^-31, or to the 0 to which floats would round it.
        """
        first = self.density if first is None else first
        return max(first * self.decay ** (t // self.every), min(first, LEAST_DENSITY))


class Down(Direction):
    """Density and number format of the messages from server to client."""

    head: Literal["sparse", "dense"] = "sparse"
    """`sparse`: the density is that of adapter and head together; `dense`: the head is always sent whole, and the
    density is that of the adapter alone, as FLASC's code does it for density tiers.
    """


class Wire(Section):
    """Sparsity and number format of messages, per direction."""

    down: Down = section(Down)  # server to client
    up: Direction = section(Direction)  # client to server

    def depends_on_rounds(self, before: int, after: int) -> str | None:
        """A download density that decays from 1: metrics of the masked model are there if it gets below 1 in time."""
        sparse = [self.down.density_at(rounds - 1, 1.0) < 1 for rounds in (before, after)]
        return None if sparse[0] == sparse[1] else "down.decay"


class Profiles(Section):
    """The rank and the densities of each client, as its device and link allow. The same in every round.

    FLASC's system tiers: `kind: tiers` with ranks [1, 4, 16, 64] at lora.rank 64, or densities [1/64, 1/16, 1/4, 1].
    """

    kind: Literal["same", "list", "tiers", "uniform", "heavy_tailed", "normal", "function"] = "same"
    """`same`: lora.rank and the densities of `wire` for all; `list`: one entry per client; `tiers`: one entry per group
    of clients; `uniform`: a random rank from low to high; `heavy_tailed`: a random rank of `ranks`, large ones less
    often; `normal`: a rounded normal variable, limited to [low, high]; `function`: your function.
    """
    ranks: Ranks | None = None
    """Ranks of the clients (`list`), of the tiers (`tiers`), or to draw from (`heavy_tailed`); each at most lora.rank.
    null: lora.rank for all.
    """
    densities_down: Densities | None = None
    """Download densities, in the order of `ranks`: each replaces wire.down.density, and decays as `wire.down` says.
    null: wire.down.density for all.
    """
    densities_up: Densities | None = None
    """Upload densities: the same for wire.up.density."""
    scale: Literal["own", "server"] = "own"
    """A client's change is scale * B A. `own`: scale = alpha / (rank of the client), as in PEFT; `server`: scale =
    alpha / lora.rank for all clients, so that a learning rate means the same on each. With rslora: / sqrt(rank).
    """
    weights: Weights | None = None
    """For `tiers`: shares of the clients, to any sum. null: tier = client id modulo tiers."""
    exponent: Annotated[float, Field(ge=-10, le=10), UNSIGNED] = 1.0
    """For `heavy_tailed`: rank r has a share proportional to r^-exponent; below 0, large ranks lead."""
    low: Rank = 1
    """For `uniform` and `normal`: the smallest rank."""
    high: Rank | None = None
    """For `uniform` and `normal`: the largest rank; null: lora.rank."""
    mean: Positive | None = None
    """For `normal`: mean before the limits, within [low, high]; null: (low + high) / 2."""
    std: Positive | None = None
    """For `normal`: standard deviation before the limits; null: (high - low) / 4."""
    function: Text | None = None
    """For `function`: `package.module:function`, called with the keywords client (id), examples (rows of the client)
    and seed (of the run). It returns a rank or (rank, density_down, density_up), always the same. The digest of the
    settings contains the name of the function, but not its code.
    """

    def mistakes(self) -> Iterator[str]:
        for field, kinds in PROFILE_FIELDS.items():
            value = getattr(self, field)
            if self.kind not in kinds and value != Profiles.model_fields[field].default:
                belongs = f"that belongs to profiles.kind={' or '.join(kinds)}, and the kind is {self.kind}"
                yield mistake(f"profiles.{field}", value, belongs)
        if self.kind in PROFILE_FIELDS["ranks"]:
            yield from self._list_mistakes()
        if self.kind == "function":
            module, _, name = (self.function or "").partition(":")
            if not all(part.isidentifier() for part in (*module.split("."), name)):
                yield mistake("profiles.function", self.function, "it is written package.module:function")

    def _list_mistakes(self) -> Iterator[str]:
        given = self.lists
        if "ranks" not in given and (self.kind == "heavy_tailed" or given.keys() <= {"weights"}):
            needs = "ranks" if self.kind == "heavy_tailed" else "ranks or densities"
            yield mistake("profiles.ranks", None, f"profiles.kind={self.kind} needs {needs}")
            return
        first, *others = given
        if not given[first]:
            yield mistake(f"profiles.{first}", [], "it needs at least one value")
        for name in others:
            if len(given[name]) != len(given[first]):
                has = f"profiles.{first} has {len(given[first])}, and the lists must be of one length"
                yield f"profiles.{name}: got {len(given[name])} values, but {has}"

    @property
    def lists(self) -> dict[str, tuple[float, ...]]:
        """The lists that are given, by name, all of one length: one entry per client (`list`), tier or rank."""
        return {name: own for name in ALIGNED if (own := getattr(self, name)) is not None}

    @property
    def entries(self) -> int:
        """Entries of each of these lists; 0 where no list is given."""
        return len(next(iter(self.lists.values()), ()))
