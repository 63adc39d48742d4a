"""FedHL (arXiv 2505.18494): a full-rank global change, truncated for each client, and a mean without truncation bias.

The server stores a matrix W (out, in) per layer, 0 at first: the LoRA change, never the pretrained weight. In a round

    W^r = best rank-r approximation of W            down: r (out + in) entries, as factors
    W_i = s_i B_i A_i                               what client i of rank r_i trained from W^{r_i}; up: its factors
    W  <- advance(W, sum_i p_i (W_i - W^{r_i}))     W^{r_i} as the client decoded it

So truncation costs a client accuracy at its start, and costs W nothing. Without local training W keeps its bits,
whatever the ranks are. If all r_i >= rank(W), the step is the exact mean of products. W is a dense matrix, so any
server optimizer may act on it. A client counts less the more it lost to truncation:

    e_i = sum over layers ||W - W^{r_i}||_F^2,      p_i = (e_i^gamma + eps)^-1 / sum_j (e_j^gamma + eps)^-1

The head is averaged with the same p_i. A client that loses nothing (e_i = 0) can take nearly all the weight; the
metrics `weights_max` and `effective_cohort`, 1 / sum p_i^2, show that. A rank without a singular value starts from
B = 0 and its row of the run's first A. In round 0 all ranks do.

Source: secondary; deviates: the rules come from an independent implementation that quotes the paper's Eq. 8, Theorem 3
and Eq. 15, and from the abstract. gamma = 2 is the literal reading of Eq. 15 over Eq. 8. gamma = 1 minimises
``sum p_i^2 e_i`` on the simplex (derived). Only r_max singular triples and the energy of W are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat

from rayfed.lora.adapter import Adapter
from rayfed.methods import ANY_OPTIMIZER, Advance, LayerState, ProductMean, Update, Updates, fedavg, product_change
from rayfed.methods._truncation import Truncating, decomposed, truncation_error


@dataclass(frozen=True)
class FedHL(Truncating):
    """Truncations down, an unbiased mean; any ranks, any server optimizer."""

    gamma: NonNegativeFloat = 2.0
    """Power of the truncation error in the weights. 2 reads the paper literally, 1 minimises the error of the mean, 0
    ignores the error."""
    eps: PositiveFloat = 1e-6
    """Makes the weight of a client without truncation error finite. Default: the independent implementation's."""
    data: Literal["ignore", "examples"] = "ignore"
    """Whether weights grow with the clients' data. `ignore`: no, as in Eq. 15. `examples`: they are multiplied by the
    server's weights, which are the clients' numbers of examples unless `server.weights` says otherwise."""
    split: Literal["sqrt", "b"] = "sqrt"
    """Where the singular values go. `sqrt`: their roots in B and in A. `b`: all in B, which diverges at lower local
    rates (0.02 against 0.05 on the problem with a known answer)."""

    paper = "arXiv 2505.18494"
    summary = "full-rank global model; unbiased mean, weights that counter truncation"
    traffic_down = traffic_up = "r_k (in + out)"
    source = "secondary"
    optimizers = ANY_OPTIMIZER

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        return decomposed(super().init(adapter, seed), {name: pair.dense() for name, pair in adapter.layers.items()})

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        mean = ProductMean()
        for update in updates:
            mean.add(self._weight(state, update), update, product_change(update))
        layers = {name: advance(f"W.{name}", W, mean.matrix(name)) for name, W in state.matrices.items()}
        # Half the usual passes are enough: W loses nothing if a truncation is not quite the best.
        return self.next(state, mean, advance, layers, passes=2, **mean.weights_report())

    def _weight(self, state: LayerState, update: Update) -> float:
        """p_i, not yet divided by the cohort's sum. It is 0 if the server gives the update no weight."""
        data = update.weight if self.data == "examples" else float(update.weight > 0)
        return data / (truncation_error(state, update.client.rank) ** self.gamma + self.eps)
