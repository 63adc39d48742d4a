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

from rayfed.config.task import OBJECT, Data, Model, Partition, Problem
from rayfed.errors import UserError, allowed
from rayfed.keywords import suggest_keywords
from rayfed.tasks.base import Metric, Task, fingerprint
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.data.objects import content_digest, read_objects
from rayfed.tasks.data.table import SPLITS, Source
from rayfed.tasks.models.base import (
    FrozenBase,
    load_base,
    load_tokenizer,
    longest_input,
    model_path,
    positions,
    vocabulary,
)
from rayfed.tasks.models.cache import shared_base
from rayfed.tasks.models.objects import fingerprint as own_fingerprint
from rayfed.tasks.models.objects import load_own_base, own_module, own_tokenizer
from rayfed.tasks.models.unpadded import Padded, Unpadded, choose_batching
from rayfed.tasks.models.usage import Usage, classifier_usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayfed.config.execution import Engine
    from rayfed.config.method import Lora
    from rayfed.config.training import Eval, Server

LISTS = ("recall_per_class", "confusion_matrix")  # the metrics that are not one number


@suggest_keywords
@dataclass(frozen=True)
class TextClassification(Task):
    """Texts with one label each.

        rayfed.run(config, task=rayfed.TextClassification(train=rows, test=more, label="topic"))

    Rows, model, loss and metrics may be Python objects. What is not given comes from the settings; the first four
    fields always do. In config.yaml, functions are known by their import path and rows by their content
    (`data.fingerprint`), and a model by its weights and its tokenizer (`model.fingerprint`).
    """

    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    model_settings: Model = field(default_factory=Model)
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
    model: nn.Module | Callable[[], nn.Module] | None = None
    """The base model, in place of `model.name`: a module, or a function that makes one (with torch's generator always
    in the same state). It is called with `input_ids` and `attention_mask`, both (rows, tokens), and returns the logits
    (rows, classes), as a tensor or as the `logits` of an object. Its head is its child `classifier` or `score`, made of
    linear layers. With model.pooling=mean it is an encoder of transformers.
    """
    tokenizer: Any = None
    """The model's tokenizer: one of transformers, or the path of its folder. It is needed with `model`."""
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    """(logits (rows, classes), labels (rows,)) -> each row's loss (rows,); None: the cross-entropy."""
    metric_fns: Mapping[str, Callable[[Tensor, Tensor], float]] = field(default_factory=dict)
    """More metrics by name: (predicted classes (n,), labels (n,)) -> a number, over all rows of a split."""

    def configure(self, *, data: Data, problem: Problem, partition: Partition, model: Model, seed: int) -> Self:
        return replace(self, data=data, partition=partition, model_settings=model, seed=seed)

    def described(self, data: Data, model: Model) -> tuple[Data, Model]:
        names = {key: name for key in ("text", "label", "client") if (name := getattr(self, key)) is not None}
        data = data.model_copy(update=names)
        digest = hashlib.sha256()
        if (source := self._source(data)) is not None:
            digest.update(content_digest(source).encode())
            data = data.model_copy(update={"source": "object", "path": None, "name": None, "subset": None})
        elif data.source == "object":
            what = "the rows were Python objects: give them again, TextClassification(train=...)"
            raise allowed("data.source", "object", what)
        functions = {"loss": self.loss_fn, **self.metric_fns}
        for name, function in functions.items():
            if function is not None and not callable(function):
                raise allowed(f"task.{name}", function, "it is a function")
            digest.update(f"|{name}={getattr(function, '__module__', '')}:{_name(function)}".encode())
        if wrong := set(self.metric_fns) & {"loss", "accuracy", "macro_f1", *LISTS}:
            raise allowed("task.metric_fns", min(wrong), "this name is taken")
        data = data.model_copy(update={"fingerprint": fingerprint(self, digest.hexdigest())})
        return data, self._described_model(model)

    def _described_model(self, settings: Model) -> Model:
        """The section `model`, with the name and the fingerprint of a model that is an object."""
        if self.model is not None:
            if self.tokenizer is None:
                raise UserError("tokenizer: got None, but a model that is a Python object comes with its tokenizer")
            found = own_fingerprint(own_module(self.model), own_tokenizer(self.tokenizer))
            return settings.model_copy(update={"name": OBJECT, "fingerprint": found})
        if self.tokenizer is not None:
            raise allowed("tokenizer", type(self.tokenizer).__name__, "it comes with a model that is a Python object")
        if settings.fingerprint is not None:
            what = "the model was a Python object: give it again, TextClassification(model=..., tokenizer=...)"
            raise allowed("model.fingerprint", settings.fingerprint, what)
        return settings

    @property
    def parts(self) -> tuple[object, ...]:
        model = self.model
        of_model = {type(module) for module in model.modules()} if isinstance(model, nn.Module) else (model,)
        return tuple(filter(None, (self.loss_fn, *self.metric_fns.values(), *of_model)))

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows: workers have the federation. A module travels on the CPU."""
        model = own_module(self.model) if isinstance(self.model, nn.Module) else self.model
        return {**vars(self), "train": None, "validation": None, "test": None, "model": model}

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
        if self.partition.column and self.data.client is None:
            needed = f"partition.kind={self.partition.kind} needs the column that names the {self.partition.column}"
            raise UserError(f"data.client: got null, but {needed}")
        if eval.early_stop and self.data.source == "stdlib" and self.data.validation == 0:
            raise UserError("data.validation: got 0, but eval.early_stop needs a validation split")

    def load_data(self) -> Federation:
        from rayfed.tasks.data.dataset import load_data
        from rayfed.tasks.data.partition import client_names, partition
        from rayfed.tasks.data.tokens import tokenize

        data = load_data(self.data, self.seed, self._source(self.data))
        parts = partition(data.train.labels, data.train.owners, self.partition, self.seed)
        tokenizer, cut, named = self._tokenizer(), self.data.max_tokens, self.model is None
        # A model that is an object is tried on the longest text and the largest token, see `load_own_base`.
        limit = longest_input(self.model_settings) if named else None
        words = vocabulary(self.model_settings) if named else None
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
        settings, seed = self.model_settings, self.seed
        if self.model is None:
            return shared_base(self._base_key(classes), lambda: load_base(settings, classes, seed))
        own = self.model, self.tokenizer
        return shared_base(self._base_key(classes), lambda: load_own_base(*own, settings, federation, seed))

    @property
    def base_name(self) -> str:
        return model_path(self.model_settings) if self.model is None else OBJECT

    def batching(self, base: FrozenBase, padding: str) -> Unpadded | Padded:
        if padding == "batch":
            return Padded("engine.padding=batch")
        most = self.data.max_tokens
        found = choose_batching(base.model, min(most, positions(getattr(base.model, "config", None)) or most))
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
        tokenizer = self._tokenizer()
        tokenizer.padding_side = "right"  # as in every batch of a run
        tokenizer.save_pretrained(folder)

    def usage(self) -> Usage | None:
        return classifier_usage(self.model_settings, self.data.max_tokens) if self.model is None else None

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model_settings) if self.model is None else own_tokenizer(self.tokenizer)

    def _base_key(self, classes: int) -> str:
        """Equal keys, equal base models in float32."""
        key: list[Any] = [classes, self.seed, self.model_settings.model_dump(mode="json", exclude={"dtype"})]
        folder = Path(self.base_name)
        if self.model is None and folder.is_dir():  # other files may come under its name
            key += sorted((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in folder.iterdir())
        return json.dumps(key)


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))
