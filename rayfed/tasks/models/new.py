"""New models with random weights, from a config of transformers: what `rayfed pretrain` trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rayfed import seeding
from rayfed.config.pretrain import Pretrain
from rayfed.config.task import Model
from rayfed.errors import UserError, allowed, first_line
from rayfed.suggestions import did_you_mean
from rayfed.tasks.models.base import load_tokenizer, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FIELD = "pretrain.model"


def write_language_model(settings: Pretrain, folder: Path, seed: int) -> None:
    """Writes a causal language model and its tokenizer. UserError where the settings describe none."""
    from transformers import AutoModelForCausalLM, ByT5Tokenizer

    tokenizer = ByT5Tokenizer() if settings.tokenizer == "bytes" else load_tokenizer(Model(name=settings.tokenizer))
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write(AutoModelForCausalLM, _config(settings, vocab_size=len(tokenizer), **ids), folder, seed)
    tokenizer.save_pretrained(folder)


def write_image_model(settings: Pretrain, folder: Path, seed: int) -> None:
    """Writes a model for images, without a head, and its image processor. UserError where the settings describe none.

    The processor resizes to the model's size, and maps bytes to -1 to 1.
    """
    from transformers import AutoModel

    config = _config(settings)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if not isinstance(size, int):
        raise allowed(FIELD, config.model_type, "a model for images has an image_size")
    _write(AutoModel, config, folder, seed)
    half = [0.5] * channels
    with quiet():
        from transformers import ViTImageProcessor

        processor = ViTImageProcessor(size={"height": size, "width": size}, image_mean=half, image_std=half)
    processor.save_pretrained(folder)


def _config(settings: Pretrain, **more: Any) -> PretrainedConfig:
    """transformers' config, with ``more`` values that the settings do not have."""
    from transformers import AutoConfig

    given = dict(settings.model or {})
    kind = given.pop("model_type", None)
    if not isinstance(kind, str):
        what = "it should be a config of transformers, such as {model_type: vit, image_size: 32, patch_size: 4}"
        raise UserError(f"{FIELD}: got no model_type, but {what}")
    try:
        default = AutoConfig.for_model(kind)
    except ValueError:
        raise allowed(f"{FIELD}.model_type", kind, "transformers has no such model") from None
    known = {*default.to_dict(), *default.attribute_map}
    if unknown := sorted(set(given) - known):
        hint = did_you_mean(unknown[0], known)
        raise UserError(f"{FIELD}.{unknown[0]}: unknown key; {hint}see transformers' {type(default).__name__}")
    try:
        return AutoConfig.for_model(kind, **{**more, **given})
    except Exception as error:  # a config may check its values in any way
        raise UserError(f"{FIELD}: {type(default).__name__} refuses it: {first_line(error)}") from None


def _write(loader: Any, config: PretrainedConfig, folder: Path, seed: int) -> None:
    """Writes a model of the config with random weights, keyed by ``seed``."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seeding.derive_seed(seed, "pretrain.init"))
        try:
            loader.from_config(config).save_pretrained(folder)
        except Exception as error:  # any sizes may be configured
            raise UserError(f"{FIELD}: {config.model_type} cannot be built: {first_line(error)}") from None
