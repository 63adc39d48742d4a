"""Prompts and responses as tokens: what the templates write, what counts, and the batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import ByT5Tokenizer

from rayfed.config import validate
from rayfed.config.task import Data
from rayfed.errors import UserError
from rayfed.tasks.data.dataset import Split, load_data
from rayfed.tasks.data.prompt_tokens import PromptTokens, tokenize_prompts
from rayfed.tasks.data.tokens import IGNORED

TURNS = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS


def tokenizer(template: str | None = None) -> ByT5Tokenizer:
    """Bytes; an end-of-text token behind every text."""
    found = ByT5Tokenizer()
    found.chat_template = template
    return found


def chat(*texts: str, system: str | None = None) -> tuple[dict[str, str], ...]:
    """Messages of the user and the assistant by turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return (*([{"role": "system", "content": system}] if system else []), *turns)


def settings(**more: object) -> Data:
    data: Data = validate({"data": {"task": "instruction", "max_tokens": 60, **more}}).data
    return data


def split(*rows: tuple[dict[str, str], ...]) -> Split:
    return Split(list(rows), np.zeros(len(rows), np.int64), origin="rows.jsonl")


def parts(tokens: PromptTokens, row: int = 0) -> tuple[str, str]:
    """The texts of a row's prompt and of what counts."""
    ids = tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()
    prompt = int(tokens.prompts[row])
    return tokenizer().decode(ids[:prompt]), tokenizer().decode(ids[prompt:])


@pytest.mark.parametrize(
    ("template", "more", "row", "prompt", "response"),
    [
        (None, {}, chat("1+1?", "2"), "1+1?\n", "2</s>"),
        (None, {"prompt_template": "Q {prompt} A "}, chat("1+1?", "2"), "Q 1+1? A ", "2</s>"),
        (TURNS, {"prompt_template": "{prompt}:\n"}, chat("1+1?", "2"), "1+1?:\n", "2</s>"),
        (TURNS, {}, chat("1+1?", "2"), "<u>1+1?<a>", "2</s>"),
        (TURNS, {"messages": "chat"}, chat("a", "b", "c", "d", system="s"), "<s>s<u>a<a>b<u>c<a>", "d</s>"),
        ("{{ date_string }}" + TURNS, {}, chat("1+1?", "2"), "26 Jul 2024<u>1+1?<a>", "2</s>"),  # on any day
        (TURNS + "</s>", {}, chat("1+1?", "2"), None, None),
    ],
)
def test_what_templates_write(
    template: str | None,
    more: dict[str, str],
    row: tuple[dict[str, str], ...],
    prompt: str | None,
    response: str | None,
) -> None:
    if prompt is None:  # the end belongs to the whole conversation, and would stand behind a prompt, too
        with pytest.raises(UserError, match=r"changes the prompt of rows.jsonl, row 1 for its response; allowed is"):
            tokenize_prompts(split(row), tokenizer(template), settings(**more))
        return
    tokens, used = tokenize_prompts(split(row), tokenizer(template), settings(**more))
    assert (parts(tokens), used.tolist()) == ((prompt, response), [True])
    assert tokens.response(0) == row[-1]["content"]


def test_a_template_that_fails_names_the_row() -> None:
    rows = split(chat("a", "b"), chat("a", "b", system="s"))
    with pytest.raises(UserError) as error:
        tokenize_prompts(rows, tokenizer(NO_SYSTEM), settings(messages="chat"))
    assert str(error.value) == "model.name: the chat template of its tokenizer fails on rows.jsonl, row 2: no system"


def test_responses_are_cut_and_rows_without_one_are_not_used() -> None:
    rows = split(chat("a", "bcdef"), chat("abcd", "e"), chat("ab", "cdef"))
    tokens, used = tokenize_prompts(rows, tokenizer(), settings(max_tokens=5))
    assert used.tolist() == [True, False, True]
    assert [parts(tokens, row) for row in (0, 1)] == [("a\n", "bcd"), ("ab\n", "cd")]
    assert [tokens.response(row) for row in (0, 1)] == ["bcdef", "cdef"]


def test_files_give_chats_and_columns_give_conversations(tmp_path: Path) -> None:
    rows = [{"chat": list(chat("a", "b", "c", "d")), "q": "a", "r": "b"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    pd.DataFrame(rows).drop(columns="chat").to_csv(tmp_path / "rows.csv")
    for file, more, wanted in (
        ("rows.jsonl", {"messages": "chat"}, chat("a", "b", "c", "d")),
        ("rows.parquet", {"messages": "chat"}, chat("a", "b", "c", "d")),
        ("rows.csv", {"prompt": "q", "response": "r"}, chat("a", "b")),
    ):
        own = settings(source="files", path=str(tmp_path / file), test=0.5, validation=0, **more)
        assert load_data(own, 0, labelled=()).train.texts == [wanted] * 2


def test_batches_count_the_tokens_of_responses() -> None:
    tokens, _ = tokenize_prompts(split(chat("a", "b"), chat("abc", "de"), chat("x", "yz")), tokenizer(), settings())
    rows = np.array([2, 0, 1])
    padded, flat = tokens.batch(rows, padded=True), tokens.batch(rows, padded=False)
    real = padded["attention_mask"].bool()
    assert flat["targets"].tolist() == [padded["targets"][real].tolist()]
    assert set(padded["targets"][~real].tolist()) == {IGNORED}
    for ids, targets, row in zip(padded["input_ids"].tolist(), padded["targets"].tolist(), rows.tolist()):
        counted = [target for target in targets if target != IGNORED]
        assert tokenizer().decode(counted) == parts(tokens, row)[1]
        assert all(target in (IGNORED, following) for target, following in zip(targets, ids[1:]))
    prompts = tokens.prompt_batch(rows)
    assert prompts["attention_mask"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    texts = [tokenizer().decode(ids[ids != 0]) for ids in prompts["input_ids"]]
    assert texts == [parts(tokens, row)[0] for row in rows.tolist()]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"prompt_template": "a"}, "data.prompt_template: got 'a', but it has {prompt} once"),
        (
            {"prompt_template": "{prompt}", "messages": "c"},
            "data.prompt_template: got '{prompt}', but data.messages are",
        ),
        ({"task": "causal_lm", "messages": "c"}, "data.messages: got 'c', but only data.task=instruction has prompts"),
    ],
)
def test_refusals(more: dict[str, str], line: str) -> None:
    with pytest.raises(UserError) as error:
        settings(**more)
    assert str(error.value).startswith(line)
