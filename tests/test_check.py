"""`rayfed.api.check` refuses, in one line, what only data, model and method together can show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayfed.api import check
from rayfed.errors import UserError

Tiny = Callable[..., Any]


def refusal(experiment: Any) -> str:
    with pytest.raises(UserError) as caught:
        check(experiment)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("method.name=flask", "method.name: got 'flask', but did you mean flasc? allowed are "),
        ("method.topk=3", "method.topk: flasc has no such option; allowed are mask, train"),
        ("method.mask=[fixed]", "method.mask: got ['fixed'], but it should be refresh or fixed"),
        ("server.optimizer=fedavg server.lr=0.1", "server.lr: got 0.1, but fedavg has no rate; server.optimizer=sgd"),
        (
            "server.optimizer=sgd server.weight_decay=0.1",
            "server.weight_decay: got 0.1, but only adamw has it, not sgd",
        ),
        (
            "lora.rank=33 lora.target_modules=[intermediate.dense]",
            "lora.rank: got 33, but encoder.encoder.layer.0.intermediate.dense is 48 x 32; at most 32 is allowed",
        ),
        ("lora.layers_to_transform=[2]", "lora.layers_to_transform: got [2], but"),
        ("lora.target_modules=[LayerNorm]", "lora.target_modules: got ['LayerNorm'], but it matches encoder."),
        ("lora.target_modules='('", "lora.target_modules: got '(', but"),
        ("data.text=body", "data.text: got 'body', but"),
        (
            "server.cohort=13",
            "server.cohort: got 13, but the population has only 12 clients (partition.clients)",
        ),
        (
            "partition.kind=natural data.client=owner server.cohort=8",
            "server.cohort: got 8, but only 7 of 7 clients hold data",
        ),
        ("partition.clients=999", "partition.clients: got 999, but there are only 128 training"),
        ("model.name=configs", "model.name: got 'configs', but this folder holds no config.json"),
        ("model.name=nobody/nothing", "model.name: got 'nobody/nothing', but it cannot be loaded"),
    ],
)
def test_settings_that_do_not_fit_data_model_or_method(tiny: Tiny, overrides: str, line: str) -> None:
    assert refusal(tiny(*overrides.split())).startswith(line)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_weights_that_cannot_be_read(tiny: Tiny, tiny_bert: Path, tmp_path: Path, damage: str) -> None:
    model = shutil.copytree(tiny_bert, tmp_path / "model")
    weights = model / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        weights.unlink()
    said = refusal(tiny(f"model.name={model}"))
    assert said.startswith(f"model.name: got {str(model)!r}, but ")
    assert "safetensors" in said


def test_a_model_folder_without_a_tokenizer(tiny: Tiny, tiny_bert: Path, tmp_path: Path) -> None:
    # transformers would make one in which every word is unknown.
    model = shutil.copytree(tiny_bert, tmp_path / "model", ignore=shutil.ignore_patterns("token*"))
    said = refusal(tiny(f"model.name={model}"))
    assert said.startswith(f"model.name: got {str(model)!r}, but ")
    assert "tokenizer" in said


def test_texts_longer_than_the_model_reads(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"  # 100 words; the model has 64 positions
    path.write_text("".join(json.dumps({"text": "card1 " * 100, "label": i % 2}) + "\n" for i in range(60)))
    assert refusal(tiny(f"data.path={path}", "partition.kind=iid")).startswith("data.max_tokens: got 128, but")


def test_a_device_that_is_not_there(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert refusal(tiny("engine.device=cuda")).startswith("engine.device: got 'cuda', but")
