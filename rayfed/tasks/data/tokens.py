"""Tokenised texts as flat arrays without padding, and the batches made of them.

Workers share the arrays in memory without a copy. A batch is either padded to the longest of its texts, or has no
padding at all. The arrays may be read-only (as those from an object store are), so nothing here writes to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayfed.errors import UserError, allowed, first_line
from rayfed.tasks.data.dataset import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 4_000_000  # most characters per call of the tokenizer: enough for its threads, and a few gigabytes
LONGEST = 1_000_000  # characters of a text that is tokenised whole, if it must be: about 2 seconds
IGNORED = -100  # the target of a token that does not count, as in torch
LOOKAHEAD = 16  # words after a token that may still change it; see `_encode_long`
WORD_END = re.compile(r"\S(?=[ \n])")  # of the kinds of white space, every tokenizer splits at these two

Encode = Callable[[list[Any]], list[list[Any]]]


@dataclass(frozen=True, eq=False)
class Tokens:
    """n concatenated texts as token ids. Text i is ``ids[offsets[i]:offsets[i + 1]]``; in a batch it has a token."""

    ids: np.ndarray  # (total,) int32
    offsets: np.ndarray  # (n + 1,) int64, from 0 to total
    labels: np.ndarray  # (n,) int64, class indices; (n, classes) bool or (n,) float32, see `labels`
    pad_id: int = 0  # the padding token of padded batches
    types: np.ndarray | None = None  # (total,) int8, the type of each token of pairs; None: models get none

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens per text."""
        return np.diff(self.offsets)

    def batch(self, rows: np.ndarray, padded: bool) -> dict[str, torch.Tensor]:
        """The given b texts (indices, any order) as int64 tensors, and their ``labels`` (b, ...).

        With ``padded``, ``input_ids`` and ``attention_mask`` are (b, longest): texts are padded on the right with
        ``pad_id``, where the mask is 0. Otherwise ``input_ids`` and ``position_ids`` are (1, tokens): texts follow each
        other, and positions start from 0 in every text. With `types` there are ``token_type_ids``, shaped as the ids.
        """
        starts = self.offsets[rows]
        lengths = self.offsets[np.asarray(rows) + 1] - starts
        positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = np.repeat(starts, lengths) + positions
        flat = {"input_ids": self.ids[places]} | ({} if self.types is None else {"token_type_ids": self.types[places]})
        labels = {"labels": torch.from_numpy(self.labels[rows])}  # a copy: writable
        if not padded:
            flat["position_ids"] = positions
            return {
                name: torch.from_numpy(own.astype(np.int64, copy=False))[None] for name, own in flat.items()
            } | labels
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        inputs = {"attention_mask": mask.astype(np.int64)}
        for name, own in flat.items():
            inputs[name] = np.full(mask.shape, self.pad_id if name == "input_ids" else 0, dtype=np.int64)
            inputs[name][mask] = own
        return {name: torch.from_numpy(own) for name, own in inputs.items()} | labels


