"""Tokenised texts as three flat arrays: what workers share, and what a batch is cut from.

Unpadded arrays lie in shared memory without a copy and hold no padding; a batch holds none either (`flat`), or is padded to
the longest of its own rows (`batch`).
The arrays may be read-only (they come from an object store), so nothing here writes into them.
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

AT_ONCE = 1000  # texts per call of the tokenizer: enough to keep its threads busy, little enough to hold as lists


@dataclass(frozen=True, eq=False)
class Tokens:
    """n texts as token ids, one after the other. Text i is ``ids[offsets[i]:offsets[i + 1]]``, at least one token."""

    ids: np.ndarray  # (total,) int32
    offsets: np.ndarray  # (n + 1,) int64, from 0 to total
    labels: np.ndarray  # (n,) int64, class indices
    pad_id: int = 0  # fills padded batches

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens per text."""
        return np.diff(self.offsets)

    def batch(self, rows: np.ndarray, padded: bool) -> dict[str, torch.Tensor]:
        """The given texts (indices, any order) as int64 tensors; ``labels`` (b,).

        Padded on the right to the longest of them: ``input_ids`` (b, longest) holds ``pad_id`` where ``attention_mask``
        (b, longest) is 0. Or end to end, see `unpadded`.
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
            "labels": torch.from_numpy(self.labels[rows].astype(np.int64)),  # indexing and astype copy: writable
        }

    def unpadded(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The given texts (indices, any order) as int64 tensors without padding, end to end.

        ``input_ids`` (1, tokens); ``position_ids`` (1, tokens), from 0 in every text; ``labels`` (b,).
        """
        places, positions = self._token_places(rows)
        return {
            "input_ids": torch.from_numpy(self.ids[places].astype(np.int64))[None],
            "position_ids": torch.from_numpy(positions)[None],
            "labels": torch.from_numpy(self.labels[rows].astype(np.int64)),
        }

    def _token_places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of every token of the given texts, its place in ``ids`` and its position in its text."""
        starts = self.offsets[rows]
        lengths = self.offsets[np.asarray(rows) + 1] - starts
        ends = np.cumsum(lengths)
        positions = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
        return np.repeat(starts, lengths) + positions, positions


def tokenize(split: Split, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Tokens:
    """The split's texts as tokens, special ones included, each text cut to at most ``max_tokens``.

    ``tokenizer`` has a padding token. A text that has no tokens at all (an empty one, where the tokenizer adds no special
    tokens) becomes one token: the end, start or padding token, whichever exists first. Raises UserError where
    ``max_tokens`` leaves no room beside the special tokens, or is more than the tokenizer's model takes.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_tokens <= special:  # a tokenizer asked for less silently cuts nothing
        raise allowed("data.max_tokens", max_tokens, f"the tokenizer alone adds {special} special tokens to each text")
    if max_tokens > tokenizer.model_max_length:
        raise allowed("data.max_tokens", max_tokens, f"the model takes at most {tokenizer.model_max_length} tokens")
    lists: list[list[int]] = []
    for start in range(0, len(split), AT_ONCE):
        texts = split.texts[start : start + AT_ONCE]
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
    ids = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return next(int(token) for token in ids if token is not None)
