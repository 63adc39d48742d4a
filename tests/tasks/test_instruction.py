"""Instruction tuning end to end: whole runs, their figures and responses by other code, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from card_lines import defined_by_card
from conftest import SHARED_DATA
from language_models import COMMON, save_language_model
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

import rayfed
from rayfed import wire
from rayfed.api import build_components, prepare
from rayfed.clients.messages import EvalJob, GenerateJob
from rayfed.clients.trainer import Trainer
from rayfed.config import Experiment, validate
from rayfed.config.load import _apply
from rayfed.errors import UserError
from rayfed.lora.packed.segments import Segment
from rayfed.tasks.instruction import InstructionTuning
from rayfed.tasks.metrics import responses
from rayfed.tasks.models.unpadded import Padded, Unpadded

SETTINGS: dict[str, Any] = {
    "data": {"task": "instruction", "source": "files", "client": "owner", "max_tokens": 40},
    "partition": {"kind": "natural"},
    "lora": {"rank": 2, "alpha": 8, "target_modules": "all-linear"},
    "method": {"name": "fedit"},
    "client": {"optimizer": "adamw", "lr": 0.01, "batch_size": 4, "epochs": 2},
    "server": {"rounds": 2, "cohort": 2},
    "eval": {"generate_rows": 5, "max_new_tokens": 8, "masked": False},
    "engine": {"kind": "local"},
    "tracking": {"console": "off", "wandb": "off"},
}
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def questions(count: int, start: int = 0) -> list[dict[str, str]]:
    """Sums of one digit, with questions of two lengths and a reasoning of four."""
    rows = []
    for i in range(start, start + count):
        a, b, owner = i % 7, i % 3, ("Ann", "Bob", "Cay")[i % 3]
        prompt, response = f"{'what is ' * (i % 2)}{a}+{b}?", f"{'so ' * (i % 4)}#### {a + b}"
        rows.append({"prompt": prompt, "response": response, "owner": owner})
    return rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A GPT-2 without a chat template, and a Llama with one."""
    found = {kind: save_language_model(tmp_path_factory.mktemp(kind), kind) for kind in ("gpt2", "llama")}
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(found["llama"])
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    for name, found in (("train", questions(30)), ("validation", questions(6, 3)), ("test", questions(9, 30))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def experiment(rows: Path, model: Path, *overrides: str) -> Experiment:
    settings = copy.deepcopy(SETTINGS)
    for override in (f"data.path={rows}", f"model.name={model}", *overrides):
        _apply(settings, override)
    return validate(settings)


@pytest.mark.parametrize(
    ("kind", "template", "padding"),
    [
        pytest.param("gpt2", None, "never", marks=pytest.mark.slow),
        pytest.param("gpt2", "### {prompt}\n:", "batch", marks=pytest.mark.slow),
        ("llama", None, "never"),
    ],
)
def test_a_run_reaches_what_the_lines_of_its_card_reach(
    rows: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str,
    template: str | None, padding: str,
) -> None:  # fmt: skip
    settings = experiment(rows, models[kind], f"engine.padding={padding}")
    settings = settings.with_({"data.prompt_template": template})
    written: list[tuple[np.ndarray, list[np.ndarray]]] = []
    own = InstructionTuning.response_metrics

    def noted(self: Any, generated: list[np.ndarray], rows: Any, chosen: np.ndarray) -> Any:
        written.append((chosen, generated))
        return own(self, generated, rows, chosen)

    monkeypatch.setattr(InstructionTuning, "response_metrics", noted)
    run = rayfed.run(settings, tmp_path / "run")
    first, last = run.metrics
    keys = build_components(settings).task.metric_keys(settings.eval)
    assert {"eval/exact_match", "test/rouge_l", "test/perplexity"} < set(keys)
    assert all(isinstance(last[key], float) for key in keys)
    assert last["test/loss"] < first["test/loss"] - 0.1
    namespace, test = defined_by_card(run.out, monkeypatch), questions(9, 30)
    found = namespace["perplexity"]([(row["prompt"], row["response"]) for row in test])
    assert found == pytest.approx(math.exp(last["test/loss"]), rel=1e-4)
    chosen, generated = written[-1]  # of the test split, after the last round: PEFT's `generate`, row by row
    texts = [namespace["tokenizer"].decode(ids.tolist(), skip_special_tokens=True) for ids in generated]
    assert texts == [namespace["respond"](test[row]["prompt"], most=8) for row in chosen]
    assert (len(texts), len(set(texts))) > (4, 1)  # else a constant would pass
    references = [test[row]["response"] for row in chosen]
    assert {name: last[f"test/{name}"] for name in responses.NAMES} == responses.metrics(texts, references)
    assert rayfed.load_model(run.out) is not None


def test_only_tokens_of_responses_count(rows: Path, models: dict[str, Path]) -> None:
    """Sums of a batch by the logits of the model alone, with padding and without."""
    found = []
    for padding, batching in (("never", Unpadded), ("batch", Padded)):
        plan = prepare(experiment(rows, models["gpt2"], f"engine.padding={padding}"))
        assert isinstance(plan.model.batching, batching)
        trainer, test = Trainer(plan), plan.federation.test
        chosen = np.arange(len(test))
        batch = test.batch(chosen, padded=batching is Padded)
        del batch["labels"]
        segment = Segment(0, len(chosen), lengths=test.lengths.tolist())
        trainer.stack.load([plan.fresh(2)])
        with torch.no_grad(), trainer.stack.using([segment]):
            found.append(trainer.forward(batch))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    model = plan.task.load_base(plan.federation).model
    tokens: Any = test
    for row, sums in enumerate(found[0]):
        prompt = len(ByT5Tokenizer()(questions(9, 30)[row]["prompt"] + "\n")["input_ids"]) - 1
        ids = torch.tensor(tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]]).long()[None]
        assert (tokens.prompts[row], int(ids[0, -1])) == (prompt, 1)  # and the end of the text
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, prompt - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, prompt:], reduction="none")
        right = (logits.argmax(-1) == ids[0, prompt:]).sum()
        torch.testing.assert_close(sums, torch.tensor([losses.sum(), len(losses), right]), rtol=1e-4, atol=1e-4)


