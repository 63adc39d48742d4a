"""The recipes: every one is valid, and its short form runs as its comment says, on tiny models and data."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from image_models import digits, png, save_vit
from language_models import save_language_model
from pyarrow import parquet

import rayfed
from rayfed.api import build_components
from rayfed.config import load_config

FOLDER = Path(__file__).parents[2] / "configs" / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SMALL = (
    "server.rounds=1", "server.cohort=2", "client.steps=1", "client.batch_size=2", "engine.kind=local",
    "tracking.wandb=off", "tracking.console=off",
)  # fmt: skip
NARROW = {  # the tiny models are 16 wide
    "flora_instruction": ("lora.rank=8", "lora.alpha=16", "profiles.ranks=[8, 8, 4, 4, 2, 2, 1, 1, 1, 1]"),
    "flowertune": ("lora.rank=8", "lora.alpha=16"),
}


def commands(name: str) -> list[list[str]]:
    """The words of every command in the comment of the recipe."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line.removeprefix("#")) for line in lines if line.startswith("#   rayfed ")]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_recipe_has_valid_settings(name: str) -> None:
    found = commands(name)
    assert len(found) >= 2  # the full form and the short one
    for _, _, path, *overrides in found:
        assert path == f"configs/recipes/{name}.yaml"
        build_components(load_config(FOLDER / f"{name}.yaml", overrides))


def test_a_comment_says_where_a_recipe_comes_from_and_what_never_ran() -> None:
    for name in NAMES:
        text = " ".join(line.removeprefix("# ") for line in (FOLDER / f"{name}.yaml").read_text().splitlines())
        assert "Source:" in text, name
        assert "never run" in text, name


@pytest.fixture
def own_data(tmp_path: Path, tiny_data: Path) -> Callable[[str], Path]:
    """A folder with the columns that the recipe's comment names."""
    draw = random.Random(0)

    def write(split: str, rows: Iterable[dict[str, Any]]) -> None:
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def texts() -> dict[str, list[dict[str, Any]]]:
        return {
            split: [json.loads(line) for line in (tiny_data / f"{split}.jsonl").read_text().splitlines()]
            for split in ("train", "test")
        }

    def make(name: str) -> Path:
        if name in ("flasc_newsgroups", "lora_a2"):
            return tiny_data
        if name in ("flasc_cifar10", "flasc_flair"):
            for split, place in (("train", (0, 200)), ("test", (200, 240))):
                rows = [
                    {
                        **row,
                        "image": {"bytes": png(row["image"]), "path": None},
                        "labels": [row["label"]],
                        "client": i % 5,
                    }
                    for i, row in enumerate(digits(*place))
                ]
                parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
            return tmp_path
        for split, rows in texts().items():
            write(split, (own_row(name, row, draw.choice("abc")) for row in rows))
        return tmp_path

    return make


def own_row(name: str, row: dict[str, Any], other: str) -> dict[str, Any]:
    """The row under the names of columns that the recipe reads."""
    text, label, owner = row["text"], row["label"], row["owner"]
    if name == "flasc_reddit":
        return {"text": text, "client": owner}
    if name == "fedex_glue":
        return {"sentence": text, "label": label}
    return {"instruction": text, "response": label + other, "output": label + other, "task": owner}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_short_form_runs(
    name: str, own_data: Callable[[str], Path], tiny_bert: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    model = {"lora_a2": tiny_bert, "fedex_glue": tiny_bert, "flasc_newsgroups": tiny_gpt2}.get(name)
    if model is None:
        vision = name in ("flasc_cifar10", "flasc_flair")
        kind = "gpt2" if name == "flasc_reddit" else "llama"
        model = save_vit(tmp_path / "model") if vision else save_language_model(tmp_path / "model", kind)
    folders = (f"data.path={own_data(name)}", f"model.name={model}")
    _, _, _, *overrides = commands(name)[-1]
    own = [word for word in overrides if word not in ("data.path=FOLDER", "model.name=FOLDER")]
    experiment = load_config(FOLDER / f"{name}.yaml", [*own, *folders, *SMALL, *NARROW.get(name, ())])
    result = rayfed.run(experiment, out=tmp_path / "run")
    assert result.rounds == 1
    assert result.summary["bytes/total"] > 0
