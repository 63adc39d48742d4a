"""FedHL (arXiv 2505.18494): a full-rank global change, truncated for each client and calibrated for the truncation.

The server keeps a matrix W (out, in) per layer, 0 at first: the LoRA change, never the pretrained weight. In a round

    W^r = best rank-r approximation of W            down: r (out + in) entries, as factors
    W_i = s_i B_i A_i                               what client i of rank r_i trained from W^{r_i}; up: its factors
    W  <- advance(W, sum_i p_i (W_i - W^{r_i}))     W^{r_i} as the client decoded it

so truncation costs a client accuracy in where it starts and costs W nothing: without local training it stays as it is,
bit for bit, whatever the ranks; with all r_i >= rank(W) it is the exact mean of products. W being dense, its gauge is
fixed and any server optimizer may act on it. Clients are weighted against the truncation they suffered,

    e_i = sum over layers ||W - W^{r_i}||_F^2,      p_i = (e_i^gamma + eps)^-1 / sum_j (e_j^gamma + eps)^-1

and the head is averaged with the same p_i. A client that loses nothing (e_i = 0) can take nearly all the weight:
`weights_max` and `effective_cohort`, 1 / sum p_i^2, are among the metrics. A rank that has nothing to carry starts from
B = 0 and its row of the run's first A, which is all ranks in round 0.

Of the paper only the abstract was at hand. The rules come from an independent
implementation that quotes the paper's Eq. 8, Theorem 3 and Eq. 15: the square in gamma = 2 is the literal reading of
Eq. 15 over Eq. 8, gamma = 1 is what minimises ``sum p_i^2 e_i`` on the simplex. The calibration of a layer is one
product of stacked factors; only r_max singular triples and the energy of W are computed, once a round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from rayfed.errors import allowed
from rayfed.lora.adapter import Adapter
from rayfed.methods._state import Global, ProductMean, advance_head, product_change
from rayfed.methods._truncation import Truncating, decomposed, truncation_report
from rayfed.methods.base import Advance, Update, fedavg


@dataclass(frozen=True)
class FedHL(Truncating):
    """Truncations down, calibrated averaging; any ranks, any server optimizer."""

    gamma: float = 2.0
    """Power of the truncation error in the weights: 2 reads the paper literally, 1 minimises the error of the mean, 0
    ignores the error; 0 or more."""
    eps: float = 1e-6
    """Keeps the weight of a client without truncation error finite; over 0. The default is that implementation's."""
    data: Literal["ignore", "examples"] = "ignore"
    """Whether weights grow with the data too: not in Eq. 15; or they are multiplied by the server's weights, which are
    the clients' numbers of examples unless `server.weights` says otherwise."""
    split: Literal["sqrt", "b"] = "sqrt"
    """Where the singular values go: their roots in B and in A, or all in B, which diverges at lower local rates (0.02
    against 0.05 in a pilot on the problem with a known answer)."""

    optimizers = ("fedavg", "sgd", "fedavgm", "fedadam", "adamw")

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise allowed("method.gamma", self.gamma, "it must be 0 or more, and finite")
        if not 0 < self.eps < math.inf:
            raise allowed("method.eps", self.eps, "it must be over 0, and finite")

    def init(self, adapter: Adapter, seed: int) -> Global:
        start = super().init(adapter, seed)
        return decomposed(start, {name: pair.dense() for name, pair in adapter.layers.items()})

    def aggregate(self, state: Global, updates: Iterable[Update], advance: Advance = fedavg) -> Global:
        total, weights, ranks = ProductMean(), [], []
        for update in updates:
            ranks.append(update.client.rank)
            weights.append(self._weight(state, update))
            total.add(weights[-1], Adapter({}, update.layout.unflatten(update.change).head))
            for name, pair in product_change(update).items():
                total.add_pair(name, weights[-1], pair)
        layers = {}
        for name, W in state.layers.items():
            assert isinstance(W, Tensor)
            layers[name] = advance(f"W.{name}", W, total.matrix(name))
        head = advance_head(state.head, total.head(), advance)
        shares = [weight / total.weight for weight in weights]
        report = truncation_report(state, ranks) | {
            "weights_max": max(shares),
            "effective_cohort": 1 / math.fsum(share**2 for share in shares),
        }
        state = replace(state, head=head, rounds=state.rounds + 1, report=report)
        # Half the usual passes do: W loses nothing by a truncation that is not quite the best.
        return decomposed(state, layers, passes=2)

    def _weight(self, state: Global, update: Update) -> float:
        """p_i, before it is divided by the cohort's sum. An update that the server gives no weight has none here."""
        error = float(state.extras["errors"][update.client.rank])
        data = update.weight if self.data == "examples" else float(update.weight > 0)
        return data / (error**self.gamma + self.eps)
