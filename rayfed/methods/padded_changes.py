"""Zero-padded changes (Kuo et al., arXiv 2406.05233): FLASC's baseline for clients of different ranks.

A client of rank r_k starts from the first r_k ranks of the global factors. What it lacks, it leaves unmoved:

    down     B_k, A_k = the first r_k ranks of B, A
    up       dB_k, dA_k, padded with zeros to the largest rank
    server   B <- advance(B, sum_k p_k dB_k),   A <- advance(A, sum_k p_k dA_k),   the head likewise

A rank that few clients have moves slowly, but does not shrink: `HetLoRA` averages padded values, which shrink, and
`RBLA` divides by the weight of the clients that have the rank. Any server optimizer may act on B and A. Its moments and
weight decay move ranks that no client of the round has. The paper calls this HetLoRA. Traffic is r_k (in + out) entries
a layer both ways. No options.

In the paper's code all clients have the scale of the largest rank: `profiles.scale=server`. With scales of their own,
`rayfed.methods._nested_ranks` says how they count.

Source: authors' code read; deviates: nothing, with `profiles.scale=server`, dense messages and
`server.empty_clients=true`. tests/methods/test_flasc_variants.py has a dense reference.
"""

from __future__ import annotations

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import ANY_OPTIMIZER, Advance, LayerState, Updates, fedavg
from rayfed.methods._nested_ranks import Nested, RankwiseMean


class PaddedChanges(Nested):
    """Average the changes of nested ranks; a rank that a client lacks did not change. No options."""

    paper = "arXiv 2406.05233"
    summary = "truncate; the mean of zero-padded changes; any server optimizer"
    traffic_down = traffic_up = "r_k (in + out)"
    source = "authors' code read"
    weights = "uniform"
    optimizer = "adamw"
    optimizers = ANY_OPTIMIZER
    fixed_gauge = True
    secure_aggregation = True
    summed = "changes"

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        return LayerState(layers=dict(adapter.layers), head=dict(adapter.head))

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        sums = RankwiseMean(state)
        for update in updates:
            sums.add(update.weight, update)
        layers = {}
        for name, pair in state.pairs.items():
            B, A, _ = sums.means(name)
            layers[name] = LowRank(
                advance(f"B.{name}", pair.B, B.float()), advance(f"A.{name}", pair.A, A.float()), pair.scale
            )
        return state.next_with_head(advance, sums.head(), layers=layers)
