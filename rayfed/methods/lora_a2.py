"""LoRA-A2 (Koo, Jang and Ok, arXiv 2410.22815): RoLoRA's alternation, and each client uploads only its best ranks.

Even rounds train B under a frozen A, odd ones A under a frozen B (rounds count from 0), as in `rolora`. A client
scores every rank j of every layer by how far its training moved the product,

    even rounds    S_j = s ||dB[:, j] A[j, :]||_F        odd rounds    S_j = s ||B[:, j] dA[j, :]||_F

ranks them over the whole model, and uploads the changes of the best ones that fit into its budget, the share
`wire.up.density` of what it could upload. A rank goes up whole or not at all. The server averages masked changes,

    B <- B + sum_k p_k (dB_k masked)        a rank that a client did not send counts as 0

which is again the exact mean of the products of what arrived. B learns faster than A, by a factor of 5.

Clients of different budgets have one rank and different densities. The equations are collected facts, not the paper's
text; the paper lets clients choose their ranks for local training, here all ranks train and the choice is made by the
change that is to be sent. Open in the source and our choice: the head's part of the budget (`head_budget`), and that a
rank which does not fit is passed over for the next best that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, Layout
from rayfed.methods._factor_mean import FactorState
from rayfed.methods.base import Advance, Profile, Trainable, Update, fedavg
from rayfed.methods.rolora import RoLoRA
from rayfed.wire import top_k


@dataclass(frozen=True)
class LoRAA2(RoLoRA):
    """RoLoRA with a mask of ranks per client."""

    rate_B: float = 5.0
    """B's learning rate as a multiple of the client's, which is A's; over 0. Default: the paper's."""
    head_budget: Literal["share", "whole"] = "share"
    """How the head counts in a sparse upload: its largest entries up to its share of the budget, or whole before any
    rank. Default: share, for a large head would leave no room for ranks."""

    sum_in_worker = False  # it counts the ranks that each client sent

    def __post_init__(self) -> None:
        if not 0 < self.rate_B < float("inf"):
            raise UserError(f"method.rate_B: got {self.rate_B}, but any number over 0 is allowed")

    def trainable(self, state: FactorState, client: Profile) -> Trainable:
        return replace(super().trainable(state, client), rates={"B": self.rate_B})

    def select(self, start: Tensor, change: Tensor, layout: Layout, budget: int, density: float) -> Tensor:
        in_head = layout.mask("head")
        entries = int(in_head.sum())
        wanted = entries if self.head_budget == "whole" else int(density * entries)
        chosen = torch.zeros(layout.size, dtype=torch.bool)
        chosen[top_k(torch.where(in_head, change, 0.0), min(wanted, budget))] = True
        chosen &= in_head  # a top-k among fewer changes than it may take would fill up elsewhere
        room = budget - int(chosen.sum())
        ranks = _ranks(layout.unflatten(start), layout.unflatten(change))
        marks = layout.unflatten(chosen)  # views: what is marked there is chosen
        for _, name, part, j in sorted(ranks, key=lambda rank: -rank[0]):  # stable: ties by layer, then j
            line = marks.layers[name].B[:, j] if part == "B" else marks.layers[name].A[j]
            if line.numel() <= room:
                line.fill_(True)
                room -= line.numel()
        return chosen.nonzero().squeeze(1)

    def aggregate(self, state: FactorState, updates: Iterable[Update], advance: Advance = fedavg) -> FactorState:
        sent: list[float] = []
        state = super().aggregate(state, _counting(updates, sent), advance)
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


def _counting(updates: Iterable[Update], sent: list[float]) -> Iterator[Update]:
    """The same updates; ``sent`` grows by the share of ranks each of them changed."""
    for update in updates:
        change = update.layout.unflatten(update.change)
        moved = [(pair.B != 0).any(dim=0) | (pair.A != 0).any(dim=1) for pair in change.layers.values()]
        sent.append(float(torch.cat(moved).double().mean()) if moved else 0.0)
        yield update
