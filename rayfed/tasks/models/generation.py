"""Greedy generation: a batch of prompts, padded on the left, with a cache of keys and values."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rayfed.tasks.models.base import positions, quiet
from rayfed.tasks.models.next_token import NextTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayfed.tasks.base import Forward


def ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the tokenizer's end-of-text token, and those of the model's own settings."""
    own: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])]
    return sorted({int(token) for token in found if token is not None})


@torch.no_grad()
def generate(
    model: nn.Module, forward: Forward, prompts: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, most: int
) -> Tensor:
    """(rows, up to ``most``) int64: the tokens after each prompt, the most likely one at a time; padding after an end.

    They are fewer than ``most`` where all rows have ended, or where the longest prompt leaves no positions for more.
    ``prompts`` are `input_ids` and `attention_mask`, padded on the left. ``forward`` is what runs the ``model`` in the
    process; where it runs without padding, the model takes padded batches as long as this lasts.
    """
    from transformers import GenerationConfig

    longest, owner = prompts["input_ids"].shape[1], cast(Any, model)
    limit = positions(getattr(model, "config", None)) or longest + most
    settings = GenerationConfig(
        max_new_tokens=min(most, limit - longest), do_sample=False, eos_token_id=ends(model, tokenizer) or None,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    # What is missing in them would come from the model's own settings, which may have penalties and such.
    own, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        with forward.suspended() if isinstance(forward, NextTokens) else nullcontext(), quiet():
            found: Tensor = owner.generate(**prompts, generation_config=settings, use_cache=True)
    finally:
        owner.generation_config = own
    return found[:, longest:]