def tokenize(
    split: Split, tokenizer: PreTrainedTokenizerBase, max_tokens: int, vocabulary: int | None = None,
    types: bool = False,
) -> Tokens:  # fmt: skip
    """The split's texts as tokens, each text cut to at most ``max_tokens`` tokens, special tokens included.

    A pair of texts becomes one row, as the tokenizer joins pairs; it cuts the longer text first. With ``types`` the
    tokens have the types that the tokenizer gives them.

    ``tokenizer`` has a padding token. A text without any token (an empty text, if the tokenizer adds no special tokens)
    becomes one token: the end, start or padding token, the first of them that exists. Raises UserError if
    ``max_tokens`` leaves no room for more than the special tokens, or exceeds the length that the tokenizer allows, or
    if a text has more than a million characters, and too few spaces to cut it by, or if the tokenizer fails, or gives
    tokens outside the model's ``vocabulary`` (None: unknown).
    """
    pairs = bool(split.texts) and isinstance(split.texts[0], tuple)
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_tokens <= special:  # with a smaller limit, a tokenizer silently cuts nothing
        raise allowed("data.max_tokens", max_tokens, f"the tokenizer alone adds {special} special tokens to each text")
    check_limit(tokenizer, max_tokens)
    encode = _encoder(tokenizer, split, types, truncation=True, max_length=max_tokens, verbose=False)
    usual = 16 * max_tokens + 2048  # characters; nearly every longer text has more than max_tokens tokens
    longest = max(LONGEST, 4 * usual)
    step = max(1, AT_ONCE // usual)
    lists: list[list[Any]] = []
    for start in range(0, len(split), step):
        texts = split.texts[start : start + step]
        sizes = [max(map(len, text)) if pairs else len(text) for text in texts]
        short = iter(encode([text for text, size in zip(texts, sizes) if size <= usual]))
        for row, (text, size) in enumerate(zip(texts, sizes), start):
            if size <= usual:
                lists.append(next(short))
            elif (ids := _encode_long(text, encode, tokenizer.truncation_side, max_tokens, usual, longest)) is not None:
                lists.append(ids)
            else:
                what = (
                    f"a text of more than {longest} characters has spaces between its words, and no second text: cut it"
                )
                raise UserError(f"data.text: got {size} characters in {split.place(row)}, but {what}")
    if not types:
        lists = [ids or [_filler(tokenizer)] for ids in lists]
        return join(lists, split, tokenizer, vocabulary)
    tokens = join([[token for token, _ in row] for row in lists], split, tokenizer, vocabulary)
    return replace(tokens, types=np.fromiter((kind for row in lists for _, kind in row), np.int8, len(tokens.ids)))


def tokenize_whole(split: Split, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> Tokens:
    """The split's texts as tokens, uncut, with their special tokens, and an end-of-text token if the tokenizer has one.

    A text without any token stays empty. UserError as in `tokenize`; for any text of more than a million characters.
    """
    lists, end = encode_whole(split, split.texts, "data.text", tokenizer), tokenizer.eos_token_id
    if end is not None:
        lists = [[*ids, end] if ids and ids[-1] != end else ids for ids in lists]
    return join(lists, split, tokenizer, vocabulary)


def encode_whole(
    split: Split, texts: list[str], field: str, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> list[list[int]]:
    """The ids of the texts of the split's rows, which the setting ``field`` names, uncut. UserError as above.

    ``options`` are arguments of the tokenizer.
    """
    encode = _encoder(tokenizer, split, False, verbose=False, **options)
    lists: list[list[int]] = []
    group: list[str] = []
    characters = 0
    for row, text in enumerate(texts):
        if len(text) > LONGEST:
            what = f"a text has at most {LONGEST}: cut it"
            raise UserError(f"{field}: got {len(text)} characters in {split.place(row)}, but {what}")
        group.append(text)
        characters += len(text)
        if characters > AT_ONCE - LONGEST or row == len(texts) - 1:
            lists += encode(group)
            group, characters = [], 0
    return lists


def check_limit(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    """UserError where rows of ``max_tokens`` tokens exceed the length that the tokenizer allows."""
    if max_tokens > tokenizer.model_max_length:
        raise allowed("data.max_tokens", max_tokens, f"the model takes at most {tokenizer.model_max_length} tokens")


def _encoder(tokenizer: PreTrainedTokenizerBase, split: Split, types: bool, **options: Any) -> Encode:
    """A function from texts of the split to their ids, with ``types`` to pairs of an id and its type.

    It raises UserError where the tokenizer fails.
    """

    def encode(texts: list[Any]) -> list[list[Any]]:
        if not texts:  # some tokenizers fail
            return []
        try:
            found = tokenizer(texts, padding=False, return_attention_mask=False, return_token_type_ids=types, **options)
        except Exception as error:  # tokenizers raises the class Exception itself
            what = f"its tokenizer fails on texts of {split.origin}"
            raise UserError(f"model.name: {what}: {first_line(error)}") from None
        ids: list[list[int]] = found["input_ids"]
        if not types:
            return ids
        return [list(zip(*row, strict=True)) for row in zip(ids, found["token_type_ids"], strict=True)]

    return encode


def join(lists: list[list[int]], split: Split, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> Tokens:
    """The ids of the split's texts as `Tokens`. UserError where an id is outside the model's vocabulary."""
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=int(offsets[-1]))
    most = vocabulary or np.iinfo(np.int32).max
    if (largest := int(flat.max(initial=0))) >= most:
        raise UserError(f"model.name: its tokenizer gives the token {largest}, but the model has {most} tokens")
    return Tokens(flat.astype(np.int32), offsets, split.labels, int(tokenizer.pad_token_id))


def _encode_long(
    text: str | tuple[str, str], encode: Encode, truncation_side: str, max_tokens: int, size: int, longest: int
) -> list[Any] | None:
    """The ids that ``encode`` gives for the whole text, made from as short a prefix as decides them.

    Tokenizers split a text at spaces and line ends, or have no token that reaches over one. A token depends on its own
    word and, where a pattern looks ahead, on the next words. So a prefix decides the ids if it ends with a word, and
    already has ``max_tokens`` tokens, the same ones, without its last `LOOKAHEAD` words. Prefixes grow from ``size`` to
    ``longest`` characters; a text up to ``longest`` is then encoded whole. None if the text is longer.

    Pairs are always encoded whole.
    """
    if isinstance(text, tuple):
        return encode([text])[0] if max(map(len, text)) <= longest else None
    while size < min(len(text), longest) and truncation_side == "right":
        ends = [match.end() for match in WORD_END.finditer(text, 0, size)]
        if len(ends) > LOOKAHEAD:
            ids, longer = encode([text[: ends[-1 - LOOKAHEAD]], text[: ends[-1]]])
            if len(ids) == max_tokens and ids == longer:
                return ids
        size *= 4
    return encode([text])[0] if len(text) <= longest else None


def _filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that replaces an empty text."""
    ids = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return next(int(token) for token in ids if token is not None)
