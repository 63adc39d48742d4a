"""Gradient checkpointing: of each of a model's layers only the input is kept, and the way back computes the rest anew.

It takes a fraction of the memory and up to half as much time again (a frozen layer costs a pass forward and one back,
now two forward), and gives the same bits. For that, the second way through a layer must be the first one again: the
same dropout, drawn from generators that have moved on by then, and the same texts, which attention reads from a context
that is left by then. transformers' own checkpointing knows neither, and it works in training mode alone, in which a
base draws dropout of its own that clients would share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayfed.errors import UserError
from rayfed.lora.stacked import Batch, Segment


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


def recompute(model: nn.Module, batch: Batch) -> None:
    """Makes the model checkpoint each of its layers, whose adapters read whose rows they get from ``batch``."""
    for layer in layers_of(model):
        layer.forward = partial(_checkpointed, layer.forward, batch)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # a decoder's cache would get its keys twice


def _checkpointed(forward: Any, batch: Batch, *args: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **named)
    segments = batch.segments
    again = _drawing_again(segments, [None if s.rng is None else s.rng.get_state() for s in segments])
    return checkpoint(
        partial(copy_context().run, forward), *args, use_reentrant=False, preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), again), **named,
    )  # fmt: skip


@contextmanager
def _drawing_again(segments: Sequence[Segment], states: Sequence[Tensor | None]) -> Iterator[None]:
    """The segments' generators as they were then, and afterwards as they are now."""
    now = [None if s.rng is None else s.rng.get_state() for s in segments]
    _set(segments, states)
    try:
        yield
    finally:
        _set(segments, now)


def _set(segments: Sequence[Segment], states: Sequence[Tensor | None]) -> None:
    for segment, state in zip(segments, states, strict=True):
        if segment.rng is not None and state is not None:
            segment.rng.set_state(state)
