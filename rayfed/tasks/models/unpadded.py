"""Batches without padding, for any transformers model that supports them.

The texts of a batch are concatenated into one row, (1, tokens). Positions restart in every text, and attention stays
inside a text (`rayfed.tasks.models.varlen_attention`). Everything else that an encoder does, it does to each token by
itself. Only the head needs separate texts. So hooks between the encoder and the head turn the row into one entry per
text, with the state that the head uses: the code of the head runs unchanged, on texts of one token.

Neither that state nor a model's first position is in its configuration. `choose_batching` finds both by trial: it
compares the logits with those of a padded batch. If they differ for all variants, the model needs padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.errors import first_line
from rayfed.lora.packed.segments import Segment
from rayfed.tasks.data.tokens import Tokens
from rayfed.tasks.models.base import MeanPooledClassifier, quiet, to_float32
from rayfed.tasks.models.varlen_attention import NAME, PackedSequences, varlen_attention

HeadInput = Literal["mean", "first", "last", "all"]
TOLERANCE = 1e-4  # largest difference of equal logits, relative to the largest logit


@dataclass(frozen=True)
class Unpadded:
    """No padding. ``head_input``: the token states that the head uses; ``first_position``: of a text's first token."""

    head_input: HeadInput
    first_position: int = 0

    def __str__(self) -> str:
        used = {"mean": "the mean of", "first": "the first of", "last": "the last of", "all": "all"}[self.head_input]
        return f"none (the head reads {used} a text's tokens)"


@dataclass(frozen=True)
class Padded:
    """All texts of a batch are padded to its longest text, for the given ``reason``."""

    reason: str

    def __str__(self) -> str:
        return f"to the longest of a batch ({self.reason})"


