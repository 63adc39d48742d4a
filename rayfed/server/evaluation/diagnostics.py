"""How far what the server makes of a round is from what the clients trained (`eval.diagnostics`).

Client k trained the model ``M_k = F_k + s_k B_k A_k``, with F_k the frozen change of the base under its adapter. p_k
are the server's weights. Ranks are padded with zeros in

    mean of products    D = sum_k p_k M_k                                          the average of the clients' models
    product of means    P = sum_k p_k F_k + (sum_k p_k s_k B_k) (sum_k p_k A_k)    the result of averaging factors

Reported are ``||W - D|| / ||D||`` and ``||W - P|| / ||P||``, with W the global model after the round. The taxonomy is
that of Sum-Product and Product-Sum methods (arXiv 2508.01348). Its convergence results bound how far what is broadcast
is from what each client trained. With S_k the model from which client k would start the next round, as it would decode
it (truncated, sparse, rounded):

    R^2         = sum_k p_k ||S_k - M_k||^2;   R_max is the largest of these distances (the weak condition)
    R_least^2   = sum_k p_k ||D - M_k||^2      the least R of a broadcast that is the same for all
    R_excess^2  = sum_k p_k ||S_k - D||^2      R^2 = R_least^2 + R_excess^2 where all clients are sent the same

R_B and R_A are the same of the factors B and A (the strong condition), where a factor's entries mean the same at both
ends (`Method.fixed_gauge`) and all ranks are equal. All norms are over all layers, without the head. Products stay
factored where that is smaller. The figures are computed from the inner products of all models, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rayfed.clients.plan import RunPlan
from rayfed.lora.adapter import LowRank
from rayfed.lora.algebra import inner_products
from rayfed.methods import BaseChange, Method, Profile, Update
from rayfed.server.downlink import Downlink
from rayfed.server.executor import Executor

FIGURES = ("", "_max", "_least", "_excess")


@dataclass(frozen=True, eq=False)
class Model:
    """A client's pairs by layer, over a frozen change of the base."""

    layers: Mapping[str, LowRank]
    base: BaseChange

    def terms(self, layer: str) -> list[tuple[float, LowRank | Tensor]]:
        """The layer's change as a weighted sum."""
        return [(1.0, own[layer]) for own in (self.layers, self.base) if layer in own]


class Diagnostics:
    """Takes the updates of one round, then compares. It stores one adapter for each client of the cohort."""

    def __init__(self) -> None:
        self._clients: list[tuple[Profile, float, Model]] = []

    def add(self, update: Update, base: BaseChange) -> None:
        """Adds one client: its trained adapter, over the base it trained on."""
        self._clients.append((update.client, update.weight, Model(update.trained.layers, base)))

    def report(self, plan: RunPlan, state: Any, t: int, executor: Executor) -> dict[str, float | None]:
        """The metrics of round ``t`` (from 0), which led to ``state``; None where a figure has no meaning."""
        following = Downlink(plan, state, t + 1, executor)
        sizes, made = plan.federation_at(t).sizes, {}

        def sent(client: Profile) -> Model:
            download = following.of(plan.profiles.profile(client.client, int(sizes[client.client]), t + 1))
            if id(download) not in made:
                pairs = download.start.layout.unflatten(download.vector).layers
                made[id(download)] = download, Model(pairs, download.start.merged_base)
            return made[id(download)][1]

        return self.figures(plan.method, state, sent)

    def figures(self, method: Method, state: Any, sent: Callable[[Profile], Model]) -> dict[str, float | None]:
        """`report`, where ``sent`` gives the model that a client of the round would be sent next."""
        if not self._clients:
            return {}
        clients, weights, trained = zip(*self._clients)
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        next_starts = [sent(client) for client in clients]
        names = list(trained[0].layers)
        distinct = list(dict.fromkeys(next_starts))
        count = len(trained)
        G = sum(
            _layer_products(
                [*(own.terms(name) for own in (*trained, *distinct)), [(1.0, method.delta(state, name))],
                 _product_of_means(trained, shares.tolist(), name)]
            )
            for name in names
        )  # fmt: skip
        assert isinstance(G, Tensor)
        units = torch.eye(len(G), dtype=torch.float64)
        M, W, P = units[:count], units[-2], units[-1]
        S, D = units[[count + distinct.index(own) for own in next_starts]], shares @ M

        def squares(differences: Tensor) -> Tensor:
            """(k,): the squared norms of combinations (k, models) of the models."""
            return ((differences @ G) * differences).sum(-1).clamp(min=0)

        to_products, to_means, products, means = squares(torch.stack([W - D, W - P, D, P])).tolist()
        found: dict[str, float | None] = {
            "diagnostics/to_mean_of_products": (to_products / products) ** 0.5 if products else 0.0,
            "diagnostics/to_product_of_means": (to_means / means) ** 0.5 if means else 0.0,
        }
        found |= _distances("R", shares, squares(S - M), squares(M - D), squares(S - D))
        for part in ("B", "A"):
            own = _factor_squares(trained, next_starts, shares, part) if method.fixed_gauge else None
            found |= _distances(f"R_{part}", shares, *own) if own else _undefined(f"R_{part}")
        return found


