"""The base class of tasks: what is learned.

A task reads rows and deals them out to clients, makes batches of tensors, loads the frozen base model, and gives the
loss per row and the metrics. Training, evaluation, messages and methods know a task by these functions alone.
docs/architecture.md shows where each of them is called.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.errors import allowed, first_line
from rayfed.lora.adapter import LowRank
from rayfed.lora.packed.segments import Segment
from rayfed.tasks.data.federation import Federation, Rows
from rayfed.tasks.models.base import FrozenBase, logits_of
from rayfed.tasks.models.unpadded import Padded, Unpadded, UnpaddedModel
from rayfed.tasks.models.usage import Usage

if TYPE_CHECKING:
    from rayfed.config.execution import Engine
    from rayfed.config.method import Lora
    from rayfed.config.task import Data, Model, Partition, Problem
    from rayfed.config.training import Eval, Server

Forward = Callable[[dict[str, Tensor], Sequence[Segment]], Tensor]
"""The inputs of a batch by name, and its segments, in; outputs (rows, ...) out."""
Metric = float | list[Any] | None
"""A metric's value: a number, a list of numbers (per class), a list of lists (a matrix); None where it is undefined."""


def fingerprint(task: Task, digest: str) -> str:
    """The import path of the task's class, and the first 16 characters of a digest."""
    return f"{type(task).__module__}:{type(task).__qualname__} {digest[:16]}"


