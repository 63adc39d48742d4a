"""FedImpro (Tang et al., ICLR 2024, arXiv 2402.07011): the head trains on features drawn from all clients' statistics.

  h: the features of a row, which enter the head f; mu, sig: (C, d), of each class the mean and variance of features

  client   loss = mean CE(f(h), y) + w mean CE(f(hh), yy),      hh ~ N(mu[yy], diag sig[yy])
           after training: mu_i, sig_i, n_i over its own rows, by class
  server   mu[c]  <- sum_i n_i[c] mu_i[c] / sum_i n_i[c]                               over the cohort
           sig[c] <- sum_i n_i[c] (sig_i[c] + (mu_i[c] - mu[c])^2) / sum_i n_i[c]
  up       C, n_i (C,), and mu_i, sig_i of the classes that the client has; down the same of the classes that are known

A batch of b rows gets b // C + 1 samples of each of the C classes that are known; each step draws anew. In a round that
begins without statistics w is 0. A class that no client of a cohort has stays as it was. Features are constants: only
the head has a gradient of their term, and the adapters have the gradient of the task's loss. So nothing is said of an
adapter's entries, and any method and any ranks go. `model.pooling: mean` normalises features with `model.normalize`:
then so are the samples.

The paper splits a ResNet in its middle. In a transformer with adapters the last vector of a row is the head's input.

Source: authors' code read; deviates: a pass over the client's rows after training gives the statistics, in place of
running means over the batches of moving weights; clients count by their rows of a class, and sig holds the spread
between clients (`average: uniform` is the plain mean of the clients that have the class); the weight w is constant,
where the authors raise it by the round; no noise is added to the statistics, and sig has no upper limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rayfed.config.types import NonNegative
from rayfed.errors import allowed
from rayfed.objectives._by_class import ByClass
from rayfed.objectives._stateful import ClientRound
from rayfed.objectives.base import ONE_CLASS
from rayfed.tasks.base import Task

if TYPE_CHECKING:
    from rayfed.config.method import Lora


@dataclass(frozen=True)
class FedImpro(ByClass):
    """The head trains on samples of the features of all clients, too."""

    weight: NonNegative = 1.0
    """w in the equations: the weight of the samples' loss. 0 is plain training."""
    average: Literal["examples", "uniform"] = "examples"
    """How much a client counts in the statistics of a class: by its rows of the class, or as much as all others."""

    measures = "features"
    variances = True

    def check(self, name: str, *, task: Task, lora: Lora) -> None:
        if not task.cross_entropy:
            raise allowed("objective.name", name, f"its statistics are of one class a row: {ONE_CLASS}")

    def samples(self, client: ClientRound, rows: int, draw: torch.Generator) -> tuple[Tensor, Tensor] | None:
        found = self.received(client)
        if found is None or self.weight == 0:
            return None
        classes = found.known.nonzero().squeeze(1)
        labels = classes.repeat(rows // len(classes) + 1)
        noise = torch.randn(len(labels), found.means.shape[1], generator=draw)
        return found.means[labels] + found.variances[labels].sqrt() * noise, labels

    @property
    def sample_weight(self) -> float:
        return self.weight
