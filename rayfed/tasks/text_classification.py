"""Text classification: one label a text, any transformers model for sequence classification.

Rows come from Python's standard library, from files or from the Hugging Face hub (`data.source`). The loss of a text is
its cross-entropy in nats. The metrics are accuracy, macro-F1, the recall of every class and the confusion matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rayfed.keywords import suggest_keywords
from rayfed.tasks._sequence_classification import SequenceClassification
from rayfed.tasks.base import Metric
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.metrics import single_label

if TYPE_CHECKING:
    from rayfed.config.training import Eval


@suggest_keywords
@dataclass(frozen=True)
class TextClassification(SequenceClassification):
    """Texts with one label each.

        rayfed.run(config, task=rayfed.TextClassification(train=rows, test=more, label="topic"))

    Rows, model, loss and metrics may be Python objects. What is not given comes from the settings; the first four
    fields always do. `loss_fn` gets logits (rows, classes) and labels (rows,); `metric_fns` get the predicted classes
    (n,) and the labels (n,).
    """

    name = "text_classification"
    problem_type = "single_label_classification"

    @property
    def cross_entropy(self) -> bool:  # type: ignore[override]
        return self.loss_fn is None

    def row_losses(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return single_label.loss(outputs, labels)

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def metrics(self, predictions: Tensor, labels: Tensor, federation: Federation) -> dict[str, Metric]:
        return {
            **single_label.metrics(predictions, labels, len(federation.classes)),
            **self.user_metrics(predictions, labels),
        }

    def metric_names(self) -> tuple[str, ...]:
        return *single_label.NAMES, *self.metric_fns

    def metric_keys(self, eval: Eval) -> tuple[str, ...]:
        return single_label.comparable(super().metric_keys(eval), eval)
