"""Truncation: what FlexLoRA, raFLoRA and FedHL share.

The state holds each layer's global change W in full. It also holds the leading singular triples U S V^T of W, as many
as the largest rank. They are computed once, when the state is made. A client of rank r and scale s starts from the best
approximation of rank r, which is the first r triples:

    split "b"       B = U_r S_r / s          A = V_r^T
    split "sqrt"    B = U_r sqrt(S_r / s)    A = sqrt(S_r / s) V_r^T

A rank can lack a singular value; in round 0 all ranks do. Then it gets a zero column in B and its own row of A_0, the
random A with which the run began. With zeros on both sides it could never train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import Spectrum, Split, factors, norm, pad, svd, tail_energy, top_svd
from rayfed.methods import Advance, Change, HeadMean, LayerMethod, LayerState, Profile, Start, Update
from rayfed.methods._means import SMALL, trained_product

NOISE = 1e-6  # a singular value below this share of the first one is a rounding error of float32


class Truncating(LayerMethod):
    """State and download of methods that send truncations. A subclass says how uploads become the next change."""

    averages = "products"
    mixed_ranks = True
    split: Split = "b"

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        rows = {f"A.{name}": pair.A for name, pair in adapter.layers.items()}
        return decomposed(LayerState(head=dict(adapter.head), extras=rows), adapter.layers)

    def broadcast(self, state: LayerState, client: Profile) -> Start:
        layers = {}
        for name in state.layers:
            rows = state.extras[f"A.{name}"]
            layers[name] = truncated(spectrum(state, name), client.rank, client.scale, self.split, rows)
        return Start.of(Adapter(layers, state.head))

    def next(
        self, state: LayerState, mean: HeadMean, advance: Advance, layers: Mapping[str, Change], passes: int = 4,
        **report: float,
    ) -> LayerState:  # fmt: skip
        """The state after a round with these ``layers``: the head's step, the report and the singular triples."""
        head_change = mean.head()
        report = truncation_report(state, mean.ranks) | report
        return decomposed(state.next_with_head(advance, head_change, report=report), layers, passes)

    def client_products(self, state: LayerState) -> Callable[[Update], dict[str, LowRank]]:
        """A function that gives `trained_product` of an update. Clients of equal rank and scale share a start."""

        @cache
        def start(rank: int, scale: float) -> Start:
            return self.broadcast(state, Profile(0, rank, scale))

        return lambda update: trained_product(update, start(update.client.rank, update.client.scale))


def truncated(triples: Spectrum, rank: int, scale: float, split: Split, rows: Tensor) -> LowRank:
    """The first ``rank`` triples as a pair. A rank without a triple has zeros in B and its row of ``rows``."""
    pair = factors(triples, rank, scale, split)
    dead = triples.S[: pair.rank] <= NOISE * triples.S[0]
    B, A = torch.where(dead, 0.0, pair.B), torch.where(dead[:, None], rows[: pair.rank], pair.A)
    return pad(LowRank(B, A, scale), rank, rows)  # a layer narrower than the rank has fewer triples


def decomposed(state: LayerState, layers: Mapping[str, Change], passes: int = 4) -> LayerState:
    """The state with these changes as its layers, and with their singular triples in its extras.

    The extra "errors" (r_max + 1,), float64, holds at r the squared error of truncating all layers to rank r,
    ``sum ||W - W_r||_F^2``. It is empty if there are no layers. ``passes`` is for `leading`.
    """
    extras, errors = dict(state.extras), []
    for name in sorted(layers):
        rank = extras[f"A.{name}"].shape[0]
        triples, energy = leading(layers[name], rank, passes), norm(layers[name]) ** 2
        extras |= {f"U.{name}": triples.U.float(), f"S.{name}": triples.S.float(), f"Vh.{name}": triples.Vh.float()}
        errors.append([tail_energy(triples.S, energy, r) for r in range(rank + 1)])
    extras["errors"] = torch.tensor([math.fsum(at_rank) for at_rank in zip(*errors)], dtype=torch.float64)
    return replace(state, layers={name: layers[name] for name in sorted(layers)}, extras=extras)


def spectrum(state: LayerState, name: str) -> Spectrum:
    """The layer's leading singular triples, one for each of the largest rank (fewer if the layer is narrower)."""
    return Spectrum(*(state.extras[f"{part}.{name}"] for part in ("U", "S", "Vh")))


def leading(change: Change, rank: int, passes: int = 4) -> Spectrum:
    """The top triples: exact and in float64 for small layers, exact for short stacks, else by `top_svd` of the matrix.

    ``passes`` are the iterations of `top_svd` where it is randomised.
    """
    smaller = min(change.B.shape[0], change.A.shape[1]) if isinstance(change, LowRank) else min(change.shape)
    dtype = torch.float64 if smaller <= SMALL else None
    if isinstance(change, LowRank):
        # The exact SVD costs a stack's rank cubed. Above this rank a few triples of the matrix are cheaper.
        if smaller <= SMALL or change.rank < 6 * (rank + 16):
            return svd(change, rank, dtype=dtype)
        change = change.dense()
    return top_svd(change, rank, iterations=passes, dtype=dtype)


def truncation_error(state: LayerState, rank: int) -> float:
    """The squared error of truncating all layers to this rank; 0 if there are no layers."""
    errors: Tensor = state.extras["errors"]
    return float(errors[rank]) if len(errors) else 0.0


def truncation_report(state: LayerState, ranks: list[int]) -> dict[str, float]:
    """What clients of these ranks did not get of the change: the mean squared error, and its share of the whole."""
    error, whole = sum(truncation_error(state, rank) for rank in ranks) / len(ranks), truncation_error(state, 0)
    return {"truncation_error": error, "truncation_share": error / whole if whole else 0.0}
