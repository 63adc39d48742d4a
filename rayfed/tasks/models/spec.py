"""What a run trains on top of which model: found out once, before anything starts.

Describing a model lets PEFT match the targets, so a wrong model, target or rank is refused here. Driver and workers
receive the description and never ask again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayfed.config.method import Lora
from rayfed.errors import UserError
from rayfed.lora.packed.stack import head_values
from rayfed.lora.peft import is_conv1d, lora_config, match_targets, peft_settings
from rayfed.tasks.models.base import FrozenBase, in_dtype
from rayfed.tasks.models.checkpointing import layers_of
from rayfed.tasks.models.unpadded import Padded, Unpadded


@dataclass(frozen=True)
class ModelSpec:
    """The adapted layers' (out, in) by name, the head's values by parameter name, and PEFT's view of both."""

    shapes: Mapping[str, tuple[int, int]]
    head: Mapping[str, Tensor]  # the initial values of the head, where it trains
    frozen_head: Mapping[str, Tensor]  # the values of the head, where it does not
    peft: Mapping[str, Any]  # the content of adapter_config.json
    parameters: int  # of the base model, its head included
    dtype: str  # number format of the frozen weights
    batching: Unpadded | Padded

    @property
    def entries(self) -> int:
        """Entries of all adapted layers' weights: the size of a dense change of the base."""
        return sum(out * inner for out, inner in self.shapes.values())


def describe_model(
    base: FrozenBase, base_name: str, lora: Lora, dtype: str, batching: Unpadded | Padded, gradient_checkpointing: bool
) -> ModelSpec:
    """Describes what the run trains on the base model.

    Raises UserError where no module or an unfit one matches the targets, where the rank exceeds a layer's size, where
    the head cannot be trained, or where the model cannot checkpoint gradients.
    """
    if gradient_checkpointing:
        layers_of(base.model)  # raises UserError where there are none
    config = lora_config(**lora.model_dump(exclude={"train"}), head=base.heads)
    shapes = match_targets(base.model, config, base.heads)
    conv1d = any(is_conv1d(base.model.get_submodule(name)) for name in shapes)
    return ModelSpec(
        shapes,
        head_values(base.model, base.head),
        head_values(base.model, base.frozen_head),
        peft_settings(config, shapes, base=base_name, conv1d=conv1d),
        sum(p.numel() for p in base.model.parameters()),
        dtype,
        batching,
    )


def check_dtype(base: FrozenBase, name: str, dtype: str) -> None:
    """Runs a made-up text through the base in the number format. UserError where a layer refuses another's output."""
    base = in_dtype(base, dtype)
    ids = torch.ones(1, 2, dtype=torch.int64)
    try:
        with torch.no_grad():
            base.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:  # any model may come
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.dtype: got {dtype!r}, but {name!r} cannot compute in it ({reason}); allowed is float32"
        ) from None
