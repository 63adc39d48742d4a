"""FedSRD (Yan et al., arXiv 2510.04601), our reading: sparse uploads, a full-rank mean, sparse projected downloads.

1. Sparsify. A client trains both factors. It uploads the entries of its changes dB_k, dA_k that move the weights most.
   An entry's importance is the norm of the change of the weights that it stands for:

       I(dB[u, v]) = s |dB[u, v]| ||A[v, :]||        I(dA[u, v]) = s |dA[u, v]| ||B_k[:, u]||

   The largest over all layers go up, as many as `wire.up.density` allows; of the head the largest changes, the same
   share.
2. Reconstruct. The server forms the products of what arrived. (B, A) is where the clients started:

       D = sum_k p_k s (B_k A_k - B A) = sum_k p_k s (dB_k A + B_k dA_k)

3. Decompose. D becomes a change of one factor by least squares. The other factor is fixed; they alternate from round 0:

       even rounds    dB = argmin ||s dB A - D||_F = D A^+ / s        odd rounds    dA = B^+ D / s

   B goes first, since B^+ of the initial B = 0 is 0. Of dB (or dA) and of the head's mean change the most important
   entries stay, the share `density` of each. The global model moves by these, and only these travel down.

The projection is linear. So it is taken client by client with r x r cores, and D is never formed. What either side
prunes is lost: there is no error feedback. What D has outside the fixed factor's span is lost too.

A client has the global model of its last round. It downloads the entries that changed since then; a new client
downloads everything. So each client has a payload of its own, and all start from the server's exact model. No other
sparsity or rounding of downloads may spoil that: `wire.down` stays dense.

Source: abstract only; deviates: the order of steps is the abstract's. The importance (without s, which makes layers of
different scales comparable) comes from a third party's summary. Ours are the pairing of the projection with rounds, one
ranking over all layers, the head's share (in one ranking its early changes would leave no room for B), the catch-up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayfed.config.types import Density
from rayfed.lora.adapter import Adapter, Layout, LowRank
from rayfed.methods import Advance, FactorMean, FactorState, Profile, Start, Updates, fedavg
from rayfed.methods._means import positive
from rayfed.methods.rolora import trained_factor
from rayfed.wire import keep_count, top_k


@dataclass(frozen=True)
class FedSRD(FactorMean):
    """Importance-pruned changes up, one factor's projected and pruned change down."""

    density: Density = 0.1
    """Share of the projected factor's and the head's entries that the server changes and sends. Default: the 90 %
    saving that the abstract claims."""

    paper = "arXiv 2510.04601"
    summary = "important changes up, one factor's projected change down (our reading)"
    traffic_down = "density r out or in, missed rounds too"
    traffic_up = "d_up r (in + out)"
    source = "abstract only"
    optimizers = ("fedavg",)
    sparse_down = False
    personal = True
    refuses_privacy = "it sums projections of the updates, which the clipping of the updates does not bound"

    def init(self, adapter: Adapter, seed: int) -> FactorState:
        state = super().init(adapter, seed)
        return replace(state, extras={"changed": torch.zeros(state.layout.size, dtype=torch.int32)})

    def broadcast(self, state: FactorState, client: Profile) -> Start:
        start = super().broadcast(state, client)
        if client.client not in state.clients:
            return start
        return replace(start, known=state.extras["changed"] <= state.clients[client.client]["seen"])

    def select(self, start: Tensor, change: Tensor, layout: Layout, budget: int, density: float) -> Tensor:
        score = importance(layout.unflatten(start), layout.unflatten(start + change), change)
        return _largest(score, layout, budget, density)

    def aggregate(self, state: FactorState, updates: Updates, advance: Advance = fedavg) -> FactorState:
        factor, layout = trained_factor(state), state.layout
        current = layout.unflatten(state.vector)
        fixed = {name: pair.A if factor == "B" else pair.B for name, pair in current.layers.items()}
        # Singular values under float32's rounding of the factor are noise, and would be divided by.
        inverse = {name: torch.linalg.pinv(matrix.double(), rtol=1e-6) for name, matrix in fixed.items()}
        total = torch.zeros(layout.size, dtype=torch.float64)
        sums, weights, clients = layout.unflatten(total), 0.0, dict(state.clients)  # sums: views of total
        for update in updates:
            moved = update.moved
            for name, pair in update.sent.layers.items():
                core = _projected(pair, moved.layers[name], inverse[name], factor)
                (sums.layers[name].B if factor == "B" else sums.layers[name].A).add_(core, alpha=update.weight)
            for name, tensor in moved.head.items():
                sums.head[name].add_(tensor, alpha=update.weight)
            weights += update.weight
            clients[update.client.client] = {"seen": torch.tensor(state.rounds, dtype=torch.int32)}
        change = (total / positive(weights)).float()
        pruned, share = self._prune(change, current, layout, factor)
        vector = advance("vector", state.vector, pruned)
        changed = torch.where(vector != state.vector, state.rounds + 1, state.extras["changed"])
        return state.next(vector=vector, extras={"changed": changed}, clients=clients, report={"energy_kept": share})

    def _prune(self, change: Tensor, current: Adapter, layout: Layout, factor: str) -> tuple[Tensor, float]:
        """The most important entries of the server's change, zeros elsewhere; and their share of sum importance^2."""
        score = importance(current, current, change)
        budget = keep_count(int(layout.mask(factor, "head").sum()), self.density)
        chosen = _largest(score, layout, budget, self.density)
        pruned = torch.zeros_like(change)
        pruned[chosen] = change[chosen]
        energy = float(score.double().square().sum())
        return pruned, float(score[chosen].double().square().sum()) / energy if energy else 1.0


def importance(start: Adapter, trained: Adapter, change: Tensor) -> Tensor:
    """How much each entry of ``change`` (n,) moves the weights, (n,): dB with the start's A, dA with the trained B.

    It is finite: what float32 cannot hold, in a run that diverges, becomes its largest number.
    """
    score = change.abs()
    entries = start.layout.unflatten(score)  # views: scaled in place
    for name, pair in entries.layers.items():
        pair.B.mul_(start.layers[name].A.norm(dim=1) * pair.scale)
        pair.A.mul_((trained.layers[name].B.norm(dim=0) * pair.scale)[:, None])
    return score.nan_to_num_()  # NaN: a change of 0 times an infinite norm


def _largest(score: Tensor, layout: Layout, budget: int, density: float) -> Tensor:
    """Sorted indices of the ``budget`` largest scores: in the head its share ``density``, in the factors the rest.

    The head takes more where the factors have fewer entries than that.
    """
    in_head = layout.mask("head")
    head, factors = in_head.nonzero().squeeze(1), (~in_head).nonzero().squeeze(1)
    share = min(max(int(density * head.numel()), budget - factors.numel()), budget)
    best = [head[top_k(score[head], share)], factors[top_k(score[factors], budget - share)]]
    return torch.cat(best).sort().values


def _projected(sent: LowRank, moved: LowRank, inverse: Tensor, factor: str) -> Tensor:
    """One client's ``(dB A + B_k dA) A^+`` (out, r), or ``B^+ (dB A + B_k dA)`` (r, in), float64."""
    B, A, dB, dA = (tensor.double() for tensor in (sent.B, sent.A, moved.B, moved.A))
    if factor == "B":
        return dB @ (A @ inverse) + (B + dB) @ (dA @ inverse)
    return (inverse @ dB) @ A + (inverse @ (B + dB)) @ dA
