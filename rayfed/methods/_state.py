"""The state of methods that think layer by layer, and the sums they aggregate with.

`Global` holds the global model as products (a low-rank pair or a matrix per layer), the head, and what a method keeps
beside them. `ProductMean` adds up adapters of any ranks one at a time: exact sums of products, never means of factors,
factored as long as that is the smaller form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import stack
from rayfed.methods.base import Advance, Defaults, Start, Update

Change = LowRank | Tensor
"""A layer's change: a pair, or a matrix (out, in)."""


@dataclass(frozen=True)
class Global:
    """A method's global state. Every mapping by layer has one entry per adapted layer, or is empty."""

    layers: Mapping[str, Change] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    rounds: int = 0
    base: Mapping[str, Tensor] = field(default_factory=dict)  # fp32 master change of the base, (out, in)
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # further tensors, under names of the method's own
    clients: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    report: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)  # further JSON values: strings as keys

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for name, change in self.layers.items():
            if isinstance(change, LowRank):
                named |= {f"A.{name}": change.A, f"B.{name}": change.B}
            else:
                named[f"W.{name}"] = change
        named |= {f"base.{name}": tensor for name, tensor in self.base.items()}
        named |= {f"head.{name}": tensor for name, tensor in self.head.items()}
        return named | {f"extra.{name}": tensor for name, tensor in self.extras.items()}

    def facts(self) -> dict[str, Any]:
        scales = {name: pair.scale for name, pair in self.layers.items() if isinstance(pair, LowRank)}
        return {
            "rounds": self.rounds,
            "layers": list(self.layers),
            "scales": scales,
            "report": dict(self.report),
            "notes": dict(self.notes),
        }

    @classmethod
    def restore(
        cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], clients: Mapping[int, Mapping[str, Tensor]]
    ) -> Global:
        """The state that gave these tensors and facts."""
        by_kind: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("A", "B", "W", "base", "head", "extra")}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            by_kind[kind][name] = tensor
        layers: dict[str, Change] = {}
        for name in facts["layers"]:
            if name in by_kind["W"]:
                layers[name] = by_kind["W"][name]
            else:
                layers[name] = LowRank(by_kind["B"][name], by_kind["A"][name], facts["scales"][name])
        return cls(
            layers,
            by_kind["head"],
            int(facts["rounds"]),
            by_kind["base"],
            by_kind["extra"],
            clients,
            facts["report"],
            facts["notes"],
        )


class Layered(Defaults):
    """What methods with a `Global` state answer alike."""

    def restore(
        self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], clients: Mapping[int, Mapping[str, Tensor]]
    ) -> Global:
        return Global.restore(tensors, facts, clients)

    def head(self, state: Global) -> Mapping[str, Tensor]:
        return state.head

    def layers(self, state: Global) -> tuple[str, ...]:
        return tuple(sorted(state.layers or state.base))


