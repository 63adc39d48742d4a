"""PEFT: the LoRA config and the layers that it targets. `rayfed.lora.peft_files` has the files.

`match_targets` finds the layers that PEFT would adapt for the same `target_modules`: names, a regular expression,
`all-linear`, or PEFT's default for the architecture.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rayfed.errors import UserError, allowed

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "base_model.model."


def lora_config(
    *, rank: int, alpha: float, rslora: bool, dropout: float, target_modules: str | Sequence[str] | None,
    layers_to_transform: Sequence[int] | None, head: Sequence[str] = (), task_type: str | None = "SEQ_CLS",
) -> LoraConfig:  # fmt: skip
    """PEFT's config of an adapter.

    ``target_modules`` and ``layers_to_transform`` mean what they mean in PEFT. ``head`` names the modules that are
    trained in full (PEFT's `modules_to_save`).
    """
    from peft import LoraConfig

    return LoraConfig(
        task_type=task_type,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT declares int, but computes with floats as well
        use_rslora=rslora,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str | None) else list(target_modules),
        layers_to_transform=None if layers_to_transform is None else list(layers_to_transform),
        modules_to_save=list(head) or None,
    )


def match_targets(model: nn.Module, config: LoraConfig, head: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that gets an adapter, by module name, in model order.

    Modules of the ``head`` are never targets. Where the config's `target_modules` is None, PEFT's default for the
    architecture is written into the config.

    Raises:
        UserError: the regular expression is invalid, nothing matches, a matched module is no linear layer, a number of
            `layers_to_transform` has no matching module, or the rank exceeds a layer's smaller side.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", "custom")
        if kind not in DEFAULTS:
            raise UserError(f"lora.target_modules: got null, but PEFT has no default for {kind!r}; name the modules")
        config.target_modules = list(DEFAULTS[kind])
    targets = config.target_modules
    shown = repr(targets if isinstance(targets, str) else sorted(targets))
    got = f"lora.target_modules: got {shown}"
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise UserError(
                f"{got}, but it is no regular expression ({error}); a list of names is allowed, too"
            ) from None
    shapes: dict[str, tuple[int, int]] = {}
    linear: set[str] = set()
    for name, module in model.named_modules():
        if not name or any(name == h or name.startswith(h + ".") for h in head):
            continue
        fits = isinstance(module, nn.Linear) or is_conv1d(module)
        if fits:
            linear.add(name.rpartition(".")[2])
        if fits if targets == "all-linear" else check_target_module_exists(config, name):
            if not fits:
                raise UserError(
                    f"{got}, but it matches {name}, a {type(module).__name__}; "
                    "adapters fit linear layers (nn.Linear, Conv1D)"
                )
            shapes[name] = layer_shape(module)
    if not isinstance(targets, str):  # else PEFT takes no numbers
        _check_layer_numbers(model, config, shapes)
    if not shapes:
        raise UserError(f"{got}, but it matches no layer; this model's linear layers are {', '.join(sorted(linear))}")
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if config.r > min(shape):
        raise UserError(
            f"lora.rank: got {config.r}, but {name} is {shape[0]} x {shape[1]}; at most {min(shape)} is allowed"
        )
    return shapes


def _check_layer_numbers(model: nn.Module, config: LoraConfig, shapes: Iterable[str]) -> None:
    """UserError where a number of `layers_to_transform` has no module in ``shapes``. PEFT passes over such a number."""
    from peft.tuners.tuners_utils import check_target_module_exists

    def has_modules(number: int, names: Iterable[str]) -> bool:
        alone = copy.copy(config)
        alone.layers_to_transform = [number]
        # A module named in full is a target whatever its number.
        return any(check_target_module_exists(alone, name) for name in names if name not in targets)

    wanted: Any = config.layers_to_transform or ()
    targets: Any = config.target_modules
    missing = [number for number in wanted if not has_modules(number, shapes)]
    if missing:
        names = [name for name, _ in model.named_modules() if name]
        numbers = sorted({int(part) for name in names for part in name.split(".") if part.isdigit()})
        there = ", ".join(str(number) for number in numbers if has_modules(number, names))
        what = f"the layers with modules that match are {there}" if there else "no layer with a number has such modules"
        raise allowed("lora.layers_to_transform", missing, what)


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of an nn.Linear or a transformers Conv1D. TypeError for any other module."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if is_conv1d(layer):
        inner, outer = layer.weight.shape  # type: ignore[misc]
        return outer, inner
    raise TypeError(f"{type(layer).__name__} is neither nn.Linear nor Conv1D")


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the layer is GPT-2's Conv1D, whose weight is stored as (in, out). PEFT calls this `fan_in_fan_out`."""
    # By class name, because this package does not import transformers.
    return type(layer).__name__ == "Conv1D" and getattr(layer, "weight", torch.empty(0)).ndim == 2


def peft_settings(
    config: LoraConfig, layers: Iterable[str], *, base: str, conv1d: bool, root: str = ""
) -> dict[str, Any]:
    """The content of `adapter_config.json`: plain values that JSON can store, equal for equal arguments.

    ``layers`` are the names of the adapted layers. ``base`` is the name or folder of the base model. ``conv1d`` says
    that the layers store their weights transposed (GPT-2). With a ``root``, the adapter is described as that of the
    module of this name (with a dot at its end), a feature extractor: layers under other names, no head.
    """
    settings: dict[str, Any] = config.to_dict()
    targets = settings["target_modules"]
    if root:  # patterns and numbers of layers were written for the names in the whole model
        targets = [name.removeprefix(root) for name in layers]
        settings |= {"task_type": "FEATURE_EXTRACTION", "modules_to_save": None, "layers_to_transform": None}
    elif targets is None or targets == "all-linear":  # replaced by names, so that a reader of the file needs no PEFT
        targets = layers
    # PEFT stores names in a set, whose order differs from process to process.
    settings["target_modules"] = targets if isinstance(targets, str) else sorted(targets)
    settings |= {"base_model_name_or_path": base, "fan_in_fan_out": conv1d, "inference_mode": True}
    return json.loads(json.dumps(settings, default=sorted))  # sets become lists