class UnpaddedEncoder:
    """A model's encoder, which computes attention over concatenated texts until `release`."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, varlen_attention)
        self.encoder = encoder_of(model)
        self.config: Any = self.encoder.config
        self._install()

    def _install(self) -> None:
        self._original = self.config._attn_implementation, getattr(self.config, "use_cache", None)
        with quiet():
            self.encoder.set_attn_implementation(NAME)
        if self._original[1]:
            self.config.use_cache = False  # a decoder would copy all keys and values for a next token
        # Some models look for padding in the ids of every batch to warn of a missing mask, and a GPU waits for that.
        self._warns = hasattr(self.encoder, "warn_if_padding_and_no_attention_mask")
        if self._warns:
            self.encoder.warn_if_padding_and_no_attention_mask = lambda *args: None

    def release(self) -> None:
        """Restores the encoder as it was."""
        if self._warns:
            del self.encoder.warn_if_padding_and_no_attention_mask  # the method of its class remains
        implementation, use_cache = self._original
        with quiet():
            self.encoder.set_attn_implementation(implementation)
        if use_cache:
            self.config.use_cache = use_cache


class UnpaddedModel(UnpaddedEncoder):
    """Runs a model on batches without padding (`Tokens.batch`). Until `release`, the model takes no other batches."""

    def __init__(self, model: nn.Module, batching: Unpadded) -> None:
        super().__init__(model)
        self.model, self.batching = model, batching
        self._batch: _UnpaddedBatch  # that of the call in progress
        self._hooks = [
            self.encoder.register_forward_pre_hook(self._replace_inputs, with_kwargs=True),
            self.encoder.register_forward_hook(self._replace_output),
        ]
        pooler = getattr(self.encoder, "pooler", None)
        if isinstance(pooler, nn.Module):  # part of the encoder, but it uses the last layer's states like a head
            self._hooks.append(pooler.register_forward_pre_hook(self._replace_pooler_input))

    def __call__(self, inputs: dict[str, Tensor], segments: Sequence[Segment]) -> Tensor:
        """Logits (rows, classes) of a batch. ``segments`` give the length of each row."""
        self._batch = batch = _UnpaddedBatch(inputs, segments, self.batching, self.config.pad_token_id or 0)
        with batch.sequences.in_use():
            logits: Tensor = self.model(input_ids=batch.head_ids, attention_mask=batch.head_mask).logits
        del self._batch
        return logits

    def release(self) -> None:
        """Restores the model as it was."""
        for hook in self._hooks:
            hook.remove()
        super().release()

    def _replace_inputs(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        others = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
        unpadded = {"input_ids": self._batch.ids, "position_ids": self._batch.positions, "attention_mask": None}
        return (), others | unpadded | self._batch.types

    def _replace_output(self, _: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = self._batch.states_by_text(output.last_hidden_state)
        return output

    def _replace_pooler_input(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if args[0].ndim != 3:
            raise ValueError("its pooler does not see every token's state")
        return (self._batch.states_by_text(args[0]), *args[1:])


class _UnpaddedBatch:
    """The inputs of the encoder, (1, tokens), and the inputs that the head is given, (texts, 1) or (texts, longest)."""

    def __init__(self, inputs: dict[str, Tensor], segments: Sequence[Segment], batching: Unpadded, pad_id: int) -> None:
        self.ids, self.head_input = inputs["input_ids"], batching.head_input
        self.positions = inputs["position_ids"] + batching.first_position
        self.types = {name: own for name, own in inputs.items() if name == "token_type_ids"}
        self.sequences = PackedSequences([s.lengths for s in segments if s.lengths is not None], self.ids.device)
        offsets = self.sequences.offsets()
        self.lengths = offsets.diff()
        self.selected = offsets[1:] - 1 if self.head_input == "last" else offsets[:-1]  # (texts,): token for the head
        ids, ones = self.ids[0], torch.ones_like(self.ids[0])
        if self.head_input == "all":
            self.head_ids, self.head_mask = self._pad(ids, pad_id), self._pad(ones, 0)
        else:  # the ids matter to heads that look for a text's last token
            self.head_ids = ids[self.selected, None]
            self.head_mask = torch.ones_like(self.head_ids)

    def states_by_text(self, states_1TD: Tensor) -> Tensor:
        """(1, tokens, D) -> (texts, 1, D), or (texts, longest, D) with padding if the head uses all states."""
        states_TD = states_1TD[0]
        if self.head_input == "all":
            return self._pad(states_TD, 0.0)
        if self.head_input == "mean":
            return torch.segment_reduce(to_float32(states_TD), "mean", lengths=self.lengths, unsafe=True)[:, None]
        return states_TD.index_select(0, self.selected)[:, None]

    def _pad(self, x: Tensor, value: float) -> Tensor:
        """(tokens, ...) -> (texts, longest, ...)."""
        texts = self.sequences.texts()
        padded = texts.pad(x).view(texts.count, texts.longest, *x.shape[1:])
        return padded.masked_fill(texts.padding_mask.view(*padded.shape[:2]), value) if value else padded


@torch.no_grad()
def choose_batching(model: nn.Module, longest: int) -> Unpadded | Padded:
    """How to run the model without padding on texts of up to ``longest`` tokens, or why it needs padding.

    The answer depends on the model alone: a few random texts must give the same logits with and without padding. The
    model is left unchanged.
    """
    try:
        config: Any = encoder_of(model).config
        tokens, segments = random_texts(config, longest)
        rows = np.arange(len(tokens))
        padded, unpadded = tokens.batch(rows, padded=True), tokens.batch(rows, padded=False)
        logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    except Exception as error:  # any model may be configured; whatever fails here, it can be run with padding
        return Padded(f"{type(model).__name__}: {first_line(error)}")
    allowed = TOLERANCE * float(logits.abs().max())
    first_positions = (0, (config.pad_token_id or 0) + 1)  # RoBERTa's positions start after the padding token's id
    mean_pooled = isinstance(model, MeanPooledClassifier)
    head_inputs: tuple[HeadInput, ...] = ("mean",) if mean_pooled else ("first", "last", "all")
    reason = "its logits differ without padding"
    for batching in (Unpadded(used, position) for position in first_positions for used in head_inputs):
        try:
            found = _logits_without_padding(model, batching, unpadded, segments)
            if found.shape == logits.shape and bool(((found - logits).abs() <= allowed).all()):
                return batching
        except Exception as error:
            reason = first_line(error)
    return Padded(f"{type(model).__name__}: {reason}")


def _logits_without_padding(
    model: nn.Module, batching: Unpadded, inputs: dict[str, Tensor], segments: Sequence[Segment]
) -> Tensor:
    unpadded = UnpaddedModel(model, batching)
    try:
        return unpadded(inputs, segments)
    finally:
        unpadded.release()


def random_texts(config: Any, longest: int) -> tuple[Tokens, list[Segment]]:
    """Texts of two clients, one of ``longest`` tokens and short ones, without padding tokens."""
    lengths = [longest, *(min(n, longest) for n in (1, 3, 2, 5, 3))]
    pad_id = config.pad_token_id or 0
    words = np.setdiff1d(np.arange(config.vocab_size, dtype=np.int32), [pad_id])
    ids = np.random.default_rng(0).choice(words, sum(lengths))
    tokens = Tokens(ids, np.cumsum([0, *lengths]), np.zeros(len(lengths), dtype=np.int64), pad_id)
    return tokens, [Segment(0, 2, lengths=lengths[:2]), Segment(1, 4, lengths=lengths[2:])]


def encoder_of(model: nn.Module) -> Any:
    """The part of the model below its head."""
    encoder = model.encoder if isinstance(model, MeanPooledClassifier) else getattr(model, "base_model", model)
    if encoder is model or not hasattr(encoder, "set_attn_implementation"):
        raise ValueError("it has no encoder apart from its head")
    return encoder
