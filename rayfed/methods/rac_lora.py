"""RAC-LoRA (Malinovsky et al., arXiv 2410.08305): blocks, each with a fresh random A; B trains from 0 and is merged.

    block begins    A drawn from the run's seed, layer and round;  B = 0
    each round      B <- B + sum_k p_k (s_k / s) [dB_k | 0]         FFA-LoRA's round: exact, ranks nested in A's rows
    block ends      W <- W + s B A                                  merged into the base; the next block begins

p_k is uniform. A single block moves W within the rows of one A; the chain of blocks can reach every W.

Up: r_k out entries a layer. Down: only the head when a block begins, for A comes from the seed and B is 0. Later in a
block B's first r_k columns travel too. When a block ends, every client must merge ``s B``: r_max out entries a layer.
A new A gives B's entries a new meaning, so no server optimizer with momentum may act on them.

Source: secondary; deviates: the authors' code has no federated part. A block of several rounds, which averages B again
over one A before the merge, is our reading. A is uniform where the paper draws Gaussians. The paper's other option
(train A with a random B) is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import PositiveInt

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import add
from rayfed.methods import Advance, LayerState, Profile, Start, Updates, fedavg
from rayfed.methods._base_updates import flat, fresh_A, initial_factors
from rayfed.methods._layers import zero_base
from rayfed.methods.ffa_lora import FFALoRA


@dataclass(frozen=True)
class RACLoRA(FFALoRA):
    """Train B with a random A, merge, redraw A."""

    block_rounds: PositiveInt = 1
    """Rounds with one draw of A. From the second round on, B is averaged and sent again. The default is ours."""

    paper = "arXiv 2410.08305"
    summary = "a fresh frozen A each block; average B, merge, redraw"
    traffic_down = "r out"
    weights = "uniform"
    optimizers = ("fedavg", "sgd")
    mixing = None  # A is drawn anew, and B merged into the base
    refuses_adapter = ""

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        """A given adapter is merged into the base, and the first block's A is drawn."""
        state, merged = super().init(adapter, seed), initial_factors(adapter)
        if not merged:
            return replace(state, base=zero_base(adapter), notes={"seed": seed})
        layers = {
            name: LowRank(torch.zeros_like(pair.B), fresh_A(seed, name, 0, pair.rank, pair.A.shape[1]), pair.scale)
            for name, pair in adapter.layers.items()
        }
        base = {name: pair.dense() for name, pair in merged.items()}
        return replace(state, layers=layers, base=base, extras={"news": flat(merged)}, notes={"seed": seed})

    def broadcast(self, state: LayerState, client: Profile) -> Start:
        start = super().broadcast(state, client)
        known = ("A", "B") if state.rounds % self.block_rounds == 0 else ("A",)
        return replace(start, known=start.layout.mask(*known), base=state.base)

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        state = replace(super().aggregate(state, updates, advance), extras={})
        return state if state.rounds % self.block_rounds else self._merged(state)

    def _merged(self, state: LayerState) -> LayerState:
        layers, base, merged = {}, {}, [torch.zeros(0)]
        for name, pair in sorted(state.pairs.items()):
            sent = LowRank(pair.scale * pair.B, pair.A, 1.0)
            merged.append(sent.B.reshape(-1))
            base[name] = add(state.base[name], sent)
            A = fresh_A(state.notes["seed"], name, state.rounds, pair.rank, pair.A.shape[1])
            layers[name] = LowRank(torch.zeros_like(pair.B), A, pair.scale)
        return replace(state, layers=layers, base=base, extras={"news": torch.cat(merged)})
