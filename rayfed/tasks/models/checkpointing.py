"""Gradient checkpointing: a layer saves only its input, and its activations are computed again for the gradient.

It needs a fraction of the memory and up to half as much more time (two forward passes and one backward pass per layer
instead of one each), and it gives the same bits. The second forward pass must equal the first: the same dropout, which
is a hash (`rayfed.lora.packed.dropout`), and the same texts, which attention reads from a context variable.

transformers' own checkpointing does not restore context variables. It also works only in training mode, in which the
base would use its own dropout, with random numbers that clients share.
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
    """The layers that transformers would checkpoint. Raises UserError if the model has none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"engine.gradient_checkpointing: got true, but {type(model).__name__} has no layers that support it; "
            "allowed is false"
        )
    return layers


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Makes the model checkpoint each of its layers (in place). Raises UserError if it has none."""
    for layer in layers_of(model):
        layer.forward = partial(_checkpointed, layer.forward)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # the second forward pass would add its keys to a decoder's cache again


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    in_same_context = partial(copy_context().run, forward)
    return checkpoint(in_same_context, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
