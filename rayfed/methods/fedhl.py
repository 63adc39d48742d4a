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

These weights depend on the size of W: they are uniform while W is small, and later one client can take nearly all. So
there are three options, derived here:

- ``relative``: p_i ~ (e_i / ||W||_F^2 + eps)^-gamma, whatever the size of W. The weights are uniform while W = 0.
  ``eps`` is then the share of W's energy that counts as no loss: 0.1 to 1 keeps the weights within
  (1 + 1 / eps)^gamma of one another.
- ``min_cohort``: the weights are raised to a power below 1, so that 1 / sum p_i^2 is at least this share of what it is
  without errors. The order of the clients stays.
- ``error: sent``: W^{r_i} in e_i is what client i decoded, after masks and rounding.

Source: secondary; deviates: the rules come from an independent implementation that quotes the paper's Eq. 8, Theorem 3
and Eq. 15, and from the abstract. gamma = 2 is the literal reading of Eq. 15 over Eq. 8. gamma = 1 minimises
``sum p_i^2 e_i`` on the simplex (derived). Only r_max singular triples and the energy of W are computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from rayfed.lora.adapter import Adapter
from rayfed.lora.algebra import norm
from rayfed.methods import ANY_OPTIMIZER, Advance, LayerState, ProductMean, Update, Updates, fedavg
from rayfed.methods._means import positive
from rayfed.methods._truncation import Truncating, decomposed, truncation_error


@dataclass(frozen=True)
class FedHL(Truncating):
    """Truncations down, an unbiased mean; any ranks, any server optimizer."""

    gamma: NonNegativeFloat = 2.0
    """Power of the truncation error in the weights. 2 reads the paper literally, 1 minimises the error of the mean, 0
    ignores the error."""
    eps: PositiveFloat = 1e-6
    """Makes the weight of a client without truncation error finite. Default: the independent implementation's."""
    relative: bool = False
    """Whether errors are shares of W's energy: ``(e_i / ||W||^2 + eps)^-gamma``, not ``(e_i^gamma + eps)^-1``."""
    error: Literal["rank", "sent"] = "rank"
    """Whose error counts. `rank`: the best approximation's of the client's rank. `sent`: that of what it decoded."""
    min_cohort: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Least effective cohort, as a share of the effective cohort that the data weights alone have. 0: no limit."""
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
    refuses_privacy = "its error weights are divided by their sum over the cohort; method.gamma=0 makes them equal"

    @property
    def summed(self) -> Literal["products"] | None:  # type: ignore[override]
        """Without error weights and data weights, the step is the mean of the changes of products."""
        return "products" if self.gamma == 0 and self.data == "ignore" else None

    @property
    def ignores_weights(self) -> str:  # type: ignore[override]
        """With `data: examples` its error weights are multiplied by the server's."""
        return "" if self.data == "examples" else "it has error weights; method.data=examples multiplies them by these"

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        return decomposed(super().init(adapter, seed), {name: pair.dense() for name, pair in adapter.layers.items()})

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        mean, power = ProductMean(), 1.0
        if self.min_cohort:
            updates = list(updates)  # the power depends on all clients
            power = self._power(state, updates)
        for update in updates:
            weight = self._data(update) / self._penalty(state, update) ** power
            mean.add_change(weight, update)
        layers = {name: advance(f"W.{name}", W, mean.matrix(name)) for name, W in state.matrices.items()}
        report = mean.weights_report() | ({"weights_power": power} if self.min_cohort else {})
        # Half the usual passes are enough: W loses nothing if a truncation is not quite the best.
        return self.next(state, mean, advance, layers, passes=2, **report)

    def _data(self, update: Update) -> float:
        """The client's weight without errors. It is 0 if the server gives the update no weight."""
        return update.weight if self.data == "examples" else float(update.weight > 0)

    def _penalty(self, state: LayerState, update: Update) -> float:
        """What the client's weight is divided by because of its error."""
        error = truncation_error(state, update.client.rank) if self.error == "rank" else _error_of_sent(state, update)
        if not self.relative:
            return error**self.gamma + self.eps
        energy = truncation_error(state, 0)
        return (error / energy + self.eps) ** self.gamma if energy else 1.0

    def _power(self, state: LayerState, updates: Sequence[Update]) -> float:
        """The power, from 0 to 1, of the penalties at which the effective cohort is `min_cohort`; 1 if it is larger."""
        data = [self._data(update) for update in updates]
        logs = [math.log(self._penalty(state, update)) for update in updates]
        least = min(logs)  # the division by the smallest penalty keeps the exponentials from overflow

        def cohort(power: float) -> float:
            weights = [weight * math.exp(power * (least - log)) for weight, log in zip(data, logs)]
            return positive(math.fsum(weights)) ** 2 / math.fsum(weight**2 for weight in weights)

        enough = self.min_cohort * cohort(0.0)
        if cohort(1.0) >= enough:
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if cohort(middle) >= enough else (low, middle)
        return low


def _error_of_sent(state: LayerState, update: Update) -> float:
    """``sum over layers ||W - s B A||_F^2`` for the factors that the client decoded; 0 if there are no layers."""
    return math.fsum(norm(W - update.sent.layers[name].dense()) ** 2 for name, W in state.matrices.items())
