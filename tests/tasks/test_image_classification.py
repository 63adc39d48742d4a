"""Image classification end to end: whole runs, their figures by other code, and what is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from card_lines import defined_by_card
from conftest import SHARED_DATA
from image_models import digits, save_vit
from PIL import Image
from sklearn import metrics as sklearn
from transformers import SwinConfig, SwinModel

import rayfed
from rayfed.api import build_components, prepare
from rayfed.config import Experiment, validate
from rayfed.config.load import _apply
from rayfed.errors import UserError

SETTINGS: dict[str, Any] = {
    "partition": {"kind": "dirichlet", "clients": 6, "alpha": 1.0},
    "lora": {"rank": 2, "alpha": 4, "target_modules": "all-linear"},
    "method": {"name": "fedit"},
    "client": {"optimizer": "adamw", "lr": 0.02, "batch_size": 8},
    "server": {"rounds": 2, "cohort": 3},
    "eval": {"masked": False},
    "engine": {"kind": "local"},
    "tracking": {"console": "off", "wandb": "off"},
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


def experiment(vit: Path, *overrides: str) -> Experiment:
    settings = copy.deepcopy(SETTINGS)
    for override in (f"model.name={vit}", *overrides):
        _apply(settings, override)
    return validate(settings)


def dividing(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the numbers from 2 to 4 that divide the digit as its labels."""
    return {**row, "label": [n for n in (2, 3, 4) if row["label"] % n == 0]}


