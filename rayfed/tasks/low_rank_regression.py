"""The problem with a known answer: federated low-rank regression on one linear layer (`data.source: lowrank`).

Rows of numbers take the place of tokens, and one linear layer without bias, frozen at 0, is the base model: the model
is its change. The loss of a row is half the squared distance from its target. The metrics need no evaluation data: the
distance of the global model from the optimum is exact (`rayfed.tasks.known_answer.problem`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.config.describe import format_value
from rayfed.config.task import Data, Model, Partition, Problem
from rayfed.errors import UserError, allowed
from rayfed.lora.adapter import LowRank
from rayfed.tasks.base import Task
from rayfed.tasks.data.federation import Federation, NumberRows
from rayfed.tasks.known_answer import problem as known
from rayfed.tasks.models.base import FrozenBase

if TYPE_CHECKING:
    from rayfed.config.execution import Engine
    from rayfed.config.method import Lora
    from rayfed.config.training import Eval, Server


class LinearModel(nn.Module):
    """One linear layer without a bias, frozen at 0."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, features: Tensor) -> Tensor:
        outputs: Tensor = self.layer(features)
        return outputs


@dataclass(frozen=True)
class LowRankRegression(Task):
    """Linear regression whose optimum has a chosen rank."""

    problem: Problem
    partition: Partition
    model: Model
    seed: int

    metric = None

    @classmethod
    def from_settings(cls, *, data: Data, problem: Problem, partition: Partition, model: Model, seed: int) -> Self:
        return cls(problem, partition, model, seed)

    def check(self, *, lora: Lora, server: Server, eval: Eval, engine: Engine) -> None:
        for field, value, wanted, why in (
            ("partition.kind", self.partition.kind, "natural", "every client has rows of its own"),
            ("model.dtype", self.model.dtype, "float32", "distances are finer than other formats"),
            ("model.adapter", self.model.adapter, None, "every run starts from W = 0"),
            ("engine.gradient_checkpointing", engine.gradient_checkpointing, False, "the model is one layer"),
            ("lora.train", lora.train, "all", "there is no head"),
            ("eval.controls", eval.controls, False, "there is no head"),
            ("eval.clients", eval.clients, False, "there are no classes"),
            ("eval.unseen", eval.unseen, False, "the metrics are exact, without rows"),
            ("eval.own_models", eval.own_models, None, "the metrics are those of the global model"),
            ("eval.early_stop", eval.early_stop and dict(eval.early_stop), None, "there are no validation data"),
        ):
            if value != wanted:
                what = f"with data.source=lowrank {why}; allowed is {format_value(wanted, quotes=False)}"
                raise UserError(f"{field}: got {format_value(value)}, but {what}")
        clients = self.partition.clients
        if server.cohort > clients:
            what = f"the population has only {clients} clients (partition.clients)"
            raise allowed("server.cohort", server.cohort, what)

    def load_data(self) -> Federation:
        own = self.problem
        problem = known.make_problem(
            out=own.outputs, inner=own.inputs, rank=own.true_rank, clients=self.partition.clients, rows=own.rows,
            condition=own.condition, shift=own.shift, seed=self.seed,
        )  # fmt: skip
        nothing = NumberRows(problem.features[:0], problem.targets[:0])
        return Federation(
            NumberRows(problem.features, problem.targets),
            nothing,
            nothing,
            classes=tuple(f"output {i}" for i in range(problem.targets.shape[1])),
            rows=np.arange(len(problem.owner)),
            starts=np.searchsorted(problem.owner, np.arange(problem.clients + 1)).astype(np.int64),
            extra=problem,
        )

    def load_base(self, federation: Federation) -> FrozenBase:
        return FrozenBase(LinearModel(self.problem.outputs, self.problem.inputs), ())

    @property
    def base_name(self) -> str:
        return "lowrank"

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = 0.5 * (outputs - labels).square().flatten(1).sum(1)
        return losses, torch.ones_like(losses)

    def metric_keys(self, eval: Eval) -> tuple[str, ...]:
        return "eval/loss", "eval/gap"

    def exact_metrics(self, federation: Federation, changes: Mapping[str, LowRank | Tensor]) -> dict[str, float] | None:
        """`eval/loss`: F(W). `eval/gap`: the share of the initial gap F(0) - F(W*) that is left."""
        (change,) = changes.values()
        W = (change.dense() if isinstance(change, LowRank) else change).double().numpy()
        return {"eval/loss": known.loss(federation.extra, W), "eval/gap": known.share(federation.extra, W)}
