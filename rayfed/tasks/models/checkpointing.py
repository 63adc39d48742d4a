"""Gradient checkpointing: of each of a model's layers only the input is kept, and the way back computes the rest anew.

It takes a fraction of the memory and up to half as much time again (a frozen layer costs a pass forward and one back,
now two forward), and gives the same bits. For that, the second way through a layer must be the first one again: the
same dropout (which is a hash, see `rayfed.lora.packed.dropout`), and the same texts, which attention reads from a context that
is left by then. transformers' own checkpointing does not know of that context, and it works in training mode alone, in
which a base draws dropout of its own that clients would share.
"""

from __future__ import annotations

from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rayfed.errors import UserError


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers, too, would checkpoint. UserError where the model has none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"engine.gradient_checkpointing: got true, but {type(model).__name__} has no layers that can be computed "
            "anew; allowed is false"
        )
    return layers


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Makes the model checkpoint each of its layers."""
    for layer in layers_of(model):
        layer.forward = partial(_checkpointed, layer.forward)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # a decoder's cache would get its keys twice


def _checkpointed(forward: Any, *args: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **named)
    within = partial(copy_context().run, forward)
    return checkpoint(within, *args, use_reentrant=False, preserve_rng_state=False, **named)
