"""FlexLoRA (Bai et al., arXiv 2402.11505): average the products, send every client an SVD of its own rank.

    D       = sum_k p_k s_k B_k A_k        the global change, exact: stored as a stack of factors or as a matrix
    U S V^T = SVD(D)
    client k starts from  B = U_r S_r / s_k,  A = V_r^T,  with r = r_k

Traffic is r_k (in + out) entries a layer both ways. The average is exact; its redistribution is not. A client of rank
r_k returns none of the triples after r_k. So without local training singular value j is multiplied by q_j in every
round, where q_j is the weight of the clients that have it. `FedHL` calibrates that, `raFLoRA` reweights it.

If a download is sparse or rounded, client k counts with the truncation of its rank plus its change of the product. So D
loses what a rank leaves out, never what the wire leaves out. With a dense float32 download that is the equation above.
Momentum across an SVD has no meaning: the server step is the plain one. No options.

Source: secondary; deviates: the rule for sparse downloads is ours.
"""

from __future__ import annotations

from rayfed.methods import Advance, LayerState, ProductMean, Updates, fedavg
from rayfed.methods._truncation import Truncating


class FlexLoRA(Truncating):
    """The mean of products, redistributed by SVD. No options."""

    paper = "arXiv 2402.11505"
    summary = "mean of products, redistributed by SVD"
    traffic_down = traffic_up = "r_k (in + out)"
    source = "secondary"
    refuses_privacy = "its next state is a mean of what the clients trained, not of their changes"

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        mean, products = ProductMean(), self.client_products(state)
        for update in updates:
            mean.add(update.weight, update, products(update))
        return self.next(state, mean, advance, {name: mean.layer(name) for name in state.layers})
