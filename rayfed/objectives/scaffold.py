"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378): control variates correct the drift of local steps.

  c: the server's control variate, c_i: client i's; both (n,), 0 at first.  S: the cohort.  N: the clients there are

  client   y <- y - lr (g(y) - c_i + c)                  K steps from the w that it received
           c_i+ = c_i - c + (w - y) / (K lr)             option II; K lr is the sum of the rates used
  up       y - w  and  c_i+ - c_i
  server   w <- one step of the server optimizer on mean_S (y - w)
           c <- c + (1/N) sum_S (c_i+ - c_i)             so c is the mean of all c_i

The client stores c_i plus what it sent, as the server decodes it. So c stays the mean of all c_i where the difference
was rounded, or where only its largest entries went up. Both control variates have the entries that the client uploads.

c is a plain mean, so the weights are uniform. Steps must be plain SGD: (w - y) / (K lr) is the mean gradient only then.
Downloads must be dense: the gradient at a sparse w says nothing of the gradient at w. Weight decay counts as a part of
the gradient.

Source: secondary; deviates: nothing known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed.objectives._stateful import ClientRound, Message, Received, Stateful


@dataclass(frozen=True)
class Scaffold(Stateful):
    """Control variates at the server and at every client. No options."""

    server_weights = "uniform"
    plain_sgd = "takes the mean gradient from the change of plain SGD"
    dense_down = "its control variates are gradients at the model that was sent"

    def terms(self, client: ClientRound) -> Mapping[str, Tensor]:
        return {"variates": _received(client) - _own(client)}

    def correction(self, values: Tensor, start: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        return terms["variates"]

    def message(self, client: ClientRound, trained: Tensor, steps: int, twin: Tensor | None = None) -> Message:
        if steps == 0:
            return Message(torch.zeros_like(trained))
        mean = (client.start - trained) / (steps * client.rates)
        return Message(mean - _received(client))

    def store(self, client: ClientRound, sent: Message) -> Tensor:
        assert sent.vector is not None
        return _own(client) + sent.vector

    def send(self, state: Mapping[str, Tensor]) -> Message:
        return Message(state.get("c"))

    def absorb(
        self, state: Mapping[str, Tensor], received: Received, start: Tensor, population: int
    ) -> dict[str, Tensor]:
        assert received.vector is not None
        before = state["c"].double() if "c" in state else 0.0
        return {"c": (before + received.vector / population).float()}


def _received(client: ClientRound) -> Tensor:
    """c. The first round has none, since c is 0."""
    return torch.zeros_like(client.start) if client.received.vector is None else client.received.vector


def _own(client: ClientRound) -> Tensor:
    """c_i. It is 0 before the client takes part."""
    return torch.zeros_like(client.start) if client.stored is None else client.stored
