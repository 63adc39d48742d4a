"""FedGLOMO (Das et al. 2022, arXiv 2012.04061): momentum at the server and at the clients that reduces variance.

  w_k: the model of round k, w_{-1} = w_0.  r clients a round.  b = `beta`

  server   sends w_k and w_{k-1}
  client   g  = w_k     - its end of E steps from w_k
           gh = w_{k-1} - its end of E steps from w_{k-1}, on the same batches with the same dropout
           v_t = grad(w_t; B_t) + rho (v_{t-1} - grad(w_{t-1}; B_t)),  v_0 = grad(w_0; B_0);  w_{t+1} = w_t - lr v_t
  up       g - (1 - b) gh, or g and g - gh                in the first round g
  server   u_k = b mean(g) + (1 - b) u_{k-1} + (1 - b) mean(g - gh),   u_0 = mean(g),   w_{k+1} = w_k - u_k

Each local step takes four gradients: two trajectories, each at its present and at its last point; with rho 0 two. With
beta 1 only the local step is left (FedLOMO). With full gradients in all steps and all clients in all rounds it is
FedAvg, whatever beta and rho are. A decaying rate is `client.schedule`; the authors use 0.99^k.

The paper quantises g and g - gh and sends both; without a quantiser one vector holds all that the server needs (its
appendix C), for g - (1 - b) gh = b g + (1 - b) (g - gh). With a quantiser that is unbiased and has the variance
q ||x||^2, one vector has at most twice the variance of two (derived here). Formats that round to the nearest value are
not unbiased, which the theory does not cover.

Source: paper read; deviates: v_0 is the gradient of the first batch, in place of a larger one. Weight decay acts beside
v. `client.clip_norm` must be null.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rayfed.config.types import Fraction
from rayfed.objectives._stateful import ClientRound, Message, Received, Stateful


@dataclass(frozen=True)
class FedGlomo(Stateful):
    """Two trajectories a client, and a server step of its own."""

    beta: Annotated[float, Field(gt=0, le=1)] = 0.2
    """b, the share of the new moves in the server's step. The paper uses 0.2; 1: no momentum at the server."""
    rho: Fraction = 0.8
    """Damping of the local estimate. The paper uses 0.8 for clients that differ, and 1 in its theory; 0: plain SGD."""
    vectors: Literal["one", "two"] = "one"
    """What goes up. `one`: g - (1 - b) gh; `two`: g and g - gh, as in the paper with a quantiser. Without rounding on
    the wire both give the same model."""

    server_weights = "uniform"
    server_optimizers = ("fedavg",)
    plain_sgd = "has a local step of its own"
    dense_down = "the two models that it sends must have one mask"
    dense_up = "its momentum needs the whole difference of two trajectories"

    def twin(self, client: ClientRound) -> Tensor | None:
        previous = client.received.vector
        return None if previous is None else torch.where(client.uploaded, previous, client.start)

    @property
    def estimates(self) -> bool:
        return self.rho > 0

    def estimate(self, gradient: Tensor, before: Tensor, last: Tensor) -> Tensor:
        return gradient + self.rho * (last - before)

    def combined(self, client: ClientRound, trained: Tensor, twin: Tensor) -> Tensor:
        moved = self._moved(client, twin)
        if self.vectors == "one":
            return trained - (1 - self.beta) * moved
        return trained if bool(moved.isfinite().all()) else moved

    def message(self, client: ClientRound, trained: Tensor, steps: int, twin: Tensor | None = None) -> Message:
        if self.vectors == "one" or twin is None:
            return Message()
        return Message(trained - client.start - self._moved(client, twin))

    def _moved(self, client: ClientRound, twin: Tensor) -> Tensor:
        """-gh: the change of the second trajectory."""
        start = self.twin(client)
        assert start is not None
        return twin - start

    @property
    def changes_uploads(self) -> bool:
        return self.vectors == "two"

    def changed(self, change: Tensor, message: Message) -> Tensor:
        return change if message.vector is None else self.beta * change + (1 - self.beta) * message.vector

    def send(self, state: Mapping[str, Tensor]) -> Message:
        return Message(state.get("previous"))

    def advance(self, state: dict[str, Tensor], name: str, value: Tensor, change: Tensor) -> Tensor:
        last = state.get(f"u.{name}")
        state[f"u.{name}"] = change if last is None else change + (1 - self.beta) * last
        return value + state[f"u.{name}"]

    def absorb(
        self, state: Mapping[str, Tensor], received: Received, start: Tensor, population: int
    ) -> dict[str, Tensor]:
        return {**state, "previous": start}