class Task:
    """What is learned. A task is pickled to every worker, so it holds settings, not data or models."""

    metric: str | None = "accuracy"
    """The metric that chooses the best round and stops early, from 0 to 1; more is better. None: there is none."""

    cross_entropy: bool = False
    """Whether `loss` is the cross-entropy of outputs (rows, classes) and labels (rows,): then an objective may replace
    it.
    """

    has_classes: bool = True
    """Whether an exported adapter comes with the names of classes."""

    @classmethod
    def from_settings(cls, *, data: Data, problem: Problem, partition: Partition, model: Model, seed: int) -> Self:
        """The task that these sections of the settings describe; by default one without arguments, configured."""
        try:
            task = cls()
        except TypeError as error:
            what = (
                f"{cls.__qualname__} needs arguments ({first_line(error)}): override from_settings, or give an object"
            )
            raise allowed("data.source", data.source, what) from error
        return task.configure(data=data, problem=problem, partition=partition, model=model, seed=seed)

    def configure(self, *, data: Data, problem: Problem, partition: Partition, model: Model, seed: int) -> Self:
        """The task with these sections of the settings. Called first, for a task that a user gives as an object."""
        return self

    def described(self, data: Data, model: Model) -> tuple[Data, Model]:
        """The two sections as config.yaml has them for a task that is given as an object.

        `data.fingerprint` must differ for tasks that may give other results with the same settings. By default it is
        the import path of the class, and a hash of those fields of a dataclass that are numbers, texts or null.
        """
        values: dict[str, object] = vars(self) if is_dataclass(self) else {}
        plain = {key: value for key, value in values.items() if isinstance(value, bool | int | float | str | None)}
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        return data.model_copy(update={"fingerprint": fingerprint(self, digest)}), model

    @property
    def parts(self) -> tuple[object, ...]:
        """The user's functions and models in the task. Their code is sent to the workers."""
        return ()

    def check(self, *, lora: Lora, server: Server, eval: Eval, engine: Engine) -> None:
        """Raises UserError where other settings do not fit the task. Called before any data are read."""

    def load_data(self) -> Federation:
        """Reads the rows and deals them out to clients. UserError, with file and row, where something is wrong."""
        raise NotImplementedError

    def load_base(self, federation: Federation) -> FrozenBase:
        """The frozen base model with its head, in float32, on the CPU.

        Every process calls this, and all of them must get the same weights. The model is called with the tensors of a
        batch by name, without the labels. It returns outputs (rows, ...), or an object that has them as `logits`. The
        weights may be shared with other trainers of the process: replace modules, but never write to weights.
        Raises UserError where the model cannot be loaded.
        """
        raise NotImplementedError

    @property
    def base_name(self) -> str:
        """The name or folder under which transformers finds the base model; exported adapters refer to it."""
        return ""

    def batching(self, base: FrozenBase, padding: str) -> Unpadded | Padded:
        """How rows become batches: without padding where the model can take them so. ``padding``: `engine.padding`.

        UserError where ``padding`` asks for what the model cannot do.
        """
        return Padded("all rows have one length")

    def sample(self) -> dict[str, Tensor]:
        """Inputs of the smallest batch, with which the model is tried in another number format; by default a text."""
        ids = torch.ones(1, 2, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def augment(self, batch: dict[str, Tensor], keys: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """The batch of a training step, changed at random: by default, as it is.

        ``keys``: (seed, number of rows) of each client, in the order of the batch. A seed is of the client, the round
        and the step. What happens to a row may depend on the seed of its client and its place there, and on nothing
        else: then it is the same in any pack.
        """
        return batch

    def make_forward(self, model: nn.Module, batching: Unpadded | Padded) -> Forward:
        """What computes outputs (rows, ...) from the inputs of a batch, by name, and its segments.

        Called once a process, when stacked layers have taken their places in the ``model``.
        """
        if isinstance(batching, Unpadded):
            return UnpaddedModel(model, batching)
        return lambda inputs, segments: logits_of(model(**inputs))

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(sums (rows,), counts (rows,)): each row's summed loss, and the number of terms in the sum.

        ``outputs`` (rows, ...) are the model's, in float32, and ``labels`` (rows, ...) those of the batch. A client's
        loss is the sum of its rows' sums over the sum of their counts. So the loss of a row depends on this row alone.
        """
        raise NotImplementedError

    def predictions(self, outputs: Tensor) -> Tensor:
        """What metrics need to know of each row's output, (rows, ...)."""
        return outputs

    def metrics(self, predictions: Tensor, labels: Tensor, federation: Federation) -> Mapping[str, Metric]:
        """A split's metrics beside its loss, by name. Called once a split, with all of its rows in their order."""
        return {}

    def metric_names(self) -> tuple[str, ...]:
        """The names that `metrics` returns: metrics.jsonl has them under `eval/` and `test/`. By default `metric`."""
        return () if self.metric is None else (self.metric,)

    def metric_keys(self, eval: Eval) -> tuple[str, ...]:
        """The keys of metrics.jsonl by which runs of the task can be compared: each holds one number.

        ``eval`` is the section `eval`, which decides what a run measures. The default is the loss and all of
        `metric_names`; a task whose metrics include lists overrides it.
        """
        suffixes = ("", "_masked") if eval.masked else ("",)
        names = ("loss", *self.metric_names())
        return tuple(f"{split}/{name}{suffix}" for split in ("eval", "test") for name in names for suffix in suffixes)

    generates: bool = False
    """Whether the model can write responses to rows, see `eval.generate_rows`: then the task has `generate`."""

    def generate(self, model: nn.Module, forward: Forward, prompts: dict[str, Tensor], most: int) -> Tensor:
        """(rows, up to ``most``) int64: the tokens of the responses to prompts, the most likely one at a time.

        ``prompts`` are a batch of `prompt_batch` of the rows, on the model's device. ``forward`` is what `make_forward`
        gave for the ``model``.
        """
        raise NotImplementedError

    def response_metrics(self, generated: Sequence[np.ndarray], rows: Rows, chosen: np.ndarray) -> Mapping[str, Metric]:
        """Metrics by name of the responses with these tokens to the ``chosen`` ``rows`` (indices) of a split."""
        return {}

    @property
    def exact(self) -> bool:
        """Whether `exact_metrics` gives the metrics. Then every round has them, and no validation rows are needed."""
        return type(self).exact_metrics is not Task.exact_metrics

    def exact_metrics(self, federation: Federation, changes: Mapping[str, LowRank | Tensor]) -> dict[str, float] | None:
        """Metrics, by their whole keys, of the global model by a formula; None where rows must be evaluated instead."""
        return None

    def save_tokenizer(self, folder: Any) -> None:
        """Writes what else the base model needs into the folder of an adapter or of a merged model."""

    def usage(self) -> Usage | None:
        """How an exported adapter is used without rayfed, for its model card; None where no other library can."""
        return None
