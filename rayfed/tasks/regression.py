"""Regression on texts: a number a text, any transformers model for sequence classification, with one output.

Rows come from the sources of `data.source`; the column `data.label` has the numbers. The loss of a text is its squared
error, so `eval/loss` is the mean squared error. The metric is Spearman's rank correlation, from -1 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from rayfed.errors import UserError
from rayfed.keywords import suggest_keywords
from rayfed.tasks._sequence_classification import SequenceClassification
from rayfed.tasks.base import Metric
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.metrics import regression

if TYPE_CHECKING:
    from rayfed.config.execution import Engine
    from rayfed.config.method import Lora
    from rayfed.config.training import Eval, Server


@suggest_keywords
@dataclass(frozen=True)
class Regression(SequenceClassification):
    """Texts with a number each: `data.task: regression`, or from Python

        rayfed.run(config, task=rayfed.Regression(train=rows, test=more, label="score"))

    Rows, model, loss and metrics may be Python objects. What is not given comes from the settings; the first four
    fields always do. `loss_fn` gets outputs (rows, 1) and labels (rows,); `metric_fns` get the outputs (n,) and the
    labels (n,).
    """

    name = "regression"
    problem_type = "regression"
    metric = "spearman"
    has_classes = False

    def check(self, *, lora: Lora, server: Server, eval: Eval, engine: Engine) -> None:
        why = "there are no classes"
        self._refuse(("eval.clients", eval.clients, False, why), ("eval.controls", eval.controls, False, why))
        if (kind := self.partition.kind) and self.partition.by_label:
            what = "with data.task=regression a label is a number; allowed are iid, quantity, domain, natural"
            raise UserError(f"partition.kind: got {kind!r}, but it divides rows by label, and {what}")
        super().check(lora=lora, server=server, eval=eval, engine=engine)

    def outputs(self, federation: Federation) -> int:
        return 1

    def strata(self, labels: np.ndarray) -> np.ndarray:
        return np.zeros(len(labels), dtype=np.int64)

    def row_losses(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return regression.loss(outputs, labels)

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.squeeze(1)

    def metrics(self, predictions: Tensor, labels: Tensor, federation: Federation) -> Mapping[str, Metric]:
        return {"spearman": regression.spearman(predictions, labels), **self.user_metrics(predictions, labels)}

    def metric_names(self) -> tuple[str, ...]:
        return "spearman", *self.metric_fns

    def metric_keys(self, eval: Eval) -> tuple[str, ...]:
        return (*super().metric_keys(eval), *(("test/spearman_unseen",) if eval.unseen else ()))
