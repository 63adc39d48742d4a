"""The problem with a known answer as a federation: rows of numbers in the place of tokens, one layer as the model.

It runs through the same engine as text does; only the loss (half the squared distance) and the metric differ. The
metric needs no evaluation data: how far the global model is from the optimum is known exactly, see `tasks.lowrank`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.config import Experiment
from rayfed.tasks.known_answer.problem import Problem, make_problem

LAYER = "layer"


@dataclass(frozen=True, eq=False)
class Regression:
    """Features (n, in) and targets (n, out), float32, read as `Tokens` are; every row has one length."""

    features: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self), dtype=np.int64)

    def batch(self, rows: np.ndarray, pad_id: int) -> dict[str, Tensor]:
        """``features`` (b, in) and ``labels`` (b, out); indexing copies, so the tensors may be written to."""
        return {"features": torch.from_numpy(self.features[rows]), "labels": torch.from_numpy(self.targets[rows])}


class LinearModel(nn.Module):
    """One linear layer without a bias, frozen at 0: the model is its change."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, features: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(features))


def problem_of(experiment: Experiment) -> Problem:
    """The problem that the settings describe, the same in every process."""
    settings = experiment.problem
    return make_problem(
        out=settings.outputs,
        inner=settings.inputs,
        rank=settings.true_rank,
        clients=experiment.partition.clients,
        rows=settings.rows,
        condition=settings.condition,
        shift=settings.shift,
        seed=experiment.seed,
    )
