"""Causal language modelling end to end: whole runs, their figures by other code, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from card_lines import defined_by_card
from conftest import SHARED_DATA
from language_models import save_language_model, sentences
from transformers import AutoModelForCausalLM, ByT5Tokenizer

import rayfed
from rayfed.api import build_components, prepare
from rayfed.config import Experiment, validate
from rayfed.config.load import _apply
from rayfed.errors import UserError
from rayfed.tasks.data.heterogeneity import describe
from rayfed.tasks.models.unpadded import Padded, Unpadded

SETTINGS: dict[str, Any] = {
    "data": {"task": "causal_lm", "source": "files", "client": "speaker", "max_tokens": 24},
    "partition": {"kind": "natural"},
    "lora": {"rank": 2, "alpha": 4, "target_modules": "all-linear"},
    "method": {"name": "fedit"},
    "client": {"optimizer": "adamw", "lr": 0.02, "batch_size": 4},
    "server": {"rounds": 2, "cohort": 2},
    "engine": {"kind": "local"},
    "tracking": {"console": "off", "wandb": "off"},
}

TRAIN = [*sentences(35), {"text": "", "speaker": "Ann"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_language_model(tmp_path_factory.mktemp(kind), kind) for kind in ("gpt2", "llama")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training rows, one of them empty, and 12 test rows of three speakers."""
    folder = tmp_path_factory.mktemp("sentences")
    for name, lines in (("train", TRAIN), ("test", sentences(12, seed=1))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def experiment(rows: Path, model: Path, *overrides: str) -> Experiment:
    settings = copy.deepcopy(SETTINGS)
    for override in (f"data.path={rows}", f"model.name={model}", *overrides):
        _apply(settings, override)
    return validate(settings)


@pytest.mark.parametrize(("kind", "packing"), [("gpt2", False), ("llama", True)])
def test_a_run_reaches_what_the_lines_of_its_card_reach(
    rows: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, packing: bool
) -> None:
    settings = experiment(rows, models[kind], f"data.packing={packing}", "eval.masked=false", "export.merged=true")
    keys = build_components(settings).task.metric_keys(settings.eval)
    run = rayfed.run(settings, tmp_path / "run")
    first, last = run.metrics
    assert all(isinstance(last[key], float) for key in keys)
    assert last["eval/perplexity"] == pytest.approx(math.exp(last["eval/loss"]))
    assert last["test/loss"] < first["test/loss"] - 0.05
    texts = [row["text"] for row in sentences(12, seed=1)]
    assert defined_by_card(run.out, monkeypatch)["perplexity"](texts) == pytest.approx(
        last["test/perplexity"], rel=1e-4
    )
    adapter = json.loads((run.out / "adapter" / "adapter_config.json").read_text())
    assert (adapter["task_type"], adapter["modules_to_save"]) == ("CAUSAL_LM", None)
    assert "lm_head" not in adapter["target_modules"]
    assert not (run.out / "adapter" / "classes.json").exists()
    ids = torch.tensor(ByT5Tokenizer()(texts[:1])["input_ids"])
    with torch.no_grad():
        own = rayfed.load_model(run.out)(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run.out / "merged")(input_ids=ids).logits
    torch.testing.assert_close(own, merged, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing_but_rounding(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for padding, batching in (("never", Unpadded), ("batch", Padded)):
        settings = experiment(rows, models["llama"], f"engine.padding={padding}", "server.rounds=1")
        assert isinstance(prepare(settings).model.batching, batching)
        found.append(rayfed.run(settings, tmp_path / padding).metrics[-1])
    for key in ("train/loss", "test/loss", "test/perplexity", "test/accuracy"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-4)


def test_rows_may_be_objects_and_the_config_names_the_task(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    task = rayfed.CausalLM(train=sentences(30), test=sentences(6, seed=1), client="speaker")
    settings = experiment(rows, models["gpt2"], "server.rounds=1", "data={}")
    run = rayfed.run(settings, tmp_path / "run", task=task)
    assert "task: causal_lm" in (run.out / "config.yaml").read_text()
    assert rayfed.load_model(run.out) is not None


def test_blocks_have_the_tokens_of_one_client_and_one_text_ends_before_the_next(
    rows: Path, models: dict[str, Path]
) -> None:
    federation = prepare(experiment(rows, models["gpt2"], "data.packing=true", "data.validation=0")).federation
    assert federation.names is not None
    assert federation.names.tolist() == ["Ann", "Bob", "Cay"]
    train: Any = federation.train
    for client, name in enumerate(federation.names):
        own = [train.ids[train.offsets[row] : train.offsets[row + 1]] for row in federation.rows_of(client)]
        assert [len(block) for block in own[:-1]] == [24] * (len(own) - 1)
        joined = ByT5Tokenizer().decode([int(token) for block in own for token in block])
        assert joined.split("</s>")[:-1] == [row["text"] for row in TRAIN if row["speaker"] == name]
    assert describe(federation)["classes"] is None


def test_labels_are_read_only_for_a_partition_by_label(rows: Path, models: dict[str, Path]) -> None:
    by_label = ("partition={kind: pathological, classes: 1, clients: 6}", "data.client=null", "data.validation=0")
    federation = prepare(experiment(rows, models["gpt2"], *by_label, "data.label=speaker")).federation
    assert (federation.classes, federation.clients) == ((), 6)
    train: Any = federation.train
    for client in range(6):
        assert len({int(train.ids[train.offsets[row]]) for row in federation.rows_of(client)}) == 1  # the first letter
    with pytest.raises(UserError) as error:
        prepare(experiment(rows, models["gpt2"], *by_label))
    assert str(error.value) == (
        "partition.kind: got 'pathological', but it divides rows by label, and data.label=label is none of the columns "
        f"text, speaker of {rows}/train.jsonl; allowed without labels are iid, quantity, domain, natural"
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.pooling=mean", "model.pooling: got 'mean', {} every token has an output; allowed is stock"),
        ("model.head=frozen", "model.head: got 'frozen', {} there is no new head; allowed is trained"),
        ("lora.train=head", "lora.train: got 'head', {} there is no new head; allowed is all"),
        ("eval.controls=true", "eval.controls: got true, {} there is no new head; allowed is false"),
        ("eval.clients=true", "eval.clients: got true, {} there are no classes; allowed is false"),
        ("data.max_tokens=1", "data.max_tokens: got 1, but with data.task=causal_lm at least 2 are needed"),
        (
            "data.client=null",
            "data.client: got null, but partition.kind=natural needs the column that names the client",
        ),
        ("data.max_tokens=65", "data.max_tokens: got 65, but some texts have 65 tokens and the model takes at most 64"),
        (
            "lora.target_modules=[lm_head]",
            "lora.target_modules: got 'lm_head', but it shares its weights with the embeddings of the input: a change "
            "would be of both",
        ),
    ],
)
def test_refusals(rows: Path, models: dict[str, Path], override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        prepare(experiment(rows, models["gpt2"], "data.packing=true", override))
    assert str(error.value) == line.format("but with data.task=causal_lm")


def test_only_causal_lm_joins_texts() -> None:
    with pytest.raises(UserError, match=r"^data.packing: got true, but only data.task=causal_lm joins texts$"):
        validate({"data": {"packing": True}})


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED_DATA / "tiny_shakespeare_speakers").exists(), reason="the data are not here")
def test_real_speakers_train_on_ray(models: dict[str, Path], tmp_path: Path, ray_cluster: None) -> None:
    settings = experiment(
        SHARED_DATA / "tiny_shakespeare_speakers", models["gpt2"], "data.client=client", "data.max_tokens=64",
        "data.packing=true", "data.examples=1500", "data.test_examples=150", "server={rounds: 8, cohort: 6}",
        "lora.rank=8", "lora.alpha=16", "engine={kind: ray, workers: 2, pack: 3}",
    )  # fmt: skip
    metrics = rayfed.run(settings, tmp_path / "run").metrics
    # The base is random, so there is little to adapt.
    assert metrics[-1]["test/loss"] < metrics[0]["test/loss"] - 0.05
