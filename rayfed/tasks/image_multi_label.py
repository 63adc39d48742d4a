"""Multi-label image classification: any number of labels an image, any transformers model for image classification.

`rayfed.tasks._images` says where images come from and what happens to them. The column `data.label` has a list of
labels an image. The loss of an image is the mean over all labels of the binary cross-entropy in nats.
`rayfed.tasks.metrics.multi_label` defines the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from rayfed.keywords import suggest_keywords
from rayfed.tasks._images import ImageTask
from rayfed.tasks.base import Metric
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.metrics import multi_label

if TYPE_CHECKING:
    from rayfed.config.execution import Engine
    from rayfed.config.method import Lora
    from rayfed.config.training import Eval, Server


@suggest_keywords
@dataclass(frozen=True)
class ImageMultiLabel(ImageTask):
    """Images with any number of labels each: `data.task: image_multi_label`, or from Python

        rayfed.run(config, task=rayfed.ImageMultiLabel(train=rows, test=more, label="things"))

    What is not given comes from the settings; the first four fields always do.
    """

    name = "image_multi_label"
    problem_type = "multi_label_classification"
    metric = "map"

    def check(self, *, lora: Lora, server: Server, eval: Eval, engine: Engine) -> None:
        why = "an image has several classes"
        self._refuse(("eval.clients", eval.clients, False, why), ("eval.controls", eval.controls, False, why))
        super().check(lora=lora, server=server, eval=eval, engine=engine)

    def strata(self, labels: np.ndarray) -> np.ndarray:
        return multi_label.first_class(labels)

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return multi_label.loss(outputs, labels)

    def metrics(self, predictions: Tensor, labels: Tensor, federation: Federation) -> Mapping[str, Metric]:
        return multi_label.metrics(predictions, labels)

    def metric_names(self) -> tuple[str, ...]:
        return multi_label.NAMES

    def metric_keys(self, eval: Eval) -> tuple[str, ...]:
        return (*super().metric_keys(eval), *(("test/map_unseen",) if eval.unseen else ()))
