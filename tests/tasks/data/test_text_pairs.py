"""Pairs of texts (`data.text_pair`): the tokenizer's own ids of a pair, from any source; what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from card_lines import defined_by_card
from transformers import AutoTokenizer

import rayfed
from rayfed.api import prepare
from rayfed.errors import UserError
from rayfed.lora.packed.segments import Segment
from rayfed.tasks.models.base import model_path
from rayfed.tasks.models.unpadded import Padded

ROWS = [
    {"text": f"card{i % 6} the{i % 20}", "other": "loan1 " * (i % 7 * 3) + f"app{i % 5}", "label": i % 3}
    for i in range(60)
]


@pytest.fixture
def pairs(tiny, tmp_path: Path):
    def make(*overrides: str):
        for split, rows in (("train", ROWS), ("test", ROWS[:15])):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tiny(f"data.path={tmp_path}", "data.text_pair=other", "data.validation=0", *overrides)

    return make


def expected(plan, rows, max_tokens: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model_path(plan.task.model_settings))
    return [
        tokenizer(row["text"], row["other"], truncation=True, max_length=max_tokens)["input_ids"] for row in rows
    ]  # fmt: skip


def ids(tokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens.ids, tokens.offsets[1:-1])]


@pytest.mark.parametrize("max_tokens", [128, 12])
def test_ids_are_the_tokenizers_own(pairs, max_tokens):
    plan = prepare(pairs(f"data.max_tokens={max_tokens}"))
    wanted = expected(plan, ROWS, max_tokens)
    assert max(map(len, wanted)) <= max_tokens
    assert ids(plan.federation.train) == wanted


@pytest.mark.parametrize("padding", ["auto", "batch"])
@pytest.mark.parametrize("pooling", ["mean", "stock"])
def test_the_model_gets_the_types_of_the_tokenizer(pairs, pooling, padding):
    plan = prepare(pairs("model.name=minilm", f"model.pooling={pooling}", f"engine.padding={padding}"))
    assert isinstance(plan.model.batching, Padded) == (padding == "batch")
    path, rows = model_path(plan.task.model_settings), ROWS[::7]
    inputs = AutoTokenizer.from_pretrained(path)(
        [row["text"] for row in rows], [row["other"] for row in rows], padding=True, return_tensors="pt"
    )
    assert inputs["token_type_ids"].any()
    tokens, base = plan.federation.train, plan.task.load_base(plan.federation).model
    batch = tokens.batch(np.arange(60)[::7], padded=padding == "batch")
    forward = plan.task.make_forward(base, plan.model.batching)
    with torch.no_grad():
        lengths = inputs["attention_mask"].sum(1).tolist()
        found = forward({k: v for k, v in batch.items() if k != "labels"}, [Segment(0, len(rows), lengths=lengths)])
        if padding == "auto":
            forward.release()
        torch.testing.assert_close(found, base(**inputs).logits, rtol=1e-4, atol=1e-5)
        untyped = base(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert (untyped - found).abs().max() > 1e-3


def test_there_are_no_types_where_the_tokenizer_gives_none(pairs):
    assert prepare(pairs()).federation.train.types is None


def test_python_rows_and_tuples_are_the_same_pairs(pairs):
    settings = pairs().with_({"data.source": "stdlib", "data.path": None})
    plan = prepare(settings, task=rayfed.TextClassification(train=ROWS, test=ROWS[:15], text_pair="other"))
    tuples = [tuple(row[name] for name in ("text", "other", "label")) for row in ROWS]
    again = prepare(settings, task=rayfed.TextClassification(train=tuples, test=tuples[:15]))
    assert ids(plan.federation.train) == ids(again.federation.train) == expected(plan, ROWS, 128)


def test_a_long_text_of_a_pair_is_cut_like_any(pairs):
    long = {**ROWS[0], "text": "loan2 the4 " * 5_000}
    settings = pairs("data.max_tokens=16").with_({"data.source": "stdlib", "data.path": None})
    rows = [long, *ROWS[1:]]
    plan = prepare(settings, task=rayfed.TextClassification(train=rows, test=ROWS[:15], text_pair="other"))
    assert ids(plan.federation.train) == expected(plan, rows, 16)


@pytest.mark.parametrize(("pooling", "model"), [("mean", ()), ("stock", ()), ("mean", ("model.name=minilm",))])
def test_the_lines_of_the_card_give_the_accuracy_of_the_run(pairs, tmp_path, monkeypatch, pooling, model):
    more = ("server.rounds=2", "client.optimizer=adamw", "client.lr=0.01", "eval.every=2", f"model.pooling={pooling}")
    result = rayfed.run(pairs(*more, *model), out=tmp_path / "run")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert ("return_token_type_ids=True" in card) == bool(model)
    found = defined_by_card(tmp_path / "run", monkeypatch)
    logits = found["logits"]([(row["text"], row["other"]) for row in ROWS[:15]])
    predicted = [found["id2label"][i] for i in logits.argmax(-1).tolist()]
    right = [guess == str(row["label"]) for guess, row in zip(predicted, ROWS[:15], strict=True)]
    assert sum(right) / 15 == pytest.approx(result.metrics[-1]["test/accuracy"])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("data.text_pair=none_such",), r"data.text_pair: got 'none_such', but .*train.jsonl has the columns"),
        (("data.task=causal_lm",), r"data.text_pair: got 'other', but data.task=causal_lm takes no pairs"),
        (("data.max_tokens=3",), r"data.max_tokens: got 3, but the tokenizer alone adds 3 special tokens"),
    ],
)
def test_refusals(pairs, overrides, line):
    with pytest.raises(UserError, match=line):
        prepare(pairs(*overrides))


def test_a_second_text_changes_what_is_learned(pairs, tmp_path):
    """The label depends on the second text alone: a model that sees it learns it."""
    rows = [{"text": "the1", "other": ("card0", "loan1", "rate2")[i % 3], "label": i % 3} for i in range(60)]
    settings = pairs().with_({"data.source": "stdlib", "data.path": None})
    more = {
        "server.rounds": 6,
        "client.lr": 0.01,
        "client.epochs": 3,
        "client.optimizer": "adamw",
        "partition.kind": "iid",
        "partition.clients": 4,
        "server.cohort": 4,
    }
    task = rayfed.TextClassification(train=rows, test=rows[:15], text_pair="other")
    losses = rayfed.run(settings.with_(more), task=task, out=tmp_path / "run").history["train/loss"].tolist()
    assert losses[-1] < 1.0 < math.log(3)  # the least that a model of the first text alone can reach