def test_generation_leaves_the_model_as_it_was(rows: Path, models: dict[str, Path]) -> None:
    plan = prepare(experiment(rows, models["llama"], "data.max_tokens=60"))
    trainer = Trainer(plan)
    tokens: Any = plan.federation.test
    adapter = plan.fresh(2)
    payload = wire.encode(adapter.flatten())
    evaluate = EvalJob("test", 0, 9, adapter.layout)
    before: Any = trainer.execute(evaluate, [payload])
    whole: Any = trainer.execute(GenerateJob("test", np.arange(9), adapter.layout, 100), [payload])
    after: Any = trainer.execute(evaluate, [payload])
    assert torch.equal(before.predictions, after.predictions)
    # 64 positions less those of the longest prompt, where no row ends earlier
    assert {len(ids) for ids in whole.tokens} == {64 - tokens.prompts.max()}
    alone: Any = [trainer.execute(GenerateJob("test", np.array([i]), adapter.layout, 5), [payload]) for i in range(9)]
    assert [ids[:5].tolist() for ids in whole.tokens] == [result.tokens[0].tolist() for result in alone]


def test_chats_and_objects(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    train = [
        {"chat": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]}
        for row in questions(20)
    ]
    task = rayfed.InstructionTuning(train=train, messages="chat")
    settings = experiment(
        rows, models["llama"], "server.rounds=1", "data={max_tokens: 60}", "partition={kind: iid, clients: 4}"
    )
    plan = prepare(settings, task=task)
    tokens: Any = plan.federation.train
    text = AutoTokenizer.from_pretrained(models["llama"]).decode(tokens.ids[: tokens.offsets[1]].tolist())
    assert re.fullmatch(r"<user>(what is )?\d\+\d\?<assistant>(so )*#### \d</s>", text)
    run = rayfed.run(settings, tmp_path / "run", task=task)
    assert "messages: chat" in (run.out / "config.yaml").read_text()
    pairs = rayfed.InstructionTuning(train=questions(20), client="owner")
    plan = prepare(settings.with_("partition.kind=natural", "data.client=owner"), task=pairs)
    assert plan.federation.clients == 3
    with pytest.raises(UserError, match=r"^data.messages: got 'chat', but the tokenizer of model.name has no chat"):
        prepare(settings.with_(f"model.name={models['gpt2']}"), task=task)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "a"}, "data.response: got None in {}, column 'response', row 2, but a response is a string"),
        ({"response": "a"}, "data.prompt: got None in {}, column 'prompt', row 2, but a prompt is a string"),
        (
            {"prompt": "a", "response": " "},
            "data.response: got ' ' in {}, column 'response', row 2, but a response has words",
        ),
    ],
)
def test_bad_rows(models: dict[str, Path], tmp_path: Path, row: dict[str, str], line: str) -> None:
    lines = [{"prompt": "a", "response": "b"}, row]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(own) + "\n" for own in lines))
    with pytest.raises(UserError) as error:
        prepare(experiment(tmp_path, models["gpt2"], "data.client=null", "partition={kind: iid, clients: 2}"))
    assert str(error.value) == line.format(file)


