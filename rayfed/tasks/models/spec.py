"""The description of the model that a run trains: adapted layers, head, number format, batching.

It is made once, before any actor starts, so a wrong model, target or rank is an error at that time. The driver and all
workers use the same description.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rayfed.config.method import Lora
from rayfed.errors import allowed, first_line
from rayfed.lora.packed.stack import head_values
from rayfed.lora.peft import is_conv1d, lora_config, match_targets, output_layer, peft_settings
from rayfed.tasks.models.base import FrozenBase, MeanPooledClassifier, in_dtype
from rayfed.tasks.models.checkpointing import layers_of
from rayfed.tasks.models.unpadded import Padded, Unpadded


@dataclass(frozen=True)
class ModelSpec:
    """What a run trains, and on which base."""

    shapes: Mapping[str, tuple[int, int]]  # (out, in) of every adapted layer, by name
    head: Mapping[str, Tensor]  # initial values of the trained head, by parameter name; empty if the head is frozen
    frozen_head: Mapping[str, Tensor]  # values of the frozen head, by parameter name; empty if the head is trained
    peft: Mapping[str, Any]  # the content of adapter_config.json
    root: str  # the exported adapter is that of the module of this name, ending in a dot; empty: of the whole model
    parameters: int  # number of parameters of the base model, with its head
    dtype: str  # number format of the frozen weights
    batching: Unpadded | Padded
    load_in_4bit: bool = False  # whether the linear layers' weights are rounded to 4 bits where they train

    @property
    def base_format(self) -> str:
        """The number format of the base, in words."""
        return f"4 bits, computed in {self.dtype}" if self.load_in_4bit else self.dtype

    @property
    def entries(self) -> int:
        """Number of entries of all adapted layers' weights: the size of a dense change of the base."""
        return sum(out * inner for out, inner in self.shapes.values())


def describe_model(
    base: FrozenBase, base_name: str, lora: Lora, dtype: str, batching: Unpadded | Padded, gradient_checkpointing: bool
) -> ModelSpec:
    """Describes what the run trains on the base model.

    Raises UserError if the targets match no module or a module that cannot be adapted, if the rank exceeds a layer's
    size, if the head cannot be trained, or if ``gradient_checkpointing`` is true and the model does not support it.
    """
    if gradient_checkpointing:
        layers_of(base.model)  # raises UserError if there are none
    # PEFT's class for a task needs the config of a model of transformers; without a task, PEFT takes any module.
    task_type = base.task_type if hasattr(base.model, "config") else None
    config = lora_config(**lora.model_dump(exclude={"train", "compute"}), head=base.heads, task_type=task_type)
    shapes = match_targets(base.model, config, base.heads)
    _check_untied(base.model, shapes)
    conv1d = any(is_conv1d(base.model.get_submodule(name)) for name in shapes)
    root = "encoder." if isinstance(base.model, MeanPooledClassifier) else ""  # transformers has no such classifier
    return ModelSpec(
        shapes,
        head_values(base.model, base.head),
        head_values(base.model, base.frozen_head),
        peft_settings(config, shapes, base=base_name, conv1d=conv1d, root=root),
        root,
        sum(p.numel() for p in base.model.parameters()),
        dtype,
        batching,
    )


def _check_untied(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> None:
    """UserError where the output layer is adapted and shares its weights with the embeddings of the input."""
    output = output_layer(model)
    for name in shapes:
        if model.get_submodule(name) is output and output.weight is model.get_input_embeddings().weight:  # type: ignore
            what = "it shares its weights with the embeddings of the input: a change would be of both"
            raise allowed("lora.target_modules", name, what)


def check_dtype(base: FrozenBase, name: str, dtype: str, inputs: Mapping[str, Tensor]) -> None:
    """Converts the base to ``dtype`` and runs it on the inputs, see `Task.sample`. Raises UserError if that fails."""
    base, kind = in_dtype(base, dtype), getattr(torch, dtype)
    try:
        with torch.no_grad():
            base.model(**{name: x.to(kind) if x.is_floating_point() else x for name, x in inputs.items()})
    except Exception as error:  # any model may be configured, so any error may occur
        what = f"{name!r} cannot compute in it ({first_line(error)}); allowed is float32"
        raise allowed("model.dtype", dtype, what) from None
