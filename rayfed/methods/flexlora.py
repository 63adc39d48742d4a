"""FlexLoRA (arXiv 2402.11505): average the products, send every client an SVD of its own rank.

    D      = sum_k p_k s_k B_k A_k         the global change, exact: kept as a stack of factors or as a matrix
    U S V^T = SVD(D)
    client k starts from  B = U_r S_r / s_k,  A = V_r^T,  with r = r_k

Traffic is r_k (in + out) entries a layer both ways. The average is exact; its redistribution is not: a client of rank
r_k returns none of the triples past r_k, so that without local training singular value j becomes q_j times what it was,
q_j the weight of the clients that have it. `FedHL` calibrates that away, `raFLoRA` reweights it.

Where a download is sparse or rounded, client k counts with the truncation it was meant to get plus what it learned, its
trained product less the one it decoded: D forgets what is not sent for a rank, never what is not sent for the wire.
That rule is ours, and with a dense float32 download it is the equation above. Momentum across an SVD has no meaning:
the server step is the plain one. No options. The equations come from a collection; the paper's own text was
not at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rayfed.lora.adapter import Adapter
from rayfed.methods._state import Global, ProductMean, advance_head
from rayfed.methods._truncation import Meant, Truncating, decomposed, truncation_report
from rayfed.methods.base import Advance, Update, fedavg


@dataclass(frozen=True)
class FlexLoRA(Truncating):
    """The mean of products, redistributed by SVD. No options."""

    def aggregate(self, state: Global, updates: Iterable[Update], advance: Advance = fedavg) -> Global:
        total, meant, ranks = ProductMean(), Meant(self, state), []
        for update in updates:
            ranks.append(update.client.rank)
            total.add(update.weight, Adapter({}, update.layout.unflatten(update.change).head))
            for name, pair in meant.trained_product(update).items():
                total.add_pair(name, update.weight, pair)
        head = advance_head(state.head, total.head(), advance)
        state = replace(state, head=head, rounds=state.rounds + 1, report=truncation_report(state, ranks))
        return decomposed(state, {name: total.layer(name) for name in state.layers})