@pytest.mark.parametrize("multi_label", [False, True], ids=["one label", "many labels"])
def test_a_run_reaches_what_the_lines_of_its_card_reach(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multi_label: bool
) -> None:
    train, test = digits(0, 150), digits(150, 200)
    if multi_label:
        train, test = ([dividing(row) for row in rows] for rows in (train, test))
    task = (rayfed.ImageMultiLabel if multi_label else rayfed.ImageClassification)(train=train, test=test)
    settings = experiment(vit, f"data.task={task.name}", "data.crop=1", "data.flip=true")
    run = rayfed.run(settings, tmp_path / "run", task=task)
    first, last = run.metrics
    assert last["test/loss"] < first["test/loss"]
    assert all(isinstance(last[key], float) for key in task.metric_keys(settings.eval))
    logits = defined_by_card(run.out, monkeypatch)["logits"]([Image.fromarray(row["image"]) for row in test]).numpy()
    if multi_label:
        truth = np.array([[n in row["label"] for n in (2, 3, 4)] for row in test])
        expected = {
            "map": sklearn.average_precision_score(truth, logits),
            "micro_f1": sklearn.f1_score(truth, logits > 0, average="micro"),
            "macro_f1": sklearn.f1_score(truth, logits > 0, average="macro"),
        }
    else:
        truth, found = np.array([row["label"] for row in test]), logits.argmax(1)
        expected = {
            "accuracy": sklearn.accuracy_score(truth, found),
            "macro_f1": sklearn.f1_score(truth, found, average="macro"),
        }
        assert last["test/confusion_matrix"] == sklearn.confusion_matrix(truth, found).tolist()
    assert {key: last[f"test/{key}"] for key in expected} == pytest.approx(expected, abs=1e-6)
    own = rayfed.load_model(run.out)
    pixels = torch.from_numpy(np.stack([row["image"] for row in test])[:, None]).float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(own(pixel_values=pixels).logits.numpy(), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_packed_run_and_one_of_single_clients_agree(vit: Path, tmp_path: Path) -> None:
    found = []
    for pack in (1, 3):
        task = rayfed.ImageClassification(train=digits(0, 100), test=digits(100, 150))
        settings = experiment(
            vit, f"engine.pack={pack}", "data={task: image_classification, crop: 2}", "server.rounds=1"
        )
        found.append(rayfed.run(settings, tmp_path / str(pack), task=task).metrics[-1])
    for key in ("train/loss", "eval/loss", "test/loss"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-5)


@pytest.mark.slow
def test_a_base_in_bfloat16_gives_nearly_the_same_loss(vit: Path, tmp_path: Path) -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        task = rayfed.ImageClassification(train=digits(0, 60), test=digits(60, 90))
        settings = experiment(vit, f"model.dtype={dtype}", "server.rounds=1")
        losses.append(rayfed.run(settings, tmp_path / dtype, task=task).metrics[-1]["test/loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)


def test_equal_rows_have_equal_fingerprints(vit: Path) -> None:
    def fingerprint(change: int) -> str | None:
        rows = digits(0, 30)
        rows[3]["image"][2, 2] += change
        pictures = [{**row, "image": Image.fromarray(row["image"])} for row in rows]
        task = rayfed.ImageClassification(train=pictures, image="image")
        return task.described(experiment(vit).data, experiment(vit).model)[0].fingerprint

    assert fingerprint(0) == fingerprint(0) != fingerprint(1)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.pooling=mean", "model.pooling: got 'mean', but {} a model has its own head; allowed is stock"),
        ("data.source=stdlib", "data.source: got 'stdlib', but {} rows are images; allowed are files, hub"),
    ],
)
def test_what_does_not_fit_images_is_refused(vit: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        build_components(
            experiment(
                vit,
                "data.task=image_multi_label",
                "data.source=hub",
                "data.name=x",
                override,
                *(["data.name=null"] if "stdlib" in override else []),
            )
        )
    assert str(error.value) == line.format("with data.task=image_multi_label")


@pytest.mark.parametrize(("field", "value", "shown"), [("crop", 2, "2"), ("flip", True, "true")])
def test_only_images_are_moved_and_mirrored(field: str, value: object, shown: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.{field}: got {shown}, but only tasks on images change images$"):
        validate({"data": {field: value}})


def test_models_that_do_not_fit_are_refused_in_one_line(vit: Path, tmp_path: Path) -> None:
    task = rayfed.ImageClassification(train=digits(0, 40))
    bare = shutil.copytree(vit, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    larger = save_vit(tmp_path / "larger", size=16)
    shutil.copy(vit / "preprocessor_config.json", larger)
    windows = save_vit(tmp_path / "windows")
    config = SwinConfig(
        image_size=8, patch_size=2, num_channels=1, embed_dim=8, depths=[2], num_heads=[2], window_size=2
    )
    SwinModel(config, add_pooling_layer=False).save_pretrained(windows)
    for folder, what in (
        (bare, "this folder holds no image processor (preprocessor_config.json)"),
        (larger, "it does not take the images of its image processor, (1, 8, 8): Input image size (8*8) doesn't "),
        (windows, "swin.encoder.layers.0.blocks.0.attention.q_proj sees (12, 4, 8) for 3 images: images in windows "),
    ):
        with pytest.raises(UserError, match=r"^model\.name: got '.*', but [^\n]*$") as error:
            prepare(experiment(folder), task=task)
        assert what in str(error.value)


@pytest.mark.slow
def test_loss_falls_on_real_images_through_ray(tmp_path: Path) -> None:
    folder = SHARED_DATA / "cifar10_subset"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    vit = save_vit(tmp_path / "vit", channels=3, size=32, patch_size=8, hidden_size=32)
    settings = experiment(
        vit, "data.task=image_classification", "data.source=files", f"data.path={folder}", "data.examples=1000",
        "data.test_examples=200", "data.crop=4", "data.flip=true", "server.rounds=8", "server.cohort=6",
        "partition.kind=iid", "eval.every=8", "engine.kind=ray", "engine.workers=2", "client.epochs=2",
    )  # fmt: skip
    run = rayfed.run(settings, tmp_path / "run")
    assert run.metrics[-1]["train/loss"] < run.metrics[0]["train/loss"] - 0.1


def test_digits_come_in_experiences(vit: Path, tmp_path: Path) -> None:
    task = rayfed.ImageClassification(train=digits(0, 120), test=digits(120, 180))
    settings = experiment(vit, "partition={kind: iid, clients: 4, sequence: {experiences: 2, order: given}}")
    found = rayfed.run(settings, tmp_path / "run", task=task).summary["sequence/accuracies"]
    assert [len(row) for row in found] == [1, 2]
