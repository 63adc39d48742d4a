"""The global state of a method: dataclasses of tensors, which know how to store themselves.

A field is stored by its kind. A tensor is stored under the field's name. A mapping of tensors is stored under the
prefix that `tensors_by_name` gives the field. Every other field is stored as JSON, except for ``clients``, which the
server stores in files of its own. The names of the tensors are part of the state's digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, cast

from torch import Tensor

from rayfed.lora.adapter import Layout, LowRank
from rayfed.methods._means import Advance

Change = LowRank | Tensor
"""A layer's change: a pair, or a matrix (out, in)."""


def tensors_by_name(prefix: str) -> Any:
    """A field that maps names to tensors, stored as ``prefix`` + name. A pair is stored as ``A.`` and ``B.`` + name."""
    return field(default_factory=dict, metadata={"prefix": prefix})


@dataclass(frozen=True, kw_only=True)
class State:
    """What every method's state has. A subclass adds tensors; the module's docstring says how they are stored."""

    rounds: int = 0
    """The rounds that led to this state."""
    clients: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    """What single clients keep between rounds, by client id."""
    report: Mapping[str, float] = field(default_factory=dict)
    """Figures about the last aggregation. They become the metrics `method/...`."""

    def next(self, **changes: Any) -> Self:
        """The state after one more round, with these fields changed. Its report is empty unless it is among them."""
        return replace(self, **{"rounds": self.rounds + 1, "report": {}, **changes})

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by its stored name."""
        named: dict[str, Tensor] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                named[f.name] = value
            for name, item in value.items() if "prefix" in f.metadata else ():
                if isinstance(item, LowRank):
                    named |= {f"A.{name}": item.A, f"B.{name}": item.B}
                    named |= {} if item.R is None else {f"extra.R.{name}": item.R}
                else:
                    named[f.metadata["prefix"] + name] = item
        return named

    def facts(self) -> dict[str, Any]:
        """The rest of the state as JSON. ``layers`` gives every layer's name, with its scale if it is a pair."""
        facts: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "layers":
                facts[f.name] = {name: getattr(item, "scale", None) for name, item in value.items()}
            elif isinstance(value, Layout):
                facts[f.name] = value.to_json()
            elif f.name != "clients" and "prefix" not in f.metadata and not isinstance(value, Tensor):
                facts[f.name] = dict(value) if isinstance(value, Mapping) else value
        return facts

    @classmethod
    def restore(
        cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], clients: Mapping[int, Mapping[str, Tensor]]
    ) -> Self:
        """The state that gave these `tensors()`, `facts()` and `clients`."""
        left, values = dict(tensors), {"clients": clients, **facts}
        for f in fields(cls):
            if f.name in left:
                values[f.name] = left.pop(f.name)
            elif f.name == "layout":
                values[f.name] = Layout.from_json(facts[f.name])
            elif f.name == "layers":
                values[f.name] = {name: _change(left, name, scale) for name, scale in facts[f.name].items()}
            elif "prefix" in f.metadata:
                prefix = f.metadata["prefix"]
                names = [name for name in left if name.startswith(prefix)]
                values[f.name] = {name.removeprefix(prefix): left.pop(name) for name in names}
        return cls(**values)


def _change(left: dict[str, Tensor], name: str, scale: float | None) -> Change:
    """Takes one layer's change out of the stored tensors."""
    if scale is None:
        return left.pop(f"W.{name}")
    return LowRank(left.pop(f"B.{name}"), left.pop(f"A.{name}"), scale, left.pop(f"extra.R.{name}", None))


@dataclass(frozen=True)
class FactorState(State):
    """The state of methods that average factors: the global adapter as one flat vector (n,), with its layout."""

    vector: Tensor
    layout: Layout
    extras: Mapping[str, Tensor] = tensors_by_name("")
    """Further vectors (n,), under names of the method's own."""


@dataclass(frozen=True)
class LayerState(State):
    """The state of methods that work layer by layer. A mapping by layer has one entry per layer, or is empty."""

    layers: Mapping[str, Change] = tensors_by_name("W.")
    head: Mapping[str, Tensor] = tensors_by_name("head.")
    base: Mapping[str, Tensor] = tensors_by_name("base.")
    """The change of the base by layer, a float32 matrix (out, in)."""
    extras: Mapping[str, Tensor] = tensors_by_name("extra.")
    """Further tensors, under names of the method's own."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON values, with strings as keys."""

    @property
    def pairs(self) -> dict[str, LowRank]:
        """The layers, of a method that stores all of them as pairs."""
        return cast(dict[str, LowRank], self.layers)

    @property
    def matrices(self) -> dict[str, Tensor]:
        """The layers, of a method that stores all of them as matrices (out, in)."""
        return cast(dict[str, Tensor], self.layers)

    def next_with_head(self, advance: Advance, head_change: Mapping[str, Tensor], **changes: Any) -> Self:
        """`next`, with one server-optimizer step on every head tensor, each under the name ``head.<parameter>``."""
        head = {name: advance(f"head.{name}", value, head_change[name]) for name, value in self.head.items()}
        return self.next(head=head, **changes)
