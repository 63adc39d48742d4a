"""FedHPL (Ma et al. 2024, arXiv 2405.17267): clients train models of their own and learn from each other's logits.

  z: logits (C,) of a row of class y; p_T(v) = softmax(v / T); G: (C, C), row c the global logits of class c

  client   loss = CE(z, y) + lam T^2 KL(p_T(G[y]) || p_T(z))
           after training: l_i[c], the mean of z over its own n_i[c] rows of class c
  server   G[c] <- sum_i n_i[c] l_i[c] / sum_i n_i[c]       over the clients of the cohort that have class c
  up       C, n_i (C,), and l_i of the classes that the client has; down the same of the classes that are known

Adapter and head never leave a client: it goes with `method.name: local` alone. A class that no client of a cohort has
keeps its row of G, and rows of a class that nobody has had yet have no second term; so the first round is plain
training. With lam = 0 it is local training.

A reconstruction [guess]: only the paper's abstract was read. It says that prompts and heads stay with the clients, that
logits travel, and that a weighted mean of them guides local training. Here LoRA takes the place of the prompts. The
equations are those of federated distillation, without what its implementations do wrong: the targets are a distribution
at temperature T, G counts rows, and logits are of the trained model, from a pass over the client's rows after training.
The paper's weights, T and lam are not known, and its clients may have base models of several kinds.

Source: abstract only; deviates: all that the abstract leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from rayfed.config.types import NonNegative
from rayfed.errors import allowed
from rayfed.objectives._by_class import ByClass
from rayfed.objectives._stateful import ClientRound, RunFacts
from rayfed.objectives.base import RowContext


@dataclass(frozen=True)
class FedHPL(ByClass):
    """Distillation from the mean logits of each class, with models that never leave their clients."""

    weight: NonNegative = 1.0
    """lam in the equations; 0 is local training."""
    temperature: Annotated[float, Field(ge=0.01, le=1000)] = 2.0
    """T in the equations."""
    average: Literal["examples", "uniform"] = "examples"
    """How much a client counts in G[c]: by its rows of class c, or as much as every other client that has the class."""

    measures = "outputs"
    variances = False

    def check_run(self, name: str, facts: RunFacts) -> None:
        super().check_run(name, facts)
        if facts.method != "local":
            what = f"{name} sends logits in place of adapters, which stay with their clients: local is allowed"
            raise allowed("method.name", facts.method, what)

    def targets(self, client: ClientRound) -> Tensor | None:
        found = self.received(client)
        if found is None or self.weight == 0:
            return None
        return torch.cat([found.means, found.known.float()[:, None]], 1)  # the last column: whether the class is known

    def rows(self, logits: Tensor, labels: Tensor, slots: Tensor, context: RowContext) -> Tensor:
        losses = cross_entropy(logits, labels, reduction="none")
        if context.targets is None:
            return losses
        own = context.targets[slots, labels]
        wanted = log_softmax(own[:, :-1] / self.temperature, -1)
        found = log_softmax(logits / self.temperature, -1)
        divergence = (wanted.exp() * (wanted - found)).sum(-1)
        return losses + self.weight * self.temperature**2 * own[:, -1] * divergence