def _distances(name: str, shares: Tensor, sent: Tensor, least: Tensor, excess: Tensor) -> dict[str, float | None]:
    """The four figures of squared distances (clients,)."""
    values = (shares @ sent, sent.max(), shares @ least, shares @ excess)
    return {f"diagnostics/{name}{suffix}": float(value) ** 0.5 for suffix, value in zip(FIGURES, values, strict=True)}


def _undefined(name: str) -> dict[str, float | None]:
    return {f"diagnostics/{name}{suffix}": None for suffix in FIGURES}


def _layer_products(models: Sequence[Sequence[tuple[float, LowRank | Tensor]]]) -> Tensor:
    """(models, models): the inner products of a layer's changes, each a weighted sum of terms."""
    terms = {id(term): term for own in models for _, term in own}
    places = {key: i for i, key in enumerate(terms)}
    sums = torch.zeros(len(models), len(terms), dtype=torch.float64)
    for i, own in enumerate(models):
        for weight, term in own:
            sums[i, places[id(term)]] += weight
    return sums @ inner_products([*terms.values()]) @ sums.T


def _product_of_means(
    trained: Sequence[Model], shares: Sequence[float], layer: str
) -> list[tuple[float, LowRank | Tensor]]:
    """P of a layer as a weighted sum: the clients' bases, and the product of the means of their factors."""
    pairs = [own.layers[layer].folded() for own in trained]
    rank = max(pair.rank for pair in pairs)
    B = sum(
        p * pair.scale * nn.functional.pad(pair.B.double(), (0, rank - pair.rank)) for p, pair in zip(shares, pairs)
    )
    A = sum(p * nn.functional.pad(pair.A.double(), (0, 0, 0, rank - pair.rank)) for p, pair in zip(shares, pairs))
    assert isinstance(B, Tensor)
    assert isinstance(A, Tensor)
    bases = [(p, own.base[layer]) for p, own in zip(shares, trained) if layer in own.base]
    return [(1.0, LowRank(B, A, 1.0)), *bases]


def _factor_squares(
    trained: Sequence[Model], sent: Sequence[Model], shares: Tensor, part: str
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Squared distances (clients,) over all layers: of what is sent from what was trained, of both from the mean.

    None where ranks differ.
    """
    found = torch.zeros(3, len(trained), dtype=torch.float64)
    for name in trained[0].layers:
        own = [getattr(model.layers[name], part) for model in trained]
        new = [getattr(model.layers[name], part) for model in sent]
        if len({tuple(factor.shape) for factor in (*own, *new)}) > 1:
            return None
        M, S = (torch.stack(factors).double().flatten(1) for factors in (own, new))
        mean = shares @ M
        found += torch.stack([(x - y).square().sum(1) for x, y in ((S, M), (M, mean), (S, mean))])
    return found[0], found[1], found[2]
