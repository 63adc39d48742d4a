"""LoRA-A2 (Koo, Jang and Ok, arXiv 2410.22815): RoLoRA's alternation, and each client uploads only its best ranks.

Even rounds train B with A frozen, odd rounds A with B frozen (rounds count from 0), as in `rolora`. A client scores
every rank j of every layer by how far its training moved the product:

    even rounds    S_j = s ||dB[:, j] A[j, :]||_F        odd rounds    S_j = s ||B[:, j] dA[j, :]||_F

It ranks them over the whole model, and uploads the changes of the best ones that fit into its budget, the share
`wire.up.density` of what it could upload. A rank goes up whole or not at all, unless the budget is too small for any:
then the largest entries go up, so that something does. The server averages masked changes,

    B <- B + sum_k p_k (dB_k masked)        a rank that a client did not send counts as 0

and that is again the exact mean of the products of what arrived. B learns faster than A, by a factor of 5. Clients of
different budgets have one rank and different densities.

Source: secondary; deviates: in the paper clients choose the ranks that they train. Here all ranks train, and the choice
is made by the change to be sent. Ours are the head's part of the budget (`head_budget`), that a rank that does not fit
is skipped for the next best one that does, and what goes up where none fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from rayfed.lora.adapter import Adapter, Layout
from rayfed.methods import Advance, ChangeMean, FactorState, Profile, Trainable, Updates, fedavg
from rayfed.methods.rolora import RoLoRA
from rayfed.wire import top_k


@dataclass(frozen=True)
class LoRAA2(RoLoRA):
    """RoLoRA with a mask of ranks per client."""

    rate_B: PositiveFloat = 5.0
    """B's learning rate as a multiple of the client's, which is A's. Default: the paper's."""
    head_budget: Literal["share", "whole"] = "share"
    """How the head counts in a sparse upload. `share`: its largest entries, up to its share of the budget. `whole`: all
    of it, before any rank. Default: share, since a large head would leave no room for ranks."""

    paper = "arXiv 2410.22815"
    summary = "alternate A and B; each client sends its best ranks"
    traffic_up = "d_up r out or in"
    sum_in_worker = False  # it counts the ranks that each client sent

    def trainable(self, state: FactorState, client: Profile) -> Trainable:
        return replace(super().trainable(state, client), rates={"B": self.rate_B})

    def select(self, start: Tensor, change: Tensor, layout: Layout, budget: int, density: float) -> Tensor:
        in_head = layout.mask("head")
        entries = int(in_head.sum())
        wanted = entries if self.head_budget == "whole" else int(density * entries)
        chosen = torch.zeros(layout.size, dtype=torch.bool)
        chosen[top_k(torch.where(in_head, change, 0.0), min(wanted, budget))] = True
        chosen &= in_head  # where fewer entries changed than it may take, a top-k takes entries elsewhere
        room = budget - int(chosen.sum())
        ranks = _ranks(layout.unflatten(start), layout.unflatten(change))
        marks = layout.unflatten(chosen)  # views: what is marked there is chosen
        for _, name, part, j in sorted(ranks, key=lambda rank: -rank[0]):  # stable: ties by layer, then j
            line = marks.layers[name].B[:, j] if part == "B" else marks.layers[name].A[j]
            if line.numel() <= room:
                line.fill_(True)
                room -= line.numel()
        if chosen.any():
            return chosen.nonzero().squeeze(1)
        largest = top_k(change, budget)
        return largest[change[largest] != 0]

    def aggregate(self, state: FactorState, updates: Updates, advance: Advance = fedavg) -> FactorState:
        mean, sent = ChangeMean(state.layout.size), []
        for update in updates:
            mean.add(update)
            sent.append(_share_of_ranks(update.moved))
        state = self.step(state, mean.mean(), advance)
        return replace(state, report={"ranks_sent": sum(sent) / len(sent)})


def _ranks(start: Adapter, change: Adapter) -> list[tuple[float, str, str, int]]:
    """(score, layer, part that changed, j) of every rank that changed, by layer and j."""
    ranks: list[tuple[float, str, str, int]] = []
    for name, pair in start.layers.items():
        moved = change.layers[name]
        # The norm of an outer product is the product of norms, and one of the two factors did not change.
        for part, scores in (
            ("B", moved.B.double().norm(dim=0) * pair.A.double().norm(dim=1)),
            ("A", pair.B.double().norm(dim=0) * moved.A.double().norm(dim=1)),
        ):
            ranks += [(pair.scale * s, name, part, j) for j, s in enumerate(scores.tolist()) if s > 0]
    return ranks


def _share_of_ranks(change: Adapter) -> float:
    """The share of all ranks that changed."""
    moved = [(pair.B != 0).any(dim=0) | (pair.A != 0).any(dim=1) for pair in change.layers.values()]
    return float(torch.cat(moved).double().mean()) if moved else 0.0