class ProductMean:
    """``sum_k w_k s_k B_k A_k`` by layer and ``sum_k w_k head_k``, added up one client at a time.

    A layer stays factored while the ranks so far are below min(out, in), then turns into one float64 matrix: memory
    is bounded whatever the cohort.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._pairs: dict[str, list[tuple[float, LowRank]]] = {}
        self._dense: dict[str, Tensor] = {}
        self._head: dict[str, Tensor] = {}

    def add(self, weight: float, adapter: Adapter) -> None:
        """Adds ``weight`` times the adapter's products, and its head."""
        self.weight += weight
        for name, pair in adapter.layers.items():
            self.add_pair(name, weight, pair)
        for name, tensor in adapter.head.items():
            total = self._head.setdefault(name, torch.zeros(tensor.shape, dtype=torch.float64))
            total += weight * tensor.double()

    def add_pair(self, name: str, weight: float, pair: LowRank) -> None:
        """Adds ``weight`` times one layer's product, without counting the weight: differences need two of these."""
        if name in self._dense:
            self._dense[name].addmm_(pair.B.double(), pair.A.double(), alpha=weight * pair.scale)
            return
        pairs = self._pairs.setdefault(name, [])
        pairs.append((weight, pair))
        out, inner = pair.B.shape[0], pair.A.shape[1]
        if sum(p.rank for _, p in pairs) >= min(out, inner):
            self._dense[name] = torch.zeros(out, inner, dtype=torch.float64)
            for earlier, p in self._pairs.pop(name):
                self._dense[name].addmm_(p.B.double(), p.A.double(), alpha=earlier * p.scale)

    def layer(self, name: str) -> Change:
        """The layer's mean: the sum over the total weight. A pair of scale 1, or a float32 matrix.

        ValueError where no weight was added.
        """
        total = self._total()
        if name in self._dense:
            return (self._dense[name] / total).float()
        pairs = self._pairs[name]
        return stack([pair for _, pair in pairs], [weight / total for weight, _ in pairs])

    def matrix(self, name: str) -> Tensor:
        """The layer's mean as a float32 matrix (out, in), whatever the ranks."""
        mean = self.layer(name)
        return mean.dense() if isinstance(mean, LowRank) else mean

    def head(self) -> dict[str, Tensor]:
        """The head's mean, float32."""
        total = self._total()
        return {name: (tensor / total).float() for name, tensor in self._head.items()}

    def names(self) -> list[str]:
        """Layers added so far."""
        return [*self._pairs, *self._dense]

    def _total(self) -> float:
        if self.weight <= 0:
            raise ValueError("no update with a positive weight to aggregate")
        return self.weight


def advance_head(head: Mapping[str, Tensor], mean_change: Mapping[str, Tensor], advance: Advance) -> dict[str, Tensor]:
    """One server-optimizer step on every head tensor, each under the name ``head.<parameter>``."""
    return {name: advance(f"head.{name}", value, mean_change[name]) for name, value in head.items()}


def first_ranks(pair: LowRank, rank: int, scale: float) -> LowRank:
    """The pair cut to its first ``rank`` ranks, under another scale. Views. ValueError where it has fewer."""
    if rank > pair.rank:
        raise ValueError(f"a pair of rank {pair.rank} has no first {rank} ranks")
    return LowRank(pair.B[:, :rank], pair.A[:rank], scale)


def pairs(state: Global) -> dict[str, LowRank]:
    """The state's layers where a method keeps all of them as pairs. TypeError for a matrix."""
    layers: dict[str, LowRank] = {}
    for name, change in state.layers.items():
        if not isinstance(change, LowRank):
            raise TypeError(f"{name} is a matrix, and was to be a pair")
        layers[name] = change
    return layers


def product_change(update: Update) -> dict[str, LowRank]:
    """What a client's training changed of each layer's product, ``s (B_k A_k - B A)``, as a pair of twice the rank.

    ``[dB | B] [A_k; dA]`` subtracts no products: it is exactly 0 where nothing moved.
    """
    sent, trained, moved = update.sent.layers, update.trained.layers, update.layout.unflatten(update.change).layers
    return {
        name: LowRank(torch.cat([pair.B, sent[name].B], 1), torch.cat([trained[name].A, pair.A]), pair.scale)
        for name, pair in moved.items()
    }


def trained_product(update: Update, meant: Start) -> dict[str, LowRank]:
    """A client's product of each layer: what it trained, had it started from all that it was ``meant`` to get.

    That is its trained pair where everything arrived. Where the wire kept entries back or rounded them, it is what was
    meant plus what was `learned`, at three times the rank: what did not travel is not lost. Either way column j of B
    belongs to rank j modulo the client's rank.
    """
    if torch.equal(update.start, meant.vector):
        return dict(update.trained.layers)
    gains, starts = product_change(update), meant.layout.unflatten(meant.vector).layers
    return {name: stack([starts[name], gains[name]], [1.0, 1.0]) for name in gains}
