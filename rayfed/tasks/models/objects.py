"""Base models and tokenizers that are Python objects.

A model is a `torch.nn.Module`, or a function without arguments that makes one. The function is called in every process
that needs the model, with torch's generator in the same state. A run's config names the model by its fingerprint, and
every process checks that it has the model of this fingerprint.
"""

from __future__ import annotations

import copy
import hashlib
import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from rayfed import seeding
from rayfed.config.task import Model
from rayfed.errors import UserError, allowed, first_line
from rayfed.own_code import described, failure
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.models.base import FrozenBase, checked_tokenizer, frozen_base, load_tokenizer, logits_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = (
    "a model takes input_ids and attention_mask, both (rows, tokens), and returns logits (rows, classes), as a tensor "
    "or as the `logits` of an object"
)


def own_module(model: Any) -> nn.Module:
    """A copy of the module, or what the function makes: float32, on the CPU. UserError where ``model`` is neither."""
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise allowed("model", model, "it is a torch.nn.Module, or a function without arguments that makes one")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive_seed(0, "model.object"))
            try:
                made = model()
            except Exception as error:  # the code of a user's own function
                raise failure(error, UserError, f"model: {_name(model)}") from None
        if not isinstance(made, nn.Module):
            raise allowed("model", made, f"{_name(model)} should make a torch.nn.Module")
        model = made
    try:
        return copy.deepcopy(model).float().cpu()
    except Exception as error:  # such as weights without memory, or packed in 4 bits
        what = f"it cannot be copied to the CPU in float32 ({first_line(error)})"
        raise allowed("model", type(model).__name__, what) from error


def own_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer, or the one in a folder, with a padding token. UserError where it is neither."""
    from transformers import PreTrainedTokenizerBase

    if isinstance(tokenizer, str | Path):
        try:
            return load_tokenizer(Model(name=str(tokenizer)))
        except UserError as error:
            raise UserError(str(error).replace("model.name", "tokenizer", 1)) from None
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise allowed("tokenizer", tokenizer, "it is a tokenizer of transformers, or the path of its folder")
    return checked_tokenizer(copy.deepcopy(tokenizer), type(tokenizer).__name__)


def fingerprint(module: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """The import path of the module's class, and 16 digits of a hash of the modules, the weights and the tokenizer."""
    digest = hashlib.sha256(repr(module).encode())
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        digest.update(_json({k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "dtype")}))
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        array = np.ascontiguousarray(tensor.detach().numpy())
        digest.update(f"|{name}|{array.dtype}|{array.shape}|".encode())
        digest.update(array.data)
    # Not the whole tokenizer as JSON: it also has the padding and the cut of the last call.
    words = sorted(tokenizer.get_vocab().items())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend else {}
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    digest.update(_json([words, tokenizer.special_tokens_map, tokenizer.truncation_side, rules]))
    cls = type(module)
    return f"{cls.__module__}:{cls.__qualname__} {digest.hexdigest()[:16]}"


def load_own_base(
    model: Any, tokenizer: Any, settings: Model, federation: Federation, outputs: int, seed: int
) -> FrozenBase:
    """The object as a base, as `rayfed.tasks.models.base.load_base` gives it. ``outputs``: of a row, as its classes.

    UserError where it is not the model of `model.fingerprint`, has no head that can be found, has weights that are not
    finite or a BatchNorm, or fails on texts of the ``federation``.
    """
    module, tokenizer = own_module(model), own_tokenizer(tokenizer)
    if (found := fingerprint(module, tokenizer)) != settings.fingerprint:
        what = f"the model that is given has {found}; a function that makes one may only draw from torch's generator"
        raise allowed("model.fingerprint", settings.fingerprint, what)
    config: Any = getattr(module, "config", None)
    if settings.pooling == "mean" and not hasattr(config, "hidden_size"):
        raise allowed("model.pooling", "mean", f"{type(module).__name__} has no config.hidden_size; allowed is stock")
    if hasattr(config, "pad_token_id") and config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id  # GPT-2 finds a text's last token by it
    base = frozen_base(module, set(), settings, outputs, seed)
    if federation.train is not None:  # not where a finished run's model is loaded
        _check_form(base.model, federation, outputs)
    return base


def _check_form(model: nn.Module, federation: Federation, outputs: int) -> None:
    """UserError where the model fails on the longest text, or on the text with the largest token, of each split."""
    name = type(model).__name__
    for rows in (federation.train, federation.validation, federation.test):
        if not len(rows):
            continue
        tokens: Any = rows
        largest = np.searchsorted(tokens.offsets, int(np.argmax(tokens.ids)), side="right") - 1
        batch = rows.batch(np.array([int(np.argmax(rows.lengths)), int(largest)]), padded=True)
        try:
            with torch.no_grad():
                logits = logits_of(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))
        except UserError:
            raise
        except Exception as error:  # any module may be given, so any error may occur
            raise allowed("model", name, f"calling it fails with {described(error)}; {FORM}") from error
        if logits.shape != (2, outputs):
            raise allowed(
                "model", name, f"its logits for 2 rows and {outputs} classes are {tuple(logits.shape)}; {FORM}"
            )


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))
