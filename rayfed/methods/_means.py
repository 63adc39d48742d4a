"""Weighted means over a cohort: of flat changes, of products and of heads. All sums are taken in float64, in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from rayfed.lora.adapter import LowRank
from rayfed.lora.algebra import norm, stack, stays_factored
from rayfed.methods._messages import PackSum, Start, Update, matrix

SMALL = 256  # layers up to this size are computed with in float64, larger ones in float32

Advance = Callable[[str, Tensor, Tensor], Tensor]
"""One server-optimizer step: (name of a tensor, its value, its mean change) -> its next value, all of one shape."""


def fedavg(name: str, value: Tensor, change: Tensor) -> Tensor:
    """The plain server step: add the mean change."""
    return value + change


def mean_change(updates: Iterable[Update | PackSum], size: int) -> Tensor:
    """``sum_k p_k change_k`` as float32 (n,), where p_k are the weights divided by their sum.

    Takes one update at a time, so memory is one vector whatever the cohort. ValueError if no weight is positive.
    """
    mean = ChangeMean(size)
    for update in updates:
        mean.add(update)
    return mean.mean()


class ChangeMean:
    """`mean_change` in steps, for methods that look at each update as well."""

    def __init__(self, size: int) -> None:
        self.total, self.weight = torch.zeros(size, dtype=torch.float64), 0.0

    def add(self, update: Update | PackSum) -> None:
        """Adds one update, or the sum of a pack."""
        update.add_to(self.total)
        self.weight += update.weight

    def mean(self) -> Tensor:
        """The mean change (n,), float32. ValueError if no weight is positive."""
        return (self.total / positive(self.weight)).float()


class HeadMean:
    """The weighted mean of the clients' changes of the head, with their weights and ranks."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.weights: list[float] = []
        self.ranks: list[int] = []
        self._head: dict[str, Tensor] = {}

    def count(self, weight: float, update: Update) -> None:
        """Counts one client: its weight, its rank and its change of the head."""
        self.weight += weight
        self.weights.append(weight)
        self.ranks.append(update.client.rank)
        for name, tensor in update.moved.head.items():
            total = self._head.setdefault(name, torch.zeros(tensor.shape, dtype=torch.float64))
            total += weight * tensor.double()

    def head(self) -> dict[str, Tensor]:
        """The mean change of the head, float32. ValueError if no weight is positive."""
        total = positive(self.weight)
        return {name: (tensor / total).float() for name, tensor in self._head.items()}

    def shares(self) -> list[float]:
        """p_k of every client, in order: the weights divided by their sum. ValueError if no weight is positive."""
        total = positive(self.weight)
        return [weight / total for weight in self.weights]

    def weights_report(self) -> dict[str, float]:
        """The largest p_k, and the effective cohort ``1 / sum p_k^2``."""
        shares = self.shares()
        return {"weights_max": max(shares), "effective_cohort": 1 / math.fsum(share**2 for share in shares)}


