"""Adapters in PEFT's file format: a folder that `PeftModel.from_pretrained` loads.

Written from the tensors alone, without the base model. Values are stored as they are (float32); the scale travels as
`lora_alpha`, so that PEFT computes the same ``alpha / r`` (or ``alpha / sqrt(r)``) that the run trained with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from rayfed.files import atomic_path
from rayfed.lora.adapter import Adapter, LowRank, scale_of

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "base_model.model."


def peft_settings(config: LoraConfig, layers: Iterable[str], *, base: str, conv1d: bool) -> dict[str, Any]:
    """The content of `adapter_config.json`: plain values, the same for equal runs.

    ``layers`` are the adapted layers' names; ``base`` is the base model's name or folder; ``conv1d`` says that the
    layers store their weights transposed (GPT-2).
    """
    settings: dict[str, Any] = config.to_dict()
    targets = settings["target_modules"]
    if targets is None or targets == "all-linear":  # resolved once, so that a reader needs no PEFT to know them
        targets = layers
    # PEFT keeps names in a set, whose order differs from process to process.
    settings["target_modules"] = targets if isinstance(targets, str) else sorted(targets)
    settings |= {"base_model_name_or_path": base, "fan_in_fan_out": conv1d, "inference_mode": True}
    return json.loads(json.dumps(settings, default=sorted))  # sets become lists


def save_peft(
    path: Path, adapter: Adapter, settings: Mapping[str, Any], files: Mapping[str, str] | None = None
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` (and further small text ``files``) to ``path``.

    ``settings`` are the run's `peft_settings`. All pairs must have its rank and scale: else ValueError.
    """
    ranks = {pair.rank for pair in adapter.layers.values()}
    if ranks and ranks != {settings["r"]}:
        raise ValueError(f"PEFT's r is {settings['r']}, the adapter's ranks are {sorted(ranks)}")
    scales = {pair.scale for pair in adapter.layers.values()}
    scale = scale_of(settings["r"], settings["lora_alpha"], settings["use_rslora"])
    if any(not math.isclose(s, scale) for s in scales):
        raise ValueError(f"PEFT's scale is {scale}, the adapter's scales are {sorted(scales)}")
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in adapter.head.items()}
    for name, pair in adapter.layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.B
    texts = {"adapter_config.json": json.dumps(settings, indent=2, sort_keys=True) + "\n", **(files or {})}
    with atomic_path(path) as folder:
        folder.mkdir()
        whole = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
        save_file(whole, folder / "adapter_model.safetensors", {"format": "pt"})
        for file, text in texts.items():
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
