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

A client's view is its own weights, so the client stores nothing more. The simulator stores a view per layer for each
client that took part: the stack of what the client was sent, or a matrix where that is smaller (`_views.py`). Clients
of equal views and ranks, such as those that come for the first time, share one truncated SVD per layer. Unless they
have random rows, they share one message and one next view, too.

Source: ours; deviates: nothing. Prior art: ECLoRA (doi 10.1109/TNNLS.2025.3586545) adds back one global error.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import Spectrum, norm, top_svd
from rayfed.methods import Change, LayerMethod, LayerState, ProductMean
from rayfed.methods._views import as_tensors, as_view, extended, lacking
from rayfed.methods.base import ANY_OPTIMIZER, Advance, Profile, Start, Updates, fedavg
from rayfed.seeding import torch_rng

ROW = 1 / math.sqrt(3)  # a row of in entries uniform in +-1/sqrt(in) has this norm, in the mean square
TINY = 1e-6  # a singular value under this share of ||W|| + ||V_k|| is a rounding error of float32
RECENT = 16  # views whose singular triples are in memory


class FedViewState(LayerState):
    """The state, with what is computed of it once for all clients of a round."""

    @cached_property
    def norms(self) -> dict[str, float]:
        """``||W||_F`` by layer."""
        return {name: norm(W) for name, W in self.matrices.items()}

    @cached_property
    def triples(self) -> dict[tuple[Hashable, int], dict[str, tuple[Spectrum, float]]]:
        """What `FedView` computed for views and ranks, the most recent last."""
        return {}

    @cached_property
    def starts(self) -> WeakValueDictionary[Hashable, Start]:
        """The starts in use that are the same for all clients of equal views and ranks."""
        return WeakValueDictionary()


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
    averages = "products"
    summed = "products"
    mixed_ranks = True
    personal = True
    state_class = FedViewState

    def init(self, adapter: Adapter, seed: int) -> FedViewState:
        layers = {name: pair.dense() for name, pair in adapter.layers.items()}
        return FedViewState(layers=layers, head=dict(adapter.head), notes={"seed": seed})

    def broadcast(self, state: Any, client: Profile) -> Start:
        key = _key(state, client.client), client.rank, client.scale
        if (known := state.starts.get(key)) is not None:
            return known
        start, shared = self._start(state, client)
        if shared:
            state.starts[key] = start
        return start

    def _start(self, state: FedViewState, client: Profile) -> tuple[Start, bool]:
        """The client's start, and whether it has no random rows: those are the client's own."""
        view = _view(state, client.client)
        begun = {"correction": client.rank, "half": (client.rank + 1) // 2, "fresh": 0}[self.start]
        begin: dict[str, LowRank] = {}
        merge: dict[str, LowRank] = {}
        shared = True
        for name, (spectrum, noise) in _triples(state, client, view).items():
            U, S, Vh = spectrum.U[:, begun:], spectrum.S[begun:], spectrum.Vh[begun:]
            # Row by row in memory, as clients decode it. Then their merge has the server's bits.
            merge[name] = LowRank((U * S).contiguous(), Vh.contiguous(), 1.0)
            begin[name], drawn = self._begin(state, client, name, spectrum, begun, noise)
            shared &= not drawn
        adapter = Adapter(begin, state.head)
        if begun == client.rank:
            return Start.of(adapter, base=view), shared
        known = torch.zeros(adapter.layout.size, dtype=torch.bool)
        for pair in adapter.layout.unflatten(known).layers.values():  # views: what is marked there is known
            pair.B[:, begun:] = pair.A[begun:] = True
        return Start.of(adapter, known=known, merge=Adapter(merge, {}), base=view), False

    def _begin(
        self, state: FedViewState, client: Profile, name: str, spectrum: Spectrum, begun: int, noise: float
    ) -> tuple[LowRank, bool]:
        """The pair from which a client trains, and whether it has random rows beside the ``begun`` ranks of C_k."""
        U, S, Vh = spectrum.U[:, :begun], spectrum.S[:begun] / client.scale, spectrum.Vh[:begun]
        rows = S.sqrt() if self.split != "b" else torch.full_like(S, ROW)
        if self.split == "floored":
            rows = rows.clamp(min=self.floor * ROW)
        alive, n = S * client.scale > noise, len(S)
        B, A = U * (S / rows), rows[:, None] * Vh
        # Layers narrower than the rank have fewer singular values than that.
        drawn = n < client.rank or not bool(alive.all())
        if drawn:
            rng = torch_rng(state.notes["seed"], "lora.A", name, state.rounds, client.client)
            bound = 1 / math.sqrt(A.shape[1])
            fresh = torch.empty(client.rank, A.shape[1]).uniform_(-bound, bound, generator=rng)
            A = torch.cat([torch.where(alive[:, None], A, fresh[:n]), fresh[n:]])
            B = torch.cat([torch.where(alive, B, 0.0), torch.zeros(B.shape[0], client.rank - n)], 1)
        return LowRank(B, A, client.scale), drawn

    def aggregate(self, state: Any, updates: Updates, advance: Advance = fedavg) -> FedViewState:
        mean, clients, behind = ProductMean(), dict(state.clients), []
        known: dict[Hashable, tuple[Tensor, dict[str, Tensor], float]] = {}  # by the view, and what was sent
        for update in updates:
            mean.add_change(update.weight, update)
            k = update.client.client
            if k < 0:  # the sum that privacy releases is of no client
                continue
            key = _key(state, k), id(update.start)
            if key not in known:
                view = _view(state, k)
                if self.start != "correction":
                    merge = self.broadcast(state, update.client).merge
                    view = extended(view, {} if merge is None else merge.layers)
                view = extended(view, update.sent.layers)
                _remember(known, key, (update.start, as_tensors(view), _distance(state, view)))
            _, clients[k], distance = known[key]
            behind.append(distance)
        layers = {name: advance(f"W.{name}", W, mean.matrix(name)) for name, W in state.matrices.items()}
        head = mean.head()
        report = {"view_error": sum(behind) / len(behind)} if behind else {}
        return state.next_with_head(advance, head, layers=layers, clients=clients, report=report)


def _view(state: FedViewState, client: int) -> dict[str, Change]:
    """The client's view by layer; empty if the client takes part for the first time."""
    return as_view(state.clients.get(client, {}))


def _key(state: FedViewState, client: int) -> Hashable:
    """Equal for clients of equal views."""
    stored = state.clients.get(client)
    return stored if isinstance(stored, Hashable) else id(stored)


def _remember(found: dict[Any, Any], key: Hashable, value: object) -> None:
    """Adds the value as the most recent one, of at most `RECENT`."""
    found[key] = value
    if len(found) > RECENT:
        del found[next(iter(found))]


def _triples(state: FedViewState, client: Profile, view: Mapping[str, Change]) -> dict[str, tuple[Spectrum, float]]:
    """By layer the leading singular triples of W - V_k, and the size up to which a singular value is a rounding error.

    Clients of equal views and ranks share them.
    """
    key = _key(state, client.client), client.rank
    found = state.triples.pop(key, None) or {}
    for name, W in state.matrices.items() if not found else ():
        V = view.get(name)
        noise = TINY * (state.norms[name] + (0.0 if V is None else norm(V)))
        # Two passes are enough where four are usual: what they miss of a correction is in the next one.
        found[name] = top_svd(lacking(W, V), client.rank, iterations=2), noise
    _remember(state.triples, key, found)
    return found


def _distance(state: FedViewState, view: Mapping[str, Change]) -> float:
    """``||W - V_k|| / ||W||`` over all layers: what the client's model lacked of the global one as it trained."""
    lacks = math.hypot(*(norm(lacking(state.matrices[name], V)) for name, V in view.items()))
    whole = math.hypot(*(state.norms[name] for name in view))
    return lacks / whole if whole else 0.0
