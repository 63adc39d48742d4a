"""FedBC (Bedi et al. 2022, arXiv 2206.10815): each client may leave the global model as far as its tolerance allows.

  z: the received values; w: the client's; lam, gamma: two numbers that each client stores, both start values below

  client   min_w f(w) + lam (||w - z||^2 - gamma)        g <- grad f(w) + 2 lam (w - z), before the gradient is clipped
           lam+   = max(0, lam + a (||w - z||^2 - gamma))      after training
           gamma+ = gamma + a lam                               only with gamma_grows; from the old lam
  up       the change, and lam+
  server   z <- sum_S lam+ w / sum_S lam+                all lam+ of a cohort 0: the plain mean

lam is 0 before a client takes part. So its first participation is plain training, and with gamma 0 its weight in that
round is a times the square of how far it moved. The distance is taken at the client, from the values that it decoded
and those that it trained. It is in the space in which the method averages (`Method.averages`), so that z is the
minimiser of sum_S lam+ ||w - z||^2:

  changes    the entries that the client uploads: B and A one by one, and the head
  products   sum over layers of ||s (B A - B_z A_z)||_F^2, and the head; ranks may be mixed  [derived]
             the gradient in B is 2 lam s^2 (B A - B_z A_z) A^T, that in A is 2 lam s^2 B^T (B A - B_z A_z)

Source: authors' code read; deviates: the authors step lam by SGD with momentum 0.5 over the vector of all users after
each client, so lam depends on the order of the cohort; here each client takes one plain step, as in the paper. Their
code divides by zero where all lam+ are 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayfed.config.types import NonNegative
from rayfed.errors import allowed
from rayfed.lora.adapter import LowRank
from rayfed.objectives._product_pull import ProductPull, product_square
from rayfed.objectives._stateful import ClientRound, Message, RunFacts, Stateful
from rayfed.objectives.base import Objective


@dataclass(frozen=True)
class FedBC(Stateful):
    """A pull towards the received model, whose strength is each client's dual variable."""

    rate: NonNegative = 1e-3
    """a, the step size of lam and of a growing gamma. The authors use 5e-4 to 1e-3."""
    gamma: NonNegative = 0.0
    """The squared distance that is allowed, at first."""
    gamma_grows: bool = True
    """Whether a client's gamma grows with its lam, as by default in the authors' code. Then the pull ends some time."""

    server_weights = "uniform"
    server_optimizers = ("fedavg",)

    def check_run(self, name: str, facts: RunFacts) -> None:
        if facts.ignores_weights:
            what = f"its dual variables are the clients' weights, and {facts.method} does not use these"
            raise allowed("objective.name", name, f"{what}: {facts.ignores_weights}")
        if facts.averages == "products":  # no entry is compared with that of another client or round
            facts = replace(facts, fixed_gauge=True, mixed_ranks=False)
        super().check_run(name, facts)

    def terms(self, client: ClientRound) -> Mapping[str, Tensor]:
        pull = 2 * self._dual(client)[0]
        return {"pull": pull * client.layout.mask("head") if client.products else pull}

    def own_penalty(self, client: ClientRound) -> Objective | None:
        return ProductPull(float(self._dual(client)[0]), _pairs(client, client.start)) if client.products else None

    def correction(self, values: Tensor, start: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        return terms["pull"] * (values - start)

    def message(self, client: ClientRound, trained: Tensor, steps: int, twin: Tensor | None = None) -> Message:
        lam, gamma = self._dual(client).double()
        entries = client.uploaded & client.layout.mask("head") if client.products else client.uploaded
        square = ((trained - client.start) * entries).double().square().sum()
        for now, then in zip(_pairs(client, trained), _pairs(client, client.start), strict=True):
            square += product_square(now.B.double(), now.A.double(), then)
        stepped = lam + self.rate * (square - gamma)
        return Message(numbers=stepped.clamp(min=0).float()[None])

    def store(self, client: ClientRound, sent: Message) -> Tensor:
        assert sent.numbers is not None
        lam, gamma = self._dual(client)
        return torch.stack([sent.numbers[0], gamma + self.rate * lam if self.gamma_grows else gamma])

    def weights(self, numbers: Sequence[Tensor]) -> Sequence[float]:
        weights = [float(own[0]) for own in numbers]
        return weights if any(weights) else [1.0] * len(weights)

    def _dual(self, client: ClientRound) -> Tensor:
        """(2,): lam and gamma."""
        return torch.tensor([0.0, self.gamma]) if client.stored is None else client.stored


def _pairs(client: ClientRound, vector: Tensor) -> list[LowRank]:
    """The pairs in ``vector`` (n,), in model order; none where the method averages entries."""
    layers = client.layout.unflatten(vector).layers if client.products else {}
    return [layers[name] for name in client.products]
