"""What all tasks have in common whose model gives a vector a text: any transformers model for sequence classification.

Rows come from Python's standard library, from files or from the Hugging Face hub (`data.source`). Rows, model, loss and
further metrics may be Python objects. What is not given comes from the settings; the first four fields always do. In
config.yaml, functions are known by their import path and rows by their content (`data.fingerprint`), and a model by its
weights and its tokenizer (`model.fingerprint`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.config.task import OBJECT, Data, Model
from rayfed.errors import UserError, allowed
from rayfed.tasks._texts import TextTask
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.models.base import FrozenBase, load_base, longest_input, takes_types, vocabulary
from rayfed.tasks.models.cache import shared_base
from rayfed.tasks.models.objects import fingerprint as own_fingerprint
from rayfed.tasks.models.objects import load_own_base, own_module, own_tokenizer
from rayfed.tasks.models.unpadded import Padded, Unpadded, choose_batching
from rayfed.tasks.models.usage import Usage, classifier_usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SequenceClassification(TextTask):
    """A task of one output vector a text. Subclasses say what labels are, and give the loss and the metrics."""

    problem_type: ClassVar[str]
    """transformers' name for what the model's outputs are."""
    columns = ("text", "text_pair", "label", "client")

    _: KW_ONLY
    text_pair: str | None = None
    """The column with the second text of a pair; None: `data.text_pair`."""
    model: nn.Module | Callable[[], nn.Module] | None = None
    """The base model, in place of `model.name`: a module, or a function that makes one (with torch's generator always
    in the same state). It is called with `input_ids` and `attention_mask`, both (rows, tokens), and returns the logits
    (rows, classes), as a tensor or as the `logits` of an object. Its head is its child `classifier` or `score`, made of
    linear layers. With model.pooling=mean it is an encoder of transformers.
    """
    tokenizer: Any = None
    """The model's tokenizer: one of transformers, or the path of its folder. It is needed with `model`."""
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    """(outputs (rows, ...), labels (rows, ...)) -> each row's loss (rows,); None: the task's own."""
    metric_fns: Mapping[str, Callable[[Tensor, Tensor], float]] = field(default_factory=dict)
    """More metrics by name: (predictions (n, ...), labels (n, ...)) -> a number, over all rows of a split."""

    def outputs(self, federation: Federation) -> int:
        """The length of a text's output vector."""
        return len(federation.classes)

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """The class (n,) by which a partition by label divides rows with these labels (n, ...)."""
        return labels

    def row_losses(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`Task.loss`, where the user gives no `loss_fn`."""
        raise NotImplementedError

    def described(self, data: Data, model: Model) -> tuple[Data, Model]:
        data, _ = super().described(data, model)
        return data, self._described_model(model)

    def _functions_digest(self) -> bytes:
        functions = {"loss": self.loss_fn, **self.metric_fns}
        for name, function in functions.items():
            if function is not None and not callable(function):
                raise allowed(f"task.{name}", function, "it is a function")
        if wrong := set(self.metric_fns) & {"loss", *replace(self, metric_fns={}).metric_names()}:
            raise allowed("task.metric_fns", min(wrong), "this name is taken")
        names = (f"|{name}={getattr(f, '__module__', '')}:{_name(f)}" for name, f in functions.items() if f is not None)
        return "".join(names).encode()

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
            what = f"the model was a Python object: give it again, {type(self).__name__}(model=..., tokenizer=...)"
            raise allowed("model.fingerprint", settings.fingerprint, what)
        return settings

    @property
    def parts(self) -> tuple[object, ...]:
        model = self.model
        of_model = {type(module) for module in model.modules()} if isinstance(model, nn.Module) else (model,)
        return tuple(filter(None, (self.loss_fn, *self.metric_fns.values(), *of_model)))

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows; a module travels on the CPU."""
        model = own_module(self.model) if isinstance(self.model, nn.Module) else self.model
        return {**super().__getstate__(), "model": model}

    def load_data(self) -> Federation:
        from rayfed.tasks.data.dataset import load_data
        from rayfed.tasks.data.experiences import divide
        from rayfed.tasks.data.partition import client_names
        from rayfed.tasks.data.tokens import tokenize

        data = load_data(self.data, self.seed, self._source(self.data))
        strata, owners = self.strata(data.train.labels), data.owners
        parts, experiences = divide(strata, owners, len(data.classes), self.partition, self.seed)
        cut, named = self.data.max_tokens, self.model is None
        # A model that is an object is tried on the longest text and the largest token, see `load_own_base`.
        limit = longest_input(self.model_settings) if named else None
        words = vocabulary(self.model_settings) if named else None
        tokenizer = self._tokenizer()
        types = self._types()
        splits = tuple(
            tokenize(split, tokenizer, cut, words, types) for split in (data.train, data.validation, data.test)
        )
        self._check_length(splits, limit)
        names = client_names(owners["train"], self.partition)
        return Federation.of(splits, data.classes, parts, names, experiences)

    def load_base(self, federation: Federation) -> FrozenBase:
        outputs, problem = self.outputs(federation), self.problem_type
        settings, seed = self.model_settings, self.seed
        key = self._base_key(f"{problem} {outputs}")
        if self.model is None:
            return shared_base(key, lambda: load_base(settings, outputs, seed, problem))
        own = self.model, self.tokenizer
        return shared_base(key, lambda: load_own_base(*own, settings, federation, outputs, seed))

    @property
    def base_name(self) -> str:
        return super().base_name if self.model is None else OBJECT

    def choose_batching(self, model: nn.Module, longest: int) -> Unpadded | Padded:
        return choose_batching(model, longest)

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.loss_fn is None:
            return self.row_losses(outputs, labels)
        losses = self.loss_fn(outputs, labels)
        if losses.shape != labels.shape[:1]:
            what = f"one loss for each of {len(labels)} rows is needed"
            raise allowed("task.loss_fn", f"a result of shape {tuple(losses.shape)}", what)
        return losses, torch.ones_like(losses)

    def user_metrics(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        """The metrics of `metric_fns`."""
        return {name: float(function(predictions, labels)) for name, function in self.metric_fns.items()}

    def usage(self) -> Usage | None:
        if self.model is not None:
            return None
        pairs = self.data.text_pair is not None
        return classifier_usage(self.model_settings, self.data.max_tokens, self.problem_type, pairs, self._types())

    def _types(self) -> bool:
        """Whether the tokens of pairs have types: their tokenizer gives some, and the model has embeddings for them."""
        if self.data.text_pair is None or self.model is not None or not takes_types(self.model_settings):
            return False
        return "token_type_ids" in self._tokenizer().model_input_names

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return super()._tokenizer() if self.model is None else own_tokenizer(self.tokenizer)


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))
