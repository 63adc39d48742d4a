"""FedView: a full-rank global change, and for every client a view of it, which low-rank corrections bring up to date.

The server stores a matrix W (out, in) per layer. Per client k it stores the view V_k: the sum of what that client was
sent, 0 at first. In a round with client k of rank r and scale s

    C_k  = best rank-r approximation of W - V_k            down: r (out + in) entries, however many rounds k missed
    V_k <- V_k + C_k, as decoded                           the client's model is now the base plus V_k
    W   <- advance(W, sum_k p_k s (B_k A_k - B A))         up: r (out + in); (B, A) is where the client started

What a correction leaves out, by its rank or by a sparse download, is still in W - V_k the next time. That is error
feedback on the way down: views lose their truncation over time, where FedHL's clients train on a truncation of W for
ever. W is a dense matrix, so momentum and adaptive server optimizers are well defined.

``start`` says what the client's factors are when it begins to train:

    correction   (B, A) = C_k, on the base V_k: every rank moves from the first step, where the model moved lately
    fresh        B = 0 and A random, on the base V_k + C_k; for a client of every round and enough rank this is FLoRA
    half         the leading half of C_k's ranks as in `correction`, the other half as in `fresh`

``split`` says how C_k = U S V^T becomes factors. A's row j is n_j V_j^T and B's column j is S_j / (s n_j) U_j, with

    floored      n_j = max(sqrt(S_j / s), floor a)         a = 1 / sqrt(3), the norm of a random row
    balanced     n_j = sqrt(S_j / s)                       steps shrink with the corrections, and may die out
    b            n_j = a                                   steps in B of one size, whatever the correction

If S_j is a rounding error (round 0; a view that is up to date), rank j starts at B = 0 and a random row of A. Random
rows are drawn from (run seed, layer, round, client). A client knows the rows of `fresh` and `half`, and their B = 0,
before anything is sent; they never travel. Their part of C_k travels as ``Start.merge``. A row that replaces a
rounding error travels, since the client cannot know that it does.

A client's view is its own weights, so the client stores nothing more. The simulator stores one dense view per layer for
each client that took part, and takes one truncated SVD per client and layer (two for `fresh` and `half`).

Source: ours; deviates: nothing. Prior art: ECLoRA (doi 10.1109/TNNLS.2025.3586545) adds back one global error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import add, norm, top_svd
from rayfed.methods import LayerMethod, LayerState, ProductMean, matrix
from rayfed.methods.base import ANY_OPTIMIZER, Advance, BaseChange, Profile, Start, Updates, fedavg
from rayfed.seeding import torch_rng

ROW = 1 / math.sqrt(3)  # a row of in entries uniform in +-1/sqrt(in) has this norm, in the mean square
TINY = 1e-6  # a singular value under this share of ||W|| + ||V_k|| is a rounding error of float32


@dataclass(frozen=True)
class FedView(LayerMethod):
    """Corrections of rank r_k down, changes of rank r_k up; any ranks, any server optimizer."""

    start: Literal["correction", "half", "fresh"] = "correction"
    """Where local training starts: at the correction's factors, at fresh ones, or half of each."""
    split: Literal["floored", "balanced", "b"] = "floored"
    """How a correction is divided between B and A."""
    floor: NonNegativeFloat = 0.6
    """For `floored`: the least norm of a row of A, in units of a random row's. 0 is `balanced`."""

    paper = "derived here"
    summary = "full-rank global model; corrections with error feedback down"
    traffic_down = traffic_up = "r_k (in + out)"
    source = "ours"
    optimizers = ANY_OPTIMIZER
    mixed_ranks = True
    personal = True

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        layers = {name: pair.dense() for name, pair in adapter.layers.items()}
        return LayerState(layers=layers, head=dict(adapter.head), notes={"seed": seed})

    def broadcast(self, state: LayerState, client: Profile) -> Start:
        view = state.clients.get(client.client, {})
        begun = {"correction": client.rank, "half": (client.rank + 1) // 2, "fresh": 0}[self.start]
        begin: dict[str, LowRank] = {}
        merge: dict[str, LowRank] = {}
        for name in state.layers:
            begin[name], merge[name] = self._correct(state, client, name, view.get(name), begun)
        adapter = Adapter(begin, state.head)
        if begun == client.rank:
            return Start.of(adapter, base=view)
        known = torch.zeros(adapter.layout.size, dtype=torch.bool)
        for pair in adapter.layout.unflatten(known).layers.values():  # views: what is marked there is known
            pair.B[:, begun:] = pair.A[begun:] = True
        return Start.of(adapter, known=known, merge=Adapter(merge, {}), base=view)

    def _correct(
        self, state: LayerState, client: Profile, name: str, view: Tensor | None, begun: int
    ) -> tuple[LowRank, LowRank]:
        """The pair from which a client trains, and what it merges first: ``begun`` ranks of C_k, and the others."""
        W = state.matrices[name]
        # Two passes are enough where four are usual: what they miss of a correction is in the next one.
        spectrum = top_svd(W if view is None else W - view, client.rank, iterations=2)
        U, S, Vh = spectrum.U, spectrum.S, spectrum.Vh
        # Row by row in memory, as clients decode it. Then their merge has the server's bits.
        merge = LowRank((U[:, begun:] * S[begun:]).contiguous(), Vh[begun:].contiguous(), 1.0)
        U, S, Vh = U[:, :begun], S[:begun] / client.scale, Vh[:begun]
        rows = S.sqrt() if self.split != "b" else torch.full_like(S, ROW)
        if self.split == "floored":
            rows = rows.clamp(min=self.floor * ROW)
        alive = S * client.scale > TINY * (norm(W) + (0.0 if view is None else norm(view)))
        rng = torch_rng(state.notes["seed"], "lora.A", name, state.rounds, client.client)
        bound = 1 / math.sqrt(W.shape[1])
        A = torch.empty(client.rank, W.shape[1]).uniform_(-bound, bound, generator=rng)
        B = torch.zeros(W.shape[0], client.rank)
        # Layers narrower than the rank have fewer singular values than that.
        A[: len(S)] = torch.where(alive[:, None], rows[:, None] * Vh, A[: len(S)])
        B[:, : len(S)] = torch.where(alive, U * (S / rows), 0.0)
        return LowRank(B, A, client.scale), merge

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        mean, clients, behind = ProductMean(), dict(state.clients), []
        for update in updates:
            mean.add_change(update.weight, update)
            k = update.client.client
            base: BaseChange = clients.get(k, {})
            if self.start != "correction":
                base = self.broadcast(state, update.client).merged_base
            sent, first = update.sent.layers.items(), not base
            clients[k] = {name: pair.dense() if first else add(matrix(base[name]), pair) for name, pair in sent}
            behind.append(_distance(state, clients[k]))
        layers = {name: advance(f"W.{name}", W, mean.matrix(name)) for name, W in state.matrices.items()}
        head = mean.head()
        report = {"view_error": sum(behind) / len(behind)}
        return state.next_with_head(advance, head, layers=layers, clients=clients, report=report)


def _distance(state: LayerState, view: Mapping[str, Tensor]) -> float:
    """``||W - V_k|| / ||W||`` over all layers: what the client's model lacked of the global one as it trained."""
    lacks = math.hypot(*(norm(state.matrices[name] - view[name]) for name in view))
    whole = math.hypot(*(norm(state.matrices[name]) for name in view))
    return lacks / whole if whole else 0.0
