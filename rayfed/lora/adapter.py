"""The adapter: what federated LoRA trains, sends and averages.

Each adapted layer has a low-rank pair (B, A) and a scale. The layer's change is ``scale * B @ A``. An adapter also has
the task head, which is trained in full. The flat vector of an adapter has a fixed order: layers by name, A before B
before R, then the head by name. The order of the mappings does not matter, so masks, payloads and server optimizers in
all processes agree on what entry i is.

Shapes: B (out, r), A (r, in), where out and in are those of the layer, also for Conv1D, which stores its weight
transposed. Some methods train a core R (r, r) between two frozen factors: the change is ``scale * B @ R @ A``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rayfed.seeding import torch_rng

PARTS = ("A", "B", "R", "head", "W")


@dataclass(frozen=True)
class LowRank:
    """One layer's change, ``scale * B @ A``: B (out, r), A (r, in); with a core R (r, r), ``scale * B @ R @ A``."""

    B: Tensor
    A: Tensor
    scale: float
    R: Tensor | None = None

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"B is (out, r) and A is (r, in), got {tuple(self.B.shape)} and {tuple(self.A.shape)}")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """The change as a matrix (out, in)."""
        pair = self.folded()
        return self.scale * (pair.B @ pair.A)

    def folded(self) -> LowRank:
        """The same change without a core: B (out, r) is multiplied by R."""
        return self if self.R is None else LowRank(self.B @ self.R, self.A, self.scale)


@dataclass(frozen=True)
class Adapter:
    """Low-rank pairs by layer name, and the head's weights (out, in) and biases (out,) by parameter name."""

    layers: Mapping[str, LowRank]
    head: Mapping[str, Tensor]

    @cached_property
    def layout(self) -> Layout:
        scales = {name: self.layers[name].scale for name in sorted(self.layers)}
        return Layout.of([(name, part, tensor.shape) for name, part, tensor in self.tensors()], scales)

    def flatten(self) -> Tensor:
        """A copy of all entries as one float32 vector (n,), in the order of `layout`."""
        return _flat(tensor for _, _, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name, part, tensor) of every tensor, in the order of the flat vector."""
        for name, pair in sorted(self.layers.items()):
            yield name, "A", pair.A
            yield name, "B", pair.B
            if pair.R is not None:
                yield name, "R", pair.R
        for name, tensor in sorted(self.head.items()):
            yield name, "head", tensor


@dataclass(frozen=True)
class Entry:
    """The place of one tensor in the flat vector: entries start to start + numel, in row-major order."""

    name: str
    part: str  # one of PARTS; "W" is a base change as a matrix (out, in)
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The order and shapes of the tensors in an adapter's flat vector, and the scale of each layer."""

    entries: tuple[Entry, ...]
    scales: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, str, Sequence[int]]], scales: Mapping[str, float]) -> Layout:
        """The layout of tensors that follow each other, given as (name, part, shape)."""
        entries, start = [], 0
        for name, part, shape in tensors:
            entries.append(Entry(name, part, tuple(shape), start))
            start += entries[-1].numel
        return cls(tuple(entries), dict(scales))

    @property
    def size(self) -> int:
        """n, the length of the flat vector."""
        return self.entries[-1].start + self.entries[-1].numel if self.entries else 0

    def unflatten(self, vector: Tensor) -> Adapter:
        """The adapter whose tensors are views into ``vector`` (n,). ValueError for any other length."""
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of {self.size} entries, got shape {tuple(vector.shape)}")
        tensors = {(e.name, e.part): vector[e.start : e.start + e.numel].view(e.shape) for e in self.entries}
        return Adapter(
            {
                name: LowRank(tensors[name, "B"], tensors[name, "A"], scale, tensors.get((name, "R")))
                for name, scale in self.scales.items()
            },
            {name: tensor for (name, part), tensor in tensors.items() if part == "head"},
        )

    def matrices(self, vector: Tensor) -> dict[str, Tensor]:
        """The base changes in ``vector`` (n,) that are matrices (out, in), by layer, as views."""
        return {e.name: vector[e.start : e.start + e.numel].view(e.shape) for e in self.entries if e.part == "W"}

    def mask(self, *parts: str) -> Tensor:
        """A boolean vector (n,): True for entries of the given parts (of PARTS)."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        for entry in self.entries:
            if entry.part in parts:
                mask[entry.start : entry.start + entry.numel] = True
        return mask

    def to_json(self) -> dict[str, Any]:
        """The layout as plain values that JSON can store. `from_json` is the inverse."""
        return {"entries": [[e.name, e.part, list(e.shape)] for e in self.entries], "scales": dict(self.scales)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Layout:
        return cls.of(value["entries"], value["scales"])


def flatten_changes(
    changes: Mapping[str, LowRank | Tensor], head: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Layout]:
    """Pairs, head and matrices (out, in), in this order, as one float32 vector (n,), with its layout.

    ``layout.unflatten`` returns the pairs and the head, ``layout.matrices`` the matrices.
    """
    pairs = {name: change for name, change in changes.items() if isinstance(change, LowRank)}
    adapter = Adapter(pairs, head or {})
    matrices = [(name, "W", change) for name, change in sorted(changes.items()) if isinstance(change, Tensor)]
    tensors = [*adapter.tensors(), *matrices]
    layout = Layout.of([(name, part, tensor.shape) for name, part, tensor in tensors], adapter.layout.scales)
    return _flat(tensor for _, _, tensor in tensors), layout


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0), *(tensor.reshape(-1).to(torch.float32) for tensor in tensors)])


def scale_of(rank: int, alpha: float, rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023), as PEFT defines them."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def fresh_adapter(
    shapes: Mapping[str, tuple[int, int]], head: Mapping[str, Tensor], rank: int, scale: float, seed: int
) -> Adapter:
    """An adapter as PEFT initialises it: B = 0, A uniform in +-1/sqrt(in). The draw is keyed by seed and layer name.

    ``shapes`` has (out, in) of each layer. The values of ``head`` are copied.
    """
    layers = {}
    for name, (out, inner) in shapes.items():
        bound = 1 / math.sqrt(inner)
        A = torch.empty(rank, inner).uniform_(-bound, bound, generator=torch_rng(seed, "lora.A", name))
        layers[name] = LowRank(torch.zeros(out, rank), A, scale)
    return Adapter(layers, {name: tensor.detach().clone() for name, tensor in head.items()})
