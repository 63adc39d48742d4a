"""Multi-label text classification: any number of labels a text, any transformers model for sequence classification.

Rows come from the sources of `data.source`; the column `data.label` has a list of labels a row. The loss of a text is
the mean over all labels of the binary cross-entropy in nats. `rayfed.tasks.metrics.multi_label` defines the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from rayfed.keywords import suggest_keywords
from rayfed.tasks._sequence_classification import SequenceClassification
from rayfed.tasks.base import Metric
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.metrics import multi_label

if TYPE_CHECKING:
    from rayfed.config.execution import Engine
    from rayfed.config.method import Lora
    from rayfed.config.training import Eval, Server


@suggest_keywords
@dataclass(frozen=True)
class MultiLabel(SequenceClassification):
    """Texts with any number of labels each: `data.task: multi_label`, or from Python

        rayfed.run(config, task=rayfed.MultiLabel(train=rows, test=more, label="topics"))

    Rows, model, loss and metrics may be Python objects. What is not given comes from the settings; the first four
    fields always do. `loss_fn` gets logits and labels, both (rows, labels); `metric_fns` get the same of all rows.
    """

    name = "multi_label"
    problem_type = "multi_label_classification"
    metric = "map"

    def check(self, *, lora: Lora, server: Server, eval: Eval, engine: Engine) -> None:
        why = "a text has several classes"
        self._refuse(("eval.clients", eval.clients, False, why), ("eval.controls", eval.controls, False, why))
        super().check(lora=lora, server=server, eval=eval, engine=engine)

    def strata(self, labels: np.ndarray) -> np.ndarray:
        return multi_label.first_class(labels)

    def row_losses(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return multi_label.loss(outputs, labels)

    def metrics(self, predictions: Tensor, labels: Tensor, federation: Federation) -> Mapping[str, Metric]:
        return {**multi_label.metrics(predictions, labels), **self.user_metrics(predictions, labels)}

    def metric_names(self) -> tuple[str, ...]:
        return *multi_label.NAMES, *self.metric_fns

    def metric_keys(self, eval: Eval) -> tuple[str, ...]:
        return (*super().metric_keys(eval), *(("test/map_unseen",) if eval.unseen else ()))
