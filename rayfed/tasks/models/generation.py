"""Greedy generation: a batch of prompts, padded on the left, with a cache of keys and values."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

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

    # Every field that changes greedy generation has a value: a missing one would be that of the model's own settings.
    longest = prompts["input_ids"].shape[1]
    limit = positions(getattr(model, "config", None)) or longest + most
    settings = GenerationConfig(
        max_new_tokens=min(most, limit - longest), max_length=None, min_new_tokens=0, min_length=0, do_sample=False,
        num_beams=1, num_return_sequences=1, repetition_penalty=1.0, encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0, eos_token_id=ends(model, tokenizer) or None, pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )  # fmt: skip
    with forward.suspended() if isinstance(forward, NextTokens) else nullcontext(), quiet():
        found: Tensor = model.generate(**prompts, generation_config=settings)  # type: ignore[operator]
    return found[:, longest:]
