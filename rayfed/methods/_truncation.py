"""Truncation: what FlexLoRA, raFLoRA and FedHL share.

The state holds each layer's global change W whole, and the leading singular triples U S V^T of it, as many as the
largest rank, taken once when the state is made. A client of rank r and scale s starts from the best approximation of
rank r, the first r triples:

    split "b"       B = U_r S_r / s          A = V_r^T
    split "sqrt"    B = U_r sqrt(S_r / s)    A = sqrt(S_r / s) V_r^T

A rank without a singular value to carry (all of them in round 0) gets a zero column in B and its own row of A_0, the
random A that the run began with: with nothing on either side it could never learn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import Spectrum, Split, factors, norm, pad, svd, tail_energy, top_svd
from rayfed.methods._state import Change, Global, Layered, trained_product
from rayfed.methods.base import Profile, Start, Update

NOISE = 1e-6  # a singular value under this share of the first is rounding error of float32
SMALL = 256  # layers up to this size are decomposed exactly and in float64


class Truncating(Layered):
    """State and download of methods that send truncations; subclasses say how uploads become the next change."""

    mixed_ranks = True
    split: Split = "b"

    def init(self, adapter: Adapter, seed: int) -> Global:
        rows = {f"A.{name}": pair.A for name, pair in adapter.layers.items()}
        return decomposed(Global(head=dict(adapter.head), extras=rows), adapter.layers)

    def broadcast(self, state: Global, client: Profile) -> Start:
        adapter = Adapter({name: self._truncated(state, name, client) for name in state.layers}, state.head)
        return Start(adapter.flatten(), adapter.layout)

    def delta(self, state: Global, layer: str) -> LowRank | Tensor:
        return state.layers[layer]

    def _truncated(self, state: Global, name: str, client: Profile) -> LowRank:
        found, rows = spectrum(state, name), state.extras[f"A.{name}"]
        pair = factors(found, client.rank, client.scale, self.split)
        dead = found.S[: pair.rank] <= NOISE * found.S[0]
        pair = LowRank(
            torch.where(dead, 0.0, pair.B), torch.where(dead[:, None], rows[: pair.rank], pair.A), client.scale
        )
        return pad(pair, client.rank, rows)  # a layer narrower than the rank has fewer triples


class Meant:
    """What a state's clients were meant to get, made once for each rank and scale."""

    def __init__(self, method: Truncating, state: Global) -> None:
        self._method, self._state = method, state
        self._starts: dict[tuple[int, float], Start] = {}

    def trained_product(self, update: Update) -> dict[str, LowRank]:
        """The client's products, by layer; see `rayfed.methods._state.returned`."""
        key = (update.client.rank, update.client.scale)
        if key not in self._starts:
            self._starts[key] = self._method.broadcast(self._state, update.client)
        return trained_product(update, self._starts[key])


def decomposed(state: Global, layers: Mapping[str, Change], passes: int = 4) -> Global:
    """The state with these changes as its layers, and what truncation needs of them in its extras.

    Beside U, S and Vh of each layer that is "errors" (r_max + 1,), float64: at r, the squared error of truncating all
    layers to rank r, ``sum ||W - W_r||_F^2``. ``passes`` is for `leading`.
    """
    extras, errors = dict(state.extras), []
    for name in sorted(layers):
        rank = extras[f"A.{name}"].shape[0]
        found, energy = leading(layers[name], rank, passes), norm(layers[name]) ** 2
        extras |= {f"U.{name}": found.U.float(), f"S.{name}": found.S.float(), f"Vh.{name}": found.Vh.float()}
        errors.append([tail_energy(found.S, energy, r) for r in range(rank + 1)])
    extras["errors"] = torch.tensor([math.fsum(at_rank) for at_rank in zip(*errors)], dtype=torch.float64)
    return replace(state, layers={name: layers[name] for name in sorted(layers)}, extras=extras)


def spectrum(state: Global, name: str) -> Spectrum:
    """The layer's leading singular triples, one for each of the largest rank (fewer where it is narrower)."""
    return Spectrum(*(state.extras[f"{part}.{name}"] for part in ("U", "S", "Vh")))


def leading(change: Change, rank: int, passes: int = 4) -> Spectrum:
    """The top triples: exact for small layers, in float64, and for short stacks; else by `top_svd` of the matrix.

    ``passes`` are the iterations of the latter where it is randomised.
    """
    smaller = min(change.B.shape[0], change.A.shape[1]) if isinstance(change, LowRank) else min(change.shape)
    dtype = torch.float64 if smaller <= SMALL else None
    if isinstance(change, LowRank):
        # The exact SVD costs a stack's rank cubed: past this, a few triples of the matrix are cheaper.
        if smaller <= SMALL or change.rank < 6 * (rank + 16):
            return svd(change, rank, dtype=dtype)
        change = change.dense()
    return top_svd(change, rank, iterations=passes, dtype=dtype)


def truncation_report(state: Global, ranks: list[int]) -> dict[str, float]:
    """What clients of these ranks did not get of the change they were sent: mean squared error, and its share."""
    errors = state.extras["errors"]
    error = sum(float(errors[rank]) for rank in ranks) / len(ranks)
    return {"truncation_error": error, "truncation_share": error / whole if (whole := float(errors[0])) else 0.0}
