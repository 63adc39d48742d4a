"""FedView: a full-rank global change, and for every client a view of it, repaired by low-rank corrections.

The server keeps a matrix W (out, in) per layer, and per client k its view V_k: the sum of what that client was sent, 0
at first. In a round with client k of rank r and scale s

    C_k  = best rank-r approximation of W - V_k            down: r (out + in) entries, however many rounds k missed
    V_k <- V_k + C_k, as decoded                           the client's model is now the base plus V_k
    W   <- advance(W, sum_k p_k s (B_k A_k - B A))         up: r (out + in); (B, A) is where the client started

What a correction leaves out, by its rank or by a sparse download, is still in W - V_k the next time: error feedback on
the way down. So views forget truncation over time, where FedHL's clients train on a truncation of W for ever. The
change of W is a dense matrix in a fixed gauge: momentum and adaptive server optimizers are well defined.

``start`` says what the client's factors are when it begins to train:

    correction   (B, A) = C_k, over the base V_k: every rank moves from the first step, where the model moved lately
    fresh        B = 0 and A random, over the base V_k + C_k; for a client of every round and enough rank this is FLoRA
    half         the leading half of C_k's ranks as in `correction`, the other half as in `fresh`

``split`` says how C_k = U S V^T becomes factors: A's row j is n_j V_j^T and B's column j is S_j / (s n_j) U_j, with

    floored      n_j = max(sqrt(S_j / s), floor a)         a = 1 / sqrt(3), the norm of a random row
    balanced     n_j = sqrt(S_j / s)                       steps shrink with the corrections, and may die out
    b            n_j = a                                   steps in B of one size, whatever the correction

A rank whose S_j is rounding error (round 0; a view that is up to date) starts at B = 0 and a random row of A instead.
Random rows are drawn from (run seed, layer, round, client). The rows of `fresh` and `half` are known before anything
is sent and never travel, nor does the B = 0 beside them; their part of C_k travels in ``Start.extra``, whole, and is
merged. A row that stands in for a rounding error travels, since the client cannot know that it is one.

The method is this project's own: derived and piloted here. A client's view is what its own weights are, so it
stores nothing more; the simulator keeps one dense view per layer for each client seen, and takes one truncated SVD per
client and layer (two for `fresh` and `half`, which repeat it when they aggregate).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rayfed.errors import allowed
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import add, norm, top_svd
from rayfed.methods._state import Global, Layered, ProductMean, advance_head, product_change
from rayfed.methods.base import Advance, BaseChange, Profile, Start, Update, fedavg
from rayfed.seeding import torch_rng

ROW = 1 / math.sqrt(3)  # a row of in entries uniform in +-1/sqrt(in) has this norm, in the mean square
TINY = 1e-6  # a singular value under this share of ||W|| + ||V_k|| is rounding error of float32


@dataclass(frozen=True)
class FedView(Layered):
    """Corrections of rank r_k down, changes of rank r_k up; any ranks, any server optimizer."""

    start: Literal["correction", "half", "fresh"] = "correction"
    """Where local training starts: at the correction's factors, at fresh ones, or half of each."""
    split: Literal["floored", "balanced", "b"] = "floored"
    """How a correction is divided between B and A."""
    floor: float = 0.6
    """For `floored`: the least norm of a row of A, in units of a random row's; at least 0 (which is `balanced`)."""

    optimizers = ("fedavg", "sgd", "fedavgm", "fedadam", "adamw")
    mixed_ranks = True
    personal = True

    def __post_init__(self) -> None:
        if not 0 <= self.floor < math.inf:
            raise allowed("method.floor", self.floor, "it must be 0 or more, and finite")

    def init(self, adapter: Adapter, seed: int) -> Global:
        layers = {name: pair.dense() for name, pair in adapter.layers.items()}
        return Global(layers, dict(adapter.head), notes={"seed": seed})

    def broadcast(self, state: Global, client: Profile) -> Start:
        view = state.clients.get(client.client, {})
        begun = {"correction": client.rank, "half": (client.rank + 1) // 2, "fresh": 0}[self.start]
        begin: dict[str, LowRank] = {}
        merge: dict[str, LowRank] = {}
        for name in state.layers:
            begin[name], merge[name] = self._correct(state, client, name, view.get(name), begun)
        adapter = Adapter(begin, state.head)
        if begun == client.rank:
            return Start(adapter.flatten(), adapter.layout, base=view)
        known = {name: _fresh_ranks(pair, begun) for name, pair in begin.items()}
        held = Adapter(known, {name: torch.zeros_like(tensor) for name, tensor in state.head.items()})

        return Start(
            adapter.flatten(), adapter.layout, known=held.flatten().bool(), merge=Adapter(merge, {}), base=view
        )

    def _correct(
        self, state: Global, client: Profile, name: str, view: Tensor | None, begun: int
    ) -> tuple[LowRank, LowRank]:
        """The pair a client trains from, and what it merges first: C_k's first ``begun`` ranks, and the others."""
        W = _matrix(state, name)
        # Two passes do where four are usual: what they miss of a correction is in the next one.
        spectrum = top_svd(W if view is None else W - view, client.rank, iterations=2)
        U, S, Vh = spectrum.U, spectrum.S, spectrum.Vh
        merge = LowRank(U[:, begun:] * S[begun:], Vh[begun:], 1.0)
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

    def aggregate(self, state: Global, updates: Iterable[Update], advance: Advance = fedavg) -> Global:
        total = ProductMean()
        clients = dict(state.clients)
        behind: list[float] = []
        for update in updates:
            client, sent = update.client, update.sent
            total.add(update.weight, Adapter({}, update.layout.unflatten(update.change).head))
            for name, pair in product_change(update).items():
                total.add_pair(name, update.weight, pair)
            base = (
                clients.get(client.client, {}) if self.start == "correction" else _merged(self.broadcast(state, client))
            )
            clients[client.client] = {name: _plus(base.get(name), pair) for name, pair in sent.layers.items()}
            behind.append(_distance(state, clients[client.client]))
        layers = {name: advance(f"W.{name}", _matrix(state, name), total.matrix(name)) for name in state.layers}
        head = advance_head(state.head, total.head(), advance)
        report = {"view_error": sum(behind) / len(behind)}
        return replace(state, layers=layers, head=head, rounds=state.rounds + 1, clients=clients, report=report)

    def delta(self, state: Global, layer: str) -> Tensor:
        return _matrix(state, layer)


def _matrix(state: Global, name: str) -> Tensor:
    W = state.layers[name]
    assert isinstance(W, Tensor)
    return W


def _fresh_ranks(pair: LowRank, begun: int) -> LowRank:
    """Ones in the ranks from ``begun`` on, zeros before."""
    fresh = (torch.arange(pair.rank) >= begun).float()
    return LowRank(fresh.expand(pair.B.shape), fresh[:, None].expand(pair.A.shape), 1.0)


def _plus(base: LowRank | Tensor | None, pair: LowRank) -> Tensor:
    """The view after a pair more."""
    if base is None:
        return pair.dense()
    return add(base.dense() if isinstance(base, LowRank) else base, pair)


def _distance(state: Global, view: Mapping[str, Tensor]) -> float:
    """``||W - V_k|| / ||W||`` over all layers: what the client's model lacked of the global one as it trained."""
    lacks = math.hypot(*(norm(_matrix(state, name) - view[name]) for name in view))
    whole = math.hypot(*(norm(_matrix(state, name)) for name in view))
    return lacks / whole if whole else 0.0


def _merged(start: Start) -> BaseChange:
    base, merge = start.base, start.merge.layers if start.merge else {}
    return {name: add(base[name], pair) if name in base else pair for name, pair in merge.items()}
