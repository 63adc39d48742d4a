"""The base class of objectives in which statistics by class travel: FedImpro's features, FedHPL's logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rayfed.objectives._class_statistics import ClassStatistics, mean_statistics
from rayfed.objectives._stateful import ClientRound, Message, Received, Stateful


class ByClass(Stateful):
    """Up each client's statistics of what `measures` names, down their mean by class. Entries of adapters do not count.

    A subclass says whether variances travel, and has `average` as an option.
    """

    entrywise = False
    variances: ClassVar[bool]
    average: Literal["examples", "uniform"]

    def received(self, client: ClientRound) -> ClassStatistics | None:
        """What the client received; None if no class is known yet."""
        numbers = client.received.numbers
        return None if numbers is None else ClassStatistics.from_numbers(numbers, self.variances)

    def message(self, client: ClientRound, trained: Tensor, steps: int, twin: Tensor | None = None) -> Message:
        assert client.statistics is not None
        return Message(numbers=client.statistics.numbers(self.variances))

    def send(self, state: Mapping[str, Tensor]) -> Message:
        return Message(numbers=_of(state).numbers(self.variances)) if state else Message()

    def absorb(
        self, state: Mapping[str, Tensor], received: Received, start: Tensor, population: int
    ) -> dict[str, Tensor]:
        clients = [ClassStatistics.from_numbers(own, self.variances) for own in received.numbers]
        found = mean_statistics(_of(state) if state else None, clients, self.average == "examples")
        if found is None:
            return {}
        return {"counts": found.counts, "means": found.means} | (
            {"variances": found.variances} if self.variances else {}
        )


def _of(state: Mapping[str, Tensor]) -> ClassStatistics:
    means = state["means"]
    return ClassStatistics(state["counts"], means, state.get("variances", torch.zeros_like(means)))
