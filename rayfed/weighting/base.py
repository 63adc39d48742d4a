"""The base class of weightings. docs/weights-and-channels.md has the equations of the members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rayfed.profiles.profile import Profile

Needs = Literal["sent_losses", "trained_losses", "change_norms"]


class Weighting:
    """Gives every client of a cohort a weight. Only ratios matter: methods divide by the cohort's sum.

    A subclass is a frozen dataclass of its options, or has none. Weights are known before the round (`weight`), or they
    follow from statistics of the cohort (`needs`, `statistics`, `weights`). Then all uploads of a round are stored, as
    bytes, before the first one is aggregated.
    """

    needs: ClassVar[Needs | None] = None
    """What `weights` must know of the clients. None: nothing, `weight` says all. `sent_losses`: the loss of each of the
    client's rows under the model that it received. `trained_losses`: the same under the model that it trained.
    `change_norms`: the L2 norm of its decoded change, which the server computes itself (`rayfed.methods.change_norm`).
    Losses stay with the client: it sends up their `statistics`."""
    rows: int | None = None
    """Most rows of a client of which losses are measured, drawn anew in each round. None: all."""

    def weight(self, client: Profile) -> float:
        """The client's weight before anything is known of the round: 0 or more, finite; by default its training rows.

        A client of weight 0 does not count.
        """
        return float(client.examples)

    def statistics(self, losses: Tensor) -> Tensor:
        """What a client sends up, (s,) float32, of the ``losses`` (rows,) float64 of its rows; one row at least.

        A loss is the mean over the terms of its row. It may be infinite or NaN.
        """
        raise NotImplementedError

    def weights(self, clients: Sequence[Profile], statistics: Tensor) -> Tensor:
        """The weights (K,) of these K clients, float64: 0 or more, finite, with a sum above 0.

        ``statistics`` (K, s) float64 are what the clients sent. With `change_norms` they are the norms (K, 1).
        """
        raise NotImplementedError

    def report(self, statistics: Tensor) -> Mapping[str, float]:
        """Metrics of the round by name, `weighting/...` in metrics.jsonl, from ``statistics`` (K, s)."""
        return {}


def prior(clients: Sequence[Profile]) -> Tensor:
    """FedAvg's shares of these clients, (K,) float64: their training rows, divided by the sum."""
    examples = torch.tensor([float(client.examples) for client in clients], dtype=torch.float64)
    return examples / examples.sum()
