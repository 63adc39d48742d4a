"""Text classification: one label a text, any transformers model for sequence classification.

Rows come from Python's standard library, from files or from the Hugging Face hub (`data.source`). The loss of a text is
its cross-entropy in nats. The metrics are accuracy, macro-F1, the recall of every class and the confusion matrix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.config.task import Data, Model, Partition, Problem
from rayfed.errors import UserError, allowed
from rayfed.tasks.base import Metric, Task, fingerprint
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.data.objects import content_digest, read_objects
from rayfed.tasks.data.table import SPLITS, Source
from rayfed.tasks.models.base import FrozenBase, load_base, load_tokenizer, longest_input, model_path, vocabulary
from rayfed.tasks.models.cache import shared_base
from rayfed.tasks.models.unpadded import Padded, Unpadded, choose_batching
from rayfed.tasks.models.usage import Usage, classifier_usage

if TYPE_CHECKING:
    from rayfed.config.execution import Engine
    from rayfed.config.method import Lora
    from rayfed.config.training import Eval, Server

LISTS = ("recall_per_class", "confusion_matrix")  # the metrics that are not one number


@dataclass(frozen=True)
class TextClassification(Task):
    """Texts with one label each.

        rayfed.run(config, task=rayfed.TextClassification(train=rows, test=more, label="topic"))

    Rows, loss and metrics may be Python objects. What is not given comes from the settings; the first four fields
    always do. Functions are known by their import path (config.yaml, `data.fingerprint`), rows by their content.
    """

    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    model: Model = field(default_factory=Model)
    seed: int = 0
    _: KW_ONLY
    train: Any = None
    """The training rows, in place of `data.source`: a datasets.Dataset, a pandas DataFrame, a list of mappings, or a
    torch data set of mappings or of tuples (text, label) or (text, label, client).
    """
    validation: Any = None
    """The validation rows; None: `data.validation` says how many training rows are drawn."""
    test: Any = None
    """The test rows; None: `data.test` says how many training rows are drawn."""
    text: str | None = None
    """The column with the text; None: `data.text`."""
    label: str | None = None
    """The column with the label; None: `data.label`."""
    client: str | None = None
    """The column with the client, for partition.kind=natural; None: `data.client`."""
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    """(logits (rows, classes), labels (rows,)) -> each row's loss (rows,); None: the cross-entropy."""
    metric_fns: Mapping[str, Callable[[Tensor, Tensor], float]] = field(default_factory=dict)
    """More metrics by name: (predicted classes (n,), labels (n,)) -> a number, over all rows of a split."""

    def configure(self, *, data: Data, problem: Problem, partition: Partition, model: Model, seed: int) -> Self:
        return replace(self, data=data, partition=partition, model=model, seed=seed)

    def described(self, data: Data, model: Model) -> tuple[Data, Model]:
        names = {key: name for key in ("text", "label", "client") if (name := getattr(self, key)) is not None}
        data = data.model_copy(update=names)
        digest = hashlib.sha256()
        if (source := self._source(data)) is not None:
            digest.update(content_digest(source).encode())
            data = data.model_copy(update={"source": "object", "path": None, "name": None, "subset": None})
        functions = {"loss": self.loss_fn, **self.metric_fns}
        for name, function in functions.items():
            if function is not None and not callable(function):
                raise allowed(f"task.{name}", function, "it is a function")
            digest.update(f"|{name}={getattr(function, '__module__', '')}:{_name(function)}".encode())
        if wrong := set(self.metric_fns) & {"loss", "accuracy", "macro_f1", *LISTS}:
            raise allowed("task.metric_fns", min(wrong), "this name is taken")
        return data.model_copy(update={"fingerprint": fingerprint(self, digest.hexdigest())}), model

    @property
    def parts(self) -> tuple[object, ...]:
        return (*filter(None, (self.loss_fn,)), *self.metric_fns.values())

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows: workers have the federation."""
        return {**vars(self), "train": None, "validation": None, "test": None}

    def _source(self, data: Data) -> Source | None:
        """The rows that are objects; None where the settings name the rows."""
        splits = {name: rows for name in SPLITS if (rows := getattr(self, name)) is not None}
        if splits and "train" not in splits:
            raise UserError("train: got None, but validation or test rows come with training rows")
        return read_objects(splits, data) if splits else None

    @classmethod
    def from_settings(cls, *, data: Data, problem: Problem, partition: Partition, model: Model, seed: int) -> Self:
        return cls(data, partition, model, seed)

    def check(self, *, lora: Lora, server: Server, eval: Eval, engine: Engine) -> None:
        clients = self.partition.clients
        if self.partition.kind != "natural" and server.cohort > clients:
            what = f"the population has only {clients} clients (partition.clients)"
            raise allowed("server.cohort", server.cohort, what)
        if self.partition.kind == "natural" and self.data.client is None:
            raise UserError("data.client: got null, but partition.kind=natural needs the column that names the client")
        if eval.early_stop and self.data.source == "stdlib" and self.data.validation == 0:
            raise UserError("data.validation: got 0, but eval.early_stop needs a validation split")

    def load_data(self) -> Federation:
        from rayfed.tasks.data.dataset import load_data
        from rayfed.tasks.data.partition import client_names, partition
        from rayfed.tasks.data.tokens import tokenize

        data = load_data(self.data, self.seed, self._source(self.data))
        parts = partition(data.train.labels, data.train.owners, self.partition, self.seed)
        cut, limit = self.data.max_tokens, longest_input(self.model)
        tokenizer, words = load_tokenizer(self.model), vocabulary(self.model)
        train, validation, test = (
            tokenize(split, tokenizer, cut, words) for split in (data.train, data.validation, data.test)
        )
        longest = max(int(split.lengths.max(initial=0)) for split in (train, validation, test))
        if limit is not None and longest > limit:
            what = f"some texts have {longest} tokens and the model takes at most {limit}"
            raise allowed("data.max_tokens", cut, what)
        return Federation(
            train,
            validation,
            test,
            classes=data.classes,
            rows=np.concatenate(parts).astype(np.int64),
            starts=np.cumsum([0, *map(len, parts)], dtype=np.int64),
            names=client_names(data.train.owners, self.partition),
        )

    def load_base(self, federation: Federation) -> FrozenBase:
        classes = len(federation.classes)
        return shared_base(self._base_key(classes), lambda: load_base(self.model, classes, self.seed))

    @property
    def base_name(self) -> str:
        return model_path(self.model)

    def batching(self, base: FrozenBase, padding: str) -> Unpadded | Padded:
        if padding == "batch":
            return Padded("engine.padding=batch")
        most = self.data.max_tokens
        found = choose_batching(base.model, min(most, longest_input(self.model) or most))
        if padding == "never" and isinstance(found, Padded):
            what = f"this model needs padding ({found.reason}); allowed are auto and batch"
            raise allowed("engine.padding", padding, what)
        return found

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.loss_fn is None:
            losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
        else:
            losses = self.loss_fn(outputs, labels)
            if losses.shape != labels.shape:
                what = f"one loss for each of {len(labels)} rows is needed"
                raise allowed("task.loss_fn", f"a result of shape {tuple(losses.shape)}", what)
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
            **{name: float(function(predictions, labels)) for name, function in self.metric_fns.items()},
        }

    def metric_names(self) -> tuple[str, ...]:
        return "accuracy", "macro_f1", *LISTS, *self.metric_fns

    def metric_keys(self, eval: Eval) -> tuple[str, ...]:
        keys = [key for key in super().metric_keys(eval) if not any(name in key for name in LISTS)]
        more = {"test/accuracy_clients": eval.clients, "test/accuracy_unseen": eval.unseen}
        return (*keys, *(key for key, measured in more.items() if measured))

    def save_tokenizer(self, folder: Path) -> None:
        tokenizer = load_tokenizer(self.model)
        tokenizer.padding_side = "right"  # as in every batch of a run
        tokenizer.save_pretrained(folder)

    def usage(self) -> Usage:
        return classifier_usage(self.model, self.data.max_tokens)

    def _base_key(self, classes: int) -> str:
        """Equal keys, equal base models in float32."""
        key: list[Any] = [classes, self.seed, self.model.model_dump(mode="json", exclude={"dtype"})]
        folder = Path(model_path(self.model))
        if folder.is_dir():  # other files may come under its name
            key += sorted((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in folder.iterdir())
        return json.dumps(key)


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))
