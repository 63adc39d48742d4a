"""Adapters in PEFT's file format: a folder that `PeftModel.from_pretrained` loads.

Written from the tensors alone, without the base model. Values are stored as they are (float32); the scale travels as
`lora_alpha`, so that PEFT computes the same ``alpha / r`` (or ``alpha / sqrt(r)``) that the run trained with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from rayfed.files import atomic_path
from rayfed.lora.adapter import Adapter, LowRank, scale_of

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "base_model.model."


def save_peft(
    path: Path, adapter: Adapter, config: LoraConfig, *, base: str, conv1d: bool, files: dict[str, str] | None = None
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` (and further small text ``files``) to ``path``.

    ``config`` is the run's `peft_config`; ``base`` the base model's name or folder; ``conv1d`` whether the adapted
    layers store their weights transposed (GPT-2). All pairs must have its rank and scale: else ValueError.
    """
    ranks = {pair.rank for pair in adapter.layers.values()}
    if ranks and ranks != {config.r}:
        raise ValueError(f"PEFT's r is {config.r}, the adapter's ranks are {sorted(ranks)}")
    scales = {pair.scale for pair in adapter.layers.values()}
    scale = scale_of(config.r, config.lora_alpha, config.use_rslora)
    if any(not math.isclose(s, scale) for s in scales):
        raise ValueError(f"PEFT's scale is {scale}, the adapter's scales are {sorted(scales)}")
    config = copy.copy(config)
    if config.target_modules is None or config.target_modules == "all-linear":
        config.target_modules = sorted(adapter.layers)  # resolved once, so that a reader needs no PEFT to know them
    elif not isinstance(config.target_modules, str):  # PEFT keeps a set, whose order differs from process to process
        config.target_modules = sorted(config.target_modules)
    config.base_model_name_or_path = base
    config.fan_in_fan_out = conv1d
    config.inference_mode = True
    tensors = {}
    for name, pair in adapter.layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.A.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.B.contiguous()
    for name, tensor in adapter.head.items():
        tensors[f"{PREFIX}{name}"] = tensor.contiguous()
    with atomic_path(path) as folder:
        folder.mkdir()
        save_file({k: v.clone() for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(folder))
        for file, text in (files or {}).items():
            (folder / file).write_text(text, encoding="utf-8")


def load_peft(path: Path, scale: float, head: Sequence[str] = ()) -> Adapter:
    """The adapter in a PEFT folder (safetensors only; pickled files are not read). ``scale`` is that of every layer.

    ``head`` names the modules that are head; other tensors than theirs and LoRA pairs raise ValueError.
    """
    tensors = load_file(Path(path) / "adapter_model.safetensors")
    factors: dict[str, dict[str, object]] = {}
    rest = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        layer, found, part = name.rpartition(".lora_")
        if found and part in {"A.weight", "B.weight"}:
            factors.setdefault(layer, {})[part[0]] = tensor
        elif any(name.startswith(h + ".") for h in head):
            rest[name] = tensor
        else:
            raise ValueError(f"{path}: {key} is neither a LoRA pair nor part of the head {tuple(head)}")
    return Adapter({n: LowRank(f["B"], f["A"], scale) for n, f in factors.items()}, rest)  # type: ignore[arg-type]
