"""Tokenised texts as three flat arrays without padding, and the batches made of them.

Workers share the arrays in memory without a copy. A batch is either padded to the longest of its texts, or has no
padding at all. The arrays may be read-only (as those from an object store are), so nothing here writes to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from rayfed.errors import allowed
from rayfed.tasks.data.dataset import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1000  # texts per call of the tokenizer: enough for its threads, and few enough for Python lists


@dataclass(frozen=True, eq=False)
class Tokens:
    """n concatenated texts as token ids. Text i is ``ids[offsets[i]:offsets[i + 1]]`` and has at least one token."""

    ids: np.ndarray  # (total,) int32
    offsets: np.ndarray  # (n + 1,) int64, from 0 to total
    labels: np.ndarray  # (n,) int64, class indices
    pad_id: int = 0  # the padding token of padded batches

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens per text."""
        return np.diff(self.offsets)

    def batch(self, rows: np.ndarray, padded: bool) -> dict[str, torch.Tensor]:
        """The given b texts (indices, any order) as int64 tensors, ``labels`` (b,) among them.

        With ``padded``, ``input_ids`` and ``attention_mask`` are (b, longest): texts are padded on the right with
        ``pad_id``, where the mask is 0. Otherwise see `unpadded`.
        """
        if not padded:
            return self.unpadded(rows)
        starts = self.offsets[rows]
        lengths = self.offsets[np.asarray(rows) + 1] - starts
        positions = np.arange(lengths.max(initial=0))
        mask = positions < lengths[:, None]
        ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        ids[mask] = self.ids[(starts[:, None] + positions)[mask]]
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": torch.from_numpy(self.labels[rows].astype(np.int64)),  # a copy: writable
        }

    def unpadded(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The given b texts (indices, any order) as int64 tensors, concatenated without padding.

        ``input_ids`` (1, tokens); ``position_ids`` (1, tokens), from 0 in every text; ``labels`` (b,).
        """
        indices, positions = self._token_indices(rows)
        return {
            "input_ids": torch.from_numpy(self.ids[indices].astype(np.int64))[None],
            "position_ids": torch.from_numpy(positions)[None],
            "labels": torch.from_numpy(self.labels[rows].astype(np.int64)),
        }

    def _token_indices(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every token of the given texts: its index in ``ids``, and its position in its text; both (tokens,)."""
        starts = self.offsets[rows]
        lengths = self.offsets[np.asarray(rows) + 1] - starts
        ends = np.cumsum(lengths)
        positions = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
        return np.repeat(starts, lengths) + positions, positions


def tokenize(split: Split, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Tokens:
    """The split's texts as tokens, each text cut to at most ``max_tokens`` tokens, special tokens included.

    ``tokenizer`` has a padding token. A text without any token (an empty text, if the tokenizer adds no special tokens)
    becomes one token: the end, start or padding token, the first of them that exists. Raises UserError if
    ``max_tokens`` leaves no room for more than the special tokens, or exceeds the length that the tokenizer allows.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_tokens <= special:  # with a smaller limit, a tokenizer silently cuts nothing
        raise allowed("data.max_tokens", max_tokens, f"the tokenizer alone adds {special} special tokens to each text")
    if max_tokens > tokenizer.model_max_length:
        raise allowed("data.max_tokens", max_tokens, f"the model takes at most {tokenizer.model_max_length} tokens")
    lists: list[list[int]] = []
    for start in range(0, len(split), CHUNK):
        texts = split.texts[start : start + CHUNK]
        options = {"return_attention_mask": False, "return_token_type_ids": False}
        lists += tokenizer(texts, truncation=True, max_length=max_tokens, padding=False, **options)["input_ids"]
    if not all(lists):
        filler = _filler(tokenizer)
        lists = [ids or [filler] for ids in lists]
    offsets = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    flat = np.fromiter((token for ids in lists for token in ids), dtype=np.int32, count=int(offsets[-1]))
    return Tokens(flat, offsets, split.labels, int(tokenizer.pad_token_id))


def _filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that replaces an empty text."""
    ids = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return next(int(token) for token in ids if token is not None)
