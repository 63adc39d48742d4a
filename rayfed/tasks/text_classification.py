"""Text classification: one label a text, any transformers model for sequence classification.

Rows come from Python's standard library, from files or from the Hugging Face hub (`data.source`). The loss of a text is
its cross-entropy in nats. The metrics are accuracy, macro-F1, the recall of every class and the confusion matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rayfed.keywords import suggest_keywords
from rayfed.tasks._sequence_classification import SequenceClassification
from rayfed.tasks.base import Metric
from rayfed.tasks.data.federation import Federation

if TYPE_CHECKING:
    from rayfed.config.training import Eval

LISTS = ("recall_per_class", "confusion_matrix")  # the metrics that are not one number


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

    def row_losses(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
        return losses, torch.ones_like(losses)

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def metrics(self, predictions: Tensor, labels: Tensor, federation: Federation) -> dict[str, Metric]:
        from torchmetrics.functional import classification as metrics  # takes a second to import

        classes = len(federation.classes)
        confusion = metrics.multiclass_confusion_matrix(predictions, labels, classes)
        rows = confusion.sum(1).tolist()
        recalls = metrics.multiclass_recall(predictions, labels, classes, average=None).tolist()
        return {
            "accuracy": int(confusion.trace()) / len(labels),
            "macro_f1": float(metrics.multiclass_f1_score(predictions, labels, classes, average="macro")),
            "recall_per_class": [recall if count else None for recall, count in zip(recalls, rows)],
            "confusion_matrix": confusion.tolist(),
            **self.user_metrics(predictions, labels),
        }

    def metric_names(self) -> tuple[str, ...]:
        return "accuracy", "macro_f1", *LISTS, *self.metric_fns

    def metric_keys(self, eval: Eval) -> tuple[str, ...]:
        keys = [key for key in super().metric_keys(eval) if not any(name in key for name in LISTS)]
        more = {"test/accuracy_clients": eval.clients, "test/accuracy_unseen": eval.unseen}
        return (*keys, *(key for key, measured in more.items() if measured))
