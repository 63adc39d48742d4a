"""Checks of a local model folder before transformers reads it, for what that would run, allocate or not notice."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from rayfed.config.task import Model
from rayfed.errors import allowed, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MOST_COUNT = 2**20  # of layers, heads, labels: transformers makes an object for each
SMALL = 10**8  # parameters that are no danger, whatever the checkpoint holds
MOST_RATIO = 16  # of a model's parameters to its checkpoint's entries: 4-bit weights are 8 to an entry


def check_name(name: str) -> None:
    """UserError if `model.name` is a file, or no name that a file system knows."""
    try:
        found = Path(name).exists() and not Path(name).is_dir()
    except (OSError, ValueError) as error:  # too long; a NUL character
        raise allowed("model.name", name, f"that is no name of a folder or model: {first_line(error)}") from None
    if found:
        raise allowed("model.name", name, "that is a file: a model is a folder or a name on the hub")


def check_folder(settings: Model, folder: Path) -> None:
    """UserError if the folder holds no model's settings, or an adapter, or settings that name code or absurd counts."""
    if (folder / "adapter_config.json").exists():
        raise allowed("model.name", settings.name, "that is an adapter's folder; name its base model")
    if not (folder / "config.json").is_file():
        raise allowed("model.name", settings.name, "this folder holds no config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise allowed("model.name", settings.name, f"its config.json is not JSON: {first_line(error)}") from None
    if not isinstance(config, dict):
        raise allowed("model.name", settings.name, "its config.json is not an object {...}")
    for key, value in config.items():
        if key.startswith(("num_", "n_")) and isinstance(value, int) and value > MOST_COUNT:
            what = f"its config.json has {key!r:.40}: {value!r:.40}"
            raise allowed("model.name", settings.name, f"{what}, and at most {MOST_COUNT} is allowed")
        if key.endswith("attn_implementation") and "/" in str(value) and not settings.trust_remote_code:
            what = f"its config.json takes attention kernels from the hub ({value!r:.40})"
            raise allowed("model.name", settings.name, f"{what}, which needs model.trust_remote_code=true")


def check_weights(settings: Model, folder: Path, config: PretrainedConfig, loader: Any) -> None:
    """UserError if the folder has no safetensors that can be read, or too few for the model that ``config`` describes.

    ``loader`` is transformers' class that builds the model. Nothing is allocated.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(PICKLED))
        what = f"pickled weights ({pickled[0]!r:.40}) are never loaded; save" if pickled else "save"
        raise allowed("model.name", settings.name, f"this folder holds no *.safetensors: {what} the model with those")
    tensors = entries = 0
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise allowed("model.name", settings.name, f"its {file.name} cannot be read: {first_line(error)}") from None
        tensors += len(shapes)
        entries += sum(map(math.prod, shapes))
    if (getattr(config, "num_hidden_layers", None) or 0) > tensors:
        what = f"its config.json has {config.num_hidden_layers} layers, and its weights are {tensors} tensors"
        raise allowed("model.name", settings.name, what)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = loader.from_config(copy.deepcopy(config), trust_remote_code=settings.trust_remote_code)
    except Exception as error:
        if "overflow" not in str(error):  # loading the model will say it
            return
        parameters = "more parameters than a tensor can have"
    else:
        count = sum(parameter.numel() for parameter in model.parameters())
        if count <= max(SMALL, MOST_RATIO * entries):
            return
        parameters = f"{count} parameters"
    raise allowed("model.name", settings.name, f"its config.json makes {parameters}, and its weights are {entries}")
