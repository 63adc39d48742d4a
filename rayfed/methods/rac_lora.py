"""RAC-LoRA (Malinovsky et al., arXiv 2410.08305): blocks, each with a fresh random A; B trains from 0, and is merged.

    block begins    A drawn from the run's seed, layer and round;  B = 0
    each round      B <- B + sum_k p_k (s_k / s) [dB_k | 0]         FFA-LoRA's round: exact, ranks nested in A's rows
    block ends      W <- W + s B A                                  merged into the base; the next block begins

A single block moves W within the rows of one A only; the chain reaches what no frozen A can.

Up: r_k out entries a layer. Down: the head alone when a block begins, for A comes from the seed and B is 0; later in a
block B's first r_k columns too. A block's end is news for every client: ``s B``, r_max out entries a layer, A known.

The equations come from a collection; the paper's own text was not at hand. A block of several rounds is our reading:
averaging B again over one A before the merge. As a new A gives B's entries a new meaning, no server optimizer with
momentum may act on them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayfed.errors import allowed
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import add
from rayfed.methods._state import Global, pairs
from rayfed.methods.base import Advance, Profile, Start, Update, fedavg
from rayfed.methods.ffa_lora import FFALoRA
from rayfed.methods.flora import fresh_A


@dataclass(frozen=True)
class RACLoRA(FFALoRA):
    """Train B over a random A, merge, redraw A."""

    block_rounds: int = 1
    """Rounds on one draw of A, 1 or more; from the second on, B is averaged and sent again. The default is ours."""

    optimizers = ("fedavg", "sgd")

    def __post_init__(self) -> None:
        if self.block_rounds < 1:
            raise allowed("method.block_rounds", self.block_rounds, "it must be 1 or more")

    def init(self, adapter: Adapter, seed: int) -> Global:
        base = {name: torch.zeros(pair.B.shape[0], pair.A.shape[1]) for name, pair in adapter.layers.items()}
        return replace(super().init(adapter, seed), base=base, notes={"seed": seed})

    def broadcast(self, state: Global, client: Profile) -> Start:
        start = super().broadcast(state, client)
        known = ("A", "B") if state.rounds % self.block_rounds == 0 else ("A",)
        return replace(start, known=start.layout.mask(*known), base=state.base)

    def aggregate(self, state: Global, updates: Iterable[Update], advance: Advance = fedavg) -> Global:
        state = replace(super().aggregate(state, updates, advance), extras={})
        return state if state.rounds % self.block_rounds else self._merged(state)

    def _merged(self, state: Global) -> Global:
        layers, base, news = {}, {}, []
        for name, pair in sorted(pairs(state).items()):
            sent = LowRank(pair.scale * pair.B, pair.A, 1.0)
            news.append(sent.B.reshape(-1))
            base[name] = add(state.base[name], sent)
            A = fresh_A(state.notes["seed"], name, state.rounds, pair.rank, pair.A.shape[1])
            layers[name] = LowRank(torch.zeros_like(pair.B), A, pair.scale)
        return replace(state, layers=layers, base=base, extras={"news": torch.cat(news) if news else torch.zeros(0)})

    def base_update(self, state: Global) -> Tensor | None:
        return state.extras.get("news")

    def delta(self, state: Global, layer: str) -> Tensor:
        return add(state.base[layer], pairs(state)[layer])
