"""`rayfed pretrain`: small base models on rows that no client has."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import WIDE, digits, save_parquet
from language_models import sentences
from safetensors.torch import load_file

import rayfed
from rayfed.api import prepare, pretraining
from rayfed.cli import main
from rayfed.config import validate
from rayfed.config.load import _apply
from rayfed.config.task import Data
from rayfed.errors import UserError
from rayfed.tasks.data.dataset import load_data, load_pretraining
from rayfed.tasks.data.objects import read_objects

VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, **WIDE}
BYTES = {"source": "files", "task": "causal_lm", "client": "speaker", "max_tokens": 16, "packing": True}
LANGUAGE = {
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "llama": {
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 16,
    },
}  # fmt: skip
RUN: dict[str, Any] = {
    "partition": {"clients": 4, "kind": "iid"},
    "lora": {"rank": 2, "alpha": 4, "target_modules": "all-linear"},
    "method": {"name": "fedit"},
    "server": {"rounds": 1, "cohort": 2},
    "engine": {"kind": "local"},
    "tracking": {"console": "off", "wandb": "off"},
}


def settings(folder: Path, model: dict[str, Any], **data: Any) -> dict[str, Any]:
    pretrain = {"model": dict(model), "steps": 12, "batch_size": 16, "lr": 0.02}
    data = {"path": str(folder), "pretrain_share": 0.4, **data}
    return {**copy.deepcopy(RUN), "model": {"name": str(folder / "base")}, "data": data, "pretrain": pretrain}


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Any]:
    save_parquet(tmp_path / "train.parquet", digits(0, 200))
    return settings(tmp_path, VIT, source="files", task="image_classification")


def test_the_model_of_the_config_is_made_once_and_a_run_takes_it(
    images: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(images))
    assert main(["pretrain", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("rows that no client has")
    assert lines[1].startswith("step       1 of 12: loss 2.")
    assert lines[-2].startswith("held-out rows: loss ")
    assert lines[-1] == f"model {tmp_path / 'base'}"
    record = json.loads((tmp_path / "base" / "pretrain.json").read_text())
    assert main(["pretrain", str(config)]) == 0
    again = f"model {tmp_path / 'base'} is there already, of these settings and rows ({record['digest']})\n"
    assert capsys.readouterr().out == again
    run = rayfed.run(validate(images), tmp_path / "run")
    assert run.metrics[-1]["test/loss"] > 0
    with pytest.raises(
        UserError, match=r"^data.pretrain_share: got 0.3, but the base in .* has seen 0.4: clients would "
    ):
        rayfed.prepare(validate(images).with_("data.pretrain_share=0.3"))
    assert main(["pretrain", str(config), "pretrain.steps=13"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"rayfed: --out: got '{tmp_path / 'base'}', but its model is of other settings or rows (")


def test_no_run_begins_with_the_head_of_the_pretraining(images: dict[str, Any], monkeypatch) -> None:
    """The features are trained for the head that they began with. A run of the same seed draws another one."""
    heads = []

    def train(task, model, *rest) -> dict[str, float]:
        heads.append(model.classifier.weight.detach().clone())
        return {}

    monkeypatch.setattr(pretraining, "train", train)
    folder = rayfed.pretrain(images, report=None)
    plan = prepare(validate({**images, "model": {"name": str(folder)}}))
    own = plan.task.load_base(plan.federation).model.classifier.weight
    assert own.shape == heads[0].shape
    assert abs(torch.corrcoef(torch.stack([own.flatten(), heads[0].flatten()]))[0, 1]) < 0.5


def test_rows_may_be_objects(images: dict[str, Any], tmp_path: Path) -> None:
    by_file = rayfed.pretrain(validate(images).with_("pretrain.steps=1"), report=None)
    images["data"] = {"task": "image_classification", "pretrain_share": 0.4}
    own = validate(images).with_("pretrain.steps=1")
    task = rayfed.ImageClassification(train=digits(0, 200))
    by_object = rayfed.pretrain(own, task=task, out=tmp_path / "other", report=None)
    first, second = (json.loads((folder / "pretrain.json").read_text()) for folder in (by_file, by_object))
    assert first["held_out"].keys() == second["held_out"].keys()


def test_equal_settings_give_equal_weights_and_training_lowers_the_loss(images: dict[str, Any], tmp_path: Path) -> None:
    weights, losses = [], []
    for name, changes in (("a", ()), ("b", ()), ("long", ("pretrain.steps=60",)), ("seed", ("seed=1",))):
        folder = rayfed.pretrain(validate(images).with_(*changes), out=tmp_path / name, report=None)
        weights.append((folder / "model.safetensors").read_bytes())
        losses.append(json.loads((folder / "pretrain.json").read_text())["held_out"]["loss"])
    assert weights[0] == weights[1] != weights[3]
    assert losses[2] < losses[0] - 0.3
    assert not any(name.startswith("classifier") for name in load_file(tmp_path / "a" / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", LANGUAGE)
def test_a_language_model_is_made_with_its_tokenizer(kind: str, tmp_path: Path) -> None:
    for name, rows in (("train", sentences(60)), ("test", sentences(12, seed=1))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = validate({**settings(tmp_path, LANGUAGE[kind], **BYTES), "partition": {"kind": "natural"}})
    lines: list[str] = []
    rayfed.pretrain(own, report=lines.append)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["use_cache"]
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in (lines[1], lines[-3]))
    assert last < first - 0.5
    before = rayfed.run(own, tmp_path / "run").metrics[-1]["test/loss"]
    assert before < 5.5  # of 5.9 nats, where all tokens are equally likely


def test_no_speaker_has_a_text_of_the_pretraining() -> None:
    rows = sentences(200)
    data = {"task": "text_classification", "label": "speaker", "source": "object", "fingerprint": "given"}
    shared = Data(**data, pretrain_share=0.5)
    source = read_objects({"train": rows}, shared)
    kept = set(load_pretraining(shared, source)[0].texts)
    splits = load_data(shared, 0, source)
    used = {text for split in (splits.train, splits.validation, splits.test) for text in split.texts}
    assert kept.isdisjoint(used)
    assert kept | used == {row["text"] for row in rows}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.pretrain_share=0", "data.pretrain_share: got 0, but rayfed pretrain trains on the rows that no client "),
        ("data.pretrain_share=1e-9", "data.pretrain_share: got 1e-09, but train.parquet has no such row; rayfed "),
        ("pretrain.model=null", "pretrain.model: got no model_type, but it should be a config of transformers, such "),
        ("pretrain.model.model_type=vitt", "pretrain.model.model_type: got 'vitt', but transformers has no such model"),
        ("pretrain.model.hidden_sice=8", "pretrain.model.hidden_sice: unknown key; did you mean hidden_size? see "),
        ("pretrain.model.hidden_size=-1", "pretrain.model: vit cannot be built: "),
        ("model.name=minilm", "model.name: got 'minilm', but rayfed pretrain writes a folder: name one there, or as "),
        ("model.name=full", "--out: got 'full', but this folder has something else than a model of pretrain.json"),
        ("model.name=train.parquet", "--out: got 'train.parquet', but that is a file"),
        ("data.task=text_classification", "data.task: got 'text_classification', but rayfed pretrain makes models "),
        ("data={source: lowrank, pretrain_share: 0.1}", "data.source: got 'lowrank', but rayfed pretrain needs texts "),
    ],
)  # fmt: skip
def test_what_cannot_be_pretrained_is_refused(
    images: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("mine")
    images["data"]["path"], images["model"]["name"] = "train.parquet", "base"
    _apply(images, override)
    with pytest.raises(UserError) as error:
        rayfed.pretrain(images, report=None)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "base").exists()


def test_a_run_without_its_base_says_how_to_make_it(images: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        rayfed.prepare(validate(images))
    assert str(error.value).endswith("but there is no such folder yet: `rayfed pretrain` makes it from this config")
