"""Batches without padding, through any transformers model that can take them.

The tokens of a batch lie end to end in one row, (1, tokens): positions restart with every text, attention stays inside
a text (`rayfed.tasks.models.varlen_attention`), and everything else a model does to a token it does to each token alone. Only its
head wants texts again: between the encoder and whatever comes after it, hooks turn the row back into one entry per
text, which holds the states that the head reads. So the head's own code runs unchanged, on texts of one token.

Which states those are, and where a model's positions start, no configuration says. `choose_batching` finds out by trying: it
compares logits with those of a padded batch, and where nothing agrees the model is run with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.lora.packed.segments import Segment
from rayfed.tasks.data.tokens import Tokens
from rayfed.tasks.models.base import MeanPooledClassifier, quiet, widened
from rayfed.tasks.models.varlen_attention import NAME, PackedSequences, varlen_attention

Reads = Literal["mean", "first", "last", "all"]
AGREE = 1e-4  # largest difference of two logits that are the same, relative to the largest logit


@dataclass(frozen=True)
class Unpadded:
    """No padding. ``reads``: the states of a text that the head sees; ``start``: the position of a first token."""

    reads: Reads
    start: int = 0

    def __str__(self) -> str:
        seen = {"mean": "the mean of", "first": "the first of", "last": "the last of", "all": "all"}[self.reads]
        return f"none (the head reads {seen} a text's tokens)"


@dataclass(frozen=True)
class Padded:
    """Every text of a batch is padded to its longest, because of ``reason``."""

    reason: str

    def __str__(self) -> str:
        return f"to the longest of a batch ({self.reason})"


class UnpaddedModel:
    """A model that takes batches of `UnpaddedTokens`. From here on it takes no others, until `release`."""

    def __init__(self, model: nn.Module, how: Unpadded) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, varlen_attention)
        self.model, self.how = model, how
        self.encoder = _encoder(model)
        self.config: Any = self.encoder.config
        self.row: _Row | None = None
        self._before = self.config._attn_implementation, getattr(self.config, "use_cache", None)
        with quiet():
            self.encoder.set_attn_implementation(NAME)
        if self._before[1]:
            self.config.use_cache = False  # decoders would copy all keys and values for the sake of a next token
        # Some look at every batch's ids, and on a GPU wait for them, to warn of padding without a mask: here is none.
        self._warns = hasattr(self.encoder, "warn_if_padding_and_no_attention_mask")
        if self._warns:
            self.encoder.warn_if_padding_and_no_attention_mask = lambda *args: None
        self._hooks = [
            self.encoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.encoder.register_forward_hook(self._leave),
        ]
        pooler = getattr(self.encoder, "pooler", None)
        if isinstance(pooler, nn.Module):  # it reads the last layer's states, too, but from within the encoder
            self._hooks.append(pooler.register_forward_pre_hook(self._enter_pooler))

    def __call__(self, inputs: dict[str, Tensor], segments: Sequence[Segment]) -> Tensor:
        """Logits (rows, classes) of a batch whose segments say how long each row is."""
        self.row = _Row(inputs, segments, self.how, self.config.pad_token_id or 0)
        try:
            with self.row.sequences.in_use():
                logits: Tensor = self.model(input_ids=self.row.head_ids, attention_mask=self.row.head_mask).logits
                return logits
        finally:
            self.row = None

    def release(self) -> None:
        """Makes the model again what it was."""
        for hook in self._hooks:
            hook.remove()
        if self._warns:
            del self.encoder.warn_if_padding_and_no_attention_mask  # its class has its own
        implementation, cache = self._before
        with quiet():
            self.encoder.set_attn_implementation(implementation)
        if cache:
            self.config.use_cache = cache

    def _enter(self, _: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        row = self._in_use()
        others = {name: value for name, value in named.items() if not isinstance(value, Tensor)}
        return (), others | {"input_ids": row.ids, "position_ids": row.positions, "attention_mask": None}

    def _leave(self, _: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = self._in_use().per_text(output.last_hidden_state)
        return output

    def _enter_pooler(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if args[0].ndim != 3:
            raise ValueError("its pooler does not see every token's state")
        return (self._in_use().per_text(args[0]), *args[1:])

    def _in_use(self) -> _Row:
        assert self.row is not None, "this model takes flat batches only"
        return self.row


class _Row:
    """One batch: what the encoder gets (one row of tokens), and what the head is told it gets (a batch of texts)."""

    def __init__(self, inputs: dict[str, Tensor], segments: Sequence[Segment], how: Unpadded, pad_id: int) -> None:
        self.ids, self.how = inputs["input_ids"], how
        self.positions = inputs["position_ids"] + how.start
        self.sequences = PackedSequences([s.lengths for s in segments if s.lengths is not None], self.ids.device)
        ends = self.sequences.ends()
        self.lengths, self.places = ends.diff(), ends[1:] - 1 if how.reads == "last" else ends[:-1]
        # The ids matter to a head that looks for a text's last token itself.
        self.head_ids = self._padded(self.ids[0], pad_id) if how.reads == "all" else self.ids[0][self.places, None]
        ones = torch.ones_like(self.ids[0])
        self.head_mask = self._padded(ones, 0) if how.reads == "all" else torch.ones_like(self.head_ids)

    def per_text(self, states_1TD: Tensor) -> Tensor:
        """(1, tokens, D) -> (texts, 1, D), or padded to the longest (texts, longest, D) where the head reads all."""
        states_TD = states_1TD[0]
        if self.how.reads == "all":
            return self._padded(states_TD, 0.0)
        if self.how.reads == "mean":
            return torch.segment_reduce(widened(states_TD), "mean", lengths=self.lengths, unsafe=True)[:, None]
        return states_TD.index_select(0, self.places)[:, None]

    def _padded(self, x: Tensor, value: float) -> Tensor:
        """(tokens, ...) -> (texts, longest, ...)."""
        texts = self.sequences.texts()
        padded = texts.pad(x).view(texts.count, texts.longest, *x.shape[1:])
        return padded.masked_fill(texts.padding_mask.view(*padded.shape[:2]), value) if value else padded


def choose_batching(model: nn.Module, longest: int) -> Unpadded | Padded:
    """How this model can be run without padding on texts of up to ``longest`` tokens, or why it cannot.

    A function of the model alone: a few made-up texts, padded and not, must give the same logits. The model is left as
    it was.
    """
    try:
        config: Any = _encoder(model).config
        probe = _Probe(model, config, longest)
    except Exception as error:  # any model may come, and whatever it cannot do, it can be run with padding
        return Padded(f"{type(model).__name__}: {_first_line(error)}")
    starts = (0, (config.pad_token_id or 0) + 1)  # RoBERTa's positions start behind that of the padding
    reads: tuple[Reads, ...] = ("mean",) if isinstance(model, MeanPooledClassifier) else ("first", "last", "all")
    reason = "its logits would be others"
    for how in (Unpadded(read, start) for start in starts for read in reads):
        try:
            if probe.agrees(how):
                return how
        except Exception as error:
            reason = _first_line(error)
    return Padded(f"{type(model).__name__}: {reason}")


class _Probe:
    """Made-up texts, and a model's logits for them, padded."""

    def __init__(self, model: nn.Module, config: Any, longest: int) -> None:
        self.model = model
        self.tokens, self.segments = probe_texts(config, longest)
        self.rows = np.arange(len(self.tokens))
        with torch.no_grad():
            padded = self.tokens.batch(self.rows, padded=True)
            self.logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits

    @torch.no_grad()
    def agrees(self, how: Unpadded) -> bool:
        flat = UnpaddedModel(self.model, how)
        try:
            found = flat(self.tokens.unpadded(self.rows), self.segments)
        finally:
            flat.release()
        close = AGREE * float(self.logits.abs().max())
        return found.shape == self.logits.shape and bool(((found - self.logits).abs() <= close).all())


def probe_texts(config: Any, longest: int) -> tuple[Tokens, list[Segment]]:
    """Texts that a model of this configuration can read, the longest possible and short ones, of two clients."""
    lengths = [longest, *(min(n, longest) for n in (1, 3, 2, 5, 3))]
    pad_id = config.pad_token_id if config.pad_token_id is not None else -1
    drawn = np.random.default_rng(0).integers(0, config.vocab_size - (pad_id >= 0), sum(lengths))
    drawn += (pad_id >= 0) & (drawn >= pad_id)  # any token but padding
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.zeros(len(lengths), dtype=np.int64)
    tokens = Tokens(drawn.astype(np.int32), offsets, labels, config.pad_token_id or 0)
    return tokens, [Segment(0, 2, lengths=lengths[:2]), Segment(1, 4, lengths=lengths[2:])]


def _encoder(model: nn.Module) -> Any:
    """The part of the model below its head."""
    encoder = model.encoder if isinstance(model, MeanPooledClassifier) else getattr(model, "base_model", model)
    if encoder is model or not hasattr(encoder, "set_attn_implementation"):
        raise ValueError("it does not tell its encoder from its head")
    return encoder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
