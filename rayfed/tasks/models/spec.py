"""The model_spec of a run: what is trained and on top of what, found out once, before anything starts.

Drawing it loads the base model and lets PEFT match the targets; so whatever is wrong with model, targets or rank is
refused here. Workers and driver are handed the model_spec and need to ask neither again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rayfed.config import Experiment
from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, fresh_adapter, scale_of
from rayfed.lora.packed.stack import head_values
from rayfed.lora.peft import is_conv1d, lora_config, match_targets, peft_settings
from rayfed.tasks.models.base import FrozenBase, base_name, in_dtype, longest_input
from rayfed.tasks.models.cache import shared_base
from rayfed.tasks.models.checkpointing import layers_of
from rayfed.tasks.models.unpadded import Padded, Unpadded, choose_batching


@dataclass(frozen=True)
class ModelSpec:
    """The adapted layers' (out, in) by name, the head's values by parameter name, and PEFT's view of both."""

    shapes: Mapping[str, tuple[int, int]]
    head: Mapping[str, Tensor]  # what it starts from, where it trains
    frozen_head: Mapping[str, Tensor]  # what it stays at, where it does not
    peft: Mapping[str, Any]  # the content of adapter_config.json
    parameters: int  # of the base model, its head included
    padding: Unpadded | Padded  # how texts are sequences into batches

    @property
    def entries(self) -> int:
        """Entries of all adapted layers' weights: what a whole change of the base takes."""
        return sum(out * inner for out, inner in self.shapes.values())

    def trained_shapes(self, experiment: Experiment) -> Mapping[str, tuple[int, int]]:
        """The layers whose adapters train: none where only the head does."""
        return {} if experiment.lora.train == "head" else self.shapes

    def start(self, experiment: Experiment) -> Adapter:
        """The adapter the run starts from; see `fresh_adapter`."""
        lora = experiment.lora
        scale = scale_of(lora.rank, lora.alpha, lora.rslora)
        return fresh_adapter(self.trained_shapes(experiment), self.head, lora.rank, scale, experiment.seed)

    def fresh(self, rank: int, experiment: Experiment) -> Adapter:
        """A fresh pair of that rank for every adapted layer, whether it trains or not; no head."""
        scale = scale_of(rank, experiment.lora.alpha, experiment.lora.rslora)
        return fresh_adapter(self.shapes, {}, rank, scale, experiment.seed)


def describe_model(experiment: Experiment, classes: int) -> ModelSpec:
    """Loads the base model for ``classes`` classes and describes what the run trains on it.

    Raises UserError where the model cannot be loaded or its head not be trained, where no module or an unfit one
    matches the targets, where the rank exceeds a layer's size, or where `model.dtype`, `engine.padding` or
    `engine.gradient_checkpointing` asks for what the model cannot do.
    """
    base = shared_base(experiment, classes)
    if experiment.engine.gradient_checkpointing:
        layers_of(base.model)  # or a refusal
    config = lora_config(**experiment.lora.model_dump(exclude={"train"}), head=base.heads)
    shapes = match_targets(base.model, config, base.heads)
    conv1d = any(is_conv1d(base.model.get_submodule(name)) for name in shapes)
    model_spec = ModelSpec(
        shapes,
        head_values(base.model, base.head),
        head_values(base.model, base.frozen_head),
        peft_settings(config, shapes, base=base_name(experiment), conv1d=conv1d),
        sum(p.numel() for p in base.model.parameters()),
        _padding(experiment, base.model),
    )
    if experiment.model.dtype != "float32":
        _check_dtype(experiment, base)
    return model_spec


def _check_dtype(experiment: Experiment, base: FrozenBase) -> None:
    """A made-up text through the base in its number format: where a layer refuses what another gives it, so do we."""
    model, ids = in_dtype(base, experiment.model.dtype), torch.ones(1, 2, dtype=torch.int64)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:  # any model may come
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.dtype: got {experiment.model.dtype!r}, but {experiment.model.name!r} cannot compute in it "
            f"({reason}); allowed is float32"
        ) from None


def _padding(experiment: Experiment, model: nn.Module) -> Unpadded | Padded:
    """Decided here, once, so that all workers agree."""
    wanted = experiment.engine.padding
    if experiment.data.source == "lowrank":
        return Padded("all rows have one length")
    if wanted == "batch":
        return Padded("engine.padding=batch")
    most = experiment.data.max_tokens
    found = choose_batching(model, min(most, longest_input(experiment.model) or most))
    if wanted == "never" and isinstance(found, Padded):
        raise UserError(
            f"engine.padding: got 'never', but this model needs padding ({found.reason}); allowed are auto and batch"
        )
    return found