@pytest.mark.parametrize("chat", ["hello", [], [{"role": "user", "content": "a"}] * 2, [{"role": "user"}] * 2])
def test_bad_chats(models: dict[str, Path], rows: Path, chat: object) -> None:
    train = [{"chat": chat}] * 3
    with pytest.raises(
        UserError, match=r"^data.messages: got .* in the train rows, column 'chat', row 1, but a chat is"
    ):
        prepare(
            experiment(rows, models["llama"], "data={}", "partition={kind: iid, clients: 2}"),
            task=rayfed.InstructionTuning(train=train, messages="chat"),
        )


def test_prompts_that_fill_a_row_are_left_out(
    models: dict[str, Path], rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = prepare(experiment(rows, models["gpt2"], "data.max_tokens=6"))  # a prompt has 5 or 13 tokens
    assert set(plan.federation.train.lengths.tolist()) == {6}
    assert (len(plan.federation.rows), len(plan.federation.train)) == (15, 15)
    assert plan.federation.sizes.tolist() == [5, 5, 5]
    assert f"15 of 30 prompts in {rows}/train.jsonl leave no room for a response" in caplog.text
    with pytest.raises(UserError, match=r"^data.max_tokens: got 3, but every prompt in .* alone has so many tokens$"):
        prepare(experiment(rows, models["gpt2"], "data.max_tokens=3"))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.packing=true", "data.packing: got true, but only data.task=causal_lm joins texts"),
        ("data.prompt_template=ask", "data.prompt_template: got 'ask', but it has {prompt} once"),
        ("data.task=causal_lm", "eval.generate_rows: got 5, but only data.task=instruction writes responses"),
        ("eval.clients=true", "eval.clients: got true, but with data.task=instruction there are no classes"),
    ],
)
def test_refusals(rows: Path, models: dict[str, Path], override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        prepare(experiment(rows, models["gpt2"], override))
    assert str(error.value).startswith(line)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED_DATA / "gsm8k").exists(), reason="the data are not here")
def test_real_questions_train_on_ray(models: dict[str, Path], tmp_path: Path, ray_cluster: None) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(**COMMON, n_positions=512, n_embd=32, n_layer=1, n_head=2))
    base.save_pretrained(tmp_path / "base")
    ByT5Tokenizer().save_pretrained(tmp_path / "base")
    settings = experiment(
        SHARED_DATA / "gsm8k", tmp_path / "base", "data.prompt=text", "data.response=answer", "data.client=null",
        "data.max_tokens=500", "data.examples=300", "data.test_examples=30", "partition={kind: iid, clients: 12}",
        "server={rounds: 4, cohort: 4}", "lora.rank=8", "engine={kind: ray, workers: 2, pack: 2}",
    )  # fmt: skip
    metrics = rayfed.run(settings, tmp_path / "run").metrics
    # The base is random, so there is little to adapt.
    assert metrics[-1]["test/loss"] < metrics[0]["test/loss"] - 0.05
    assert metrics[-1]["test/rouge_l"] is not None
