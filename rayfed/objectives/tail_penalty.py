"""HetLoRA's regulariser (arXiv 2401.06432): it makes the last ranks of a client's adapter small.

penalty = weight * sum over layers of ||B[:, start:]||_F ||A[start:, :]||_F

`method.name: hetlora` adds it for every client with a start that depends on the client's rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from rayfed.config.types import NonNegative
from rayfed.errors import allowed
from rayfed.objectives.base import Objective
from rayfed.tasks.base import Task

if TYPE_CHECKING:
    from rayfed.config.method import Lora


@dataclass(frozen=True)
class TailPenalty(Objective):
    """Penalises the last ranks of an adapter."""

    weight: NonNegative
    """Factor on the penalty."""
    start: Annotated[int, Field(ge=0, le=100_000)]
    """The first rank that is penalised, from 0."""

    def check(self, name: str, *, task: Task, lora: Lora) -> None:
        super().check(name, task=task, lora=lora)
        if lora.train == "head":
            raise allowed("objective.name", name, "it penalises ranks, and with lora.train=head no adapter trains")
        if self.start >= lora.rank:
            what = f"lora.rank={lora.rank}: ranks are counted from 0, and one must be left to penalise"
            raise allowed("objective.start", self.start, what)

    def penalty(self, factors: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
        norms = [
            torch.linalg.vector_norm(B[:, self.start :]) * torch.linalg.vector_norm(A[self.start :]) for B, A in factors
        ]
        return self.weight * torch.stack(norms).sum() if norms else None
