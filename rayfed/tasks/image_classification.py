"""Image classification: one label an image, any transformers model for image classification.

`rayfed.tasks._images` says where images come from and what happens to them. The loss of an image is its cross-entropy
in nats. The metrics are accuracy, macro-F1, the recall of every class and the confusion matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rayfed.keywords import suggest_keywords
from rayfed.tasks._images import ImageTask
from rayfed.tasks.base import Metric
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.metrics import single_label

if TYPE_CHECKING:
    from rayfed.config.training import Eval


@suggest_keywords
@dataclass(frozen=True)
class ImageClassification(ImageTask):
    """Images with one label each: `data.task: image_classification`, or from Python

        rayfed.run(config, task=rayfed.ImageClassification(train=rows, test=more, label="digit"))

    In rows that are objects, an image may be one of Pillow, or an array of bytes, (height, width) or (height, width,
    channels). What is not given comes from the settings; the first four fields always do.
    """

    name = "image_classification"
    problem_type = "single_label_classification"
    cross_entropy = True

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return single_label.loss(outputs, labels)

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def metrics(self, predictions: Tensor, labels: Tensor, federation: Federation) -> dict[str, Metric]:
        return single_label.metrics(predictions, labels, len(federation.classes))

    def metric_names(self) -> tuple[str, ...]:
        return single_label.NAMES

    def metric_keys(self, eval: Eval) -> tuple[str, ...]:
        return single_label.comparable(super().metric_keys(eval), eval)