class ProductMean(HeadMean):
    """``sum_k p_k s_k B_k A_k`` by layer and ``sum_k p_k head_k``, added up client by client.

    A layer's pairs are collected while the sum of their ranks is below min(out, in). Then they are multiplied out
    together and added to a float64 matrix. So memory is bounded, whatever the cohort.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pairs: dict[str, list[tuple[float, LowRank]]] = {}
        self._ranks: dict[str, int] = {}  # the sum of the ranks of `_pairs`
        self._dense: dict[str, Tensor] = {}

    def add(self, weight: float, update: Update, products: Mapping[str, LowRank]) -> None:
        """Counts one client, and adds ``weight`` times its ``products`` by layer."""
        self.count(weight, update)
        for name, pair in products.items():
            self.add_product(name, weight, pair)

    def add_change(self, weight: float, update: Update) -> None:
        """Counts one client, and adds ``weight`` times its `product_change`."""
        self.count(weight, update)
        sent = update.sent.layers
        for name, moved in update.moved.layers.items():
            self.add_product(name, weight, LowRank(moved.B, sent[name].A + moved.A, moved.scale))
            self.add_product(name, weight, LowRank(sent[name].B, moved.A, moved.scale))

    def add_product(self, name: str, weight: float, pair: LowRank) -> None:
        """Adds ``weight`` times one layer's product, without counting a client."""
        self._pairs.setdefault(name, []).append((weight, pair))
        self._ranks[name] = self._ranks.get(name, 0) + pair.rank
        if not stays_factored(pair.B.shape[0], pair.A.shape[1], self._ranks[name]):
            self._multiply(name)

    def layer(self, name: str) -> LowRank | Tensor:
        """The layer's mean: a pair of scale 1, or a float32 matrix. ValueError if no weight is positive."""
        total = positive(self.weight)
        if name in self._dense:
            self._multiply(name)
            return (self._dense[name] / total).float()
        pairs = self._pairs[name]
        return stack([pair for _, pair in pairs], [weight / total for weight, _ in pairs])

    def matrix(self, name: str) -> Tensor:
        """The layer's mean as a float32 matrix (out, in), whatever the ranks."""
        return matrix(self.layer(name))

    def _multiply(self, name: str) -> None:
        """Adds the layer's collected pairs to its float64 matrix."""
        factors: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        for weight, pair in self._pairs[name]:
            out, inner = pair.B.shape[0], pair.A.shape[1]
            dtype = torch.float64 if min(out, inner) <= SMALL else torch.float32
            # Clients of one tier share the B that they got: their A are added up, and multiplied once.
            key = (pair.B.data_ptr(), *pair.B.shape, *pair.B.stride())
            A = pair.A.to(dtype) * (weight * pair.scale)
            factors[key] = (pair.B, factors[key][1].add_(A) if key in factors else A)
        self._pairs[name], self._ranks[name] = [], 0
        if factors:
            Bs, As = zip(*factors.values())
            product = torch.cat(Bs, 1).to(As[0]) @ torch.cat(As)
            self._dense[name] = self._dense[name].add_(product) if name in self._dense else product.double()


def product_change(update: Update) -> dict[str, LowRank]:
    """How a client's training changed the product of each layer, ``s (B_k A_k - B A)``, as a pair of twice the rank.

    The pair is ``[dB | B] [A_k; dA]``. No products are subtracted, so it is exactly 0 where nothing moved.
    """
    sent, trained = update.sent.layers, update.trained.layers
    return {
        name: LowRank(torch.cat([pair.B, sent[name].B], 1), torch.cat([trained[name].A, pair.A]), pair.scale)
        for name, pair in update.moved.layers.items()
    }


def trained_product(update: Update, start: Start) -> dict[str, LowRank]:
    """A client's product of each layer, as if the client had received all of ``start``.

    If everything arrived, it is the trained pair. If the download was sparse or rounded, it is the product of ``start``
    plus `product_change`, of three times the rank: then a part of the state that did not travel is not lost. In both
    cases column j of B belongs to rank j modulo the client's rank.
    """
    if torch.equal(update.start, start.vector):
        return dict(update.trained.layers)
    changes, starts = product_change(update), start.layout.unflatten(start.vector).layers
    return {name: stack([starts[name], changes[name]], [1.0, 1.0]) for name in changes}


def change_norm(update: Update, averages: Literal["changes", "products"], scale: float) -> float:
    """The L2 norm of a client's change, in the space in which the method takes its mean (`Method.averages`).

    For `products`: of the changes of the layers' products and of the head. For `changes`: of the entries, with B under
    the server's ``scale``, since clients of other ranks may have another one.
    """
    if averages == "products":
        parts: list[LowRank | Tensor] = [*product_change(update).values(), *update.moved.head.values()]
        return math.hypot(*map(norm, parts))
    change, in_B = update.change.double(), update.layout.mask("B")
    return math.hypot(float(change[in_B].norm()) * update.client.scale / scale, float(change[~in_B].norm()))


def positive(weight: float) -> float:
    """The sum of weights. ValueError if it is not positive."""
    if weight <= 0:
        raise ValueError("no update with a positive weight to aggregate")
    return weight
