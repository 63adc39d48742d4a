from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from rayfed.config.task import Data
from rayfed.errors import UserError
from rayfed.tasks.data.dataset import TextData, load_data

LABELLED = Features({"text": Value("string"), "label": ClassLabel(names=["no", "maybe", "yes"])})


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def load(name: Any, **settings: Any) -> TextData:
    return load_data(Data(source="hub", name=str(name), **settings), seed=0)


def labelled(folder: Path, **splits: list[int]) -> None:
    for name, labels in splits.items():
        rows = {"text": [f"{name} {i}" for i in range(len(labels))], "label": labels}
        Dataset.from_dict(rows, features=LABELLED).to_parquet(folder / f"{name}.parquet")


def test_class_labels_bring_their_names(folder: Path) -> None:
    labelled(folder, train=[2, 0, 2], validation=[0], test=[1, 0])
    data = load(folder)
    assert data.classes == ("no", "maybe", "yes")
    assert data.train.labels.tolist() == [2, 0, 2]
    assert data.train.texts == ["train 0", "train 1", "train 2"]
    assert data.validation.labels.tolist() == [0]
    assert data.test.labels.tolist() == [1, 0]


def test_plain_columns_and_owners(folder: Path) -> None:
    rows = [{"body": f"text {i}", "kind": "ab"[i % 2], "user": i % 3} for i in range(20)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = load(folder, text="body", label="kind", client="user", test=0.5, validation=0.0)
    assert data.classes == ("a", "b")
    assert (len(data.train), len(data.test)) == (10, 10)
    assert set(data.train.owners.tolist()) == {"0", "1", "2"}


def test_a_split_without_labels_counts_as_missing(folder: Path) -> None:
    labelled(folder, train=[0, 1, 2] * 5, test=[-1, -1])
    data = load(folder, test=0.2, validation=0.0)
    assert (len(data.train), len(data.test)) == (12, 3)


@pytest.mark.parametrize(
    ("splits", "split", "row"),
    [({"train": [0, -1, 2], "test": [0]}, "train", 2), ({"train": [0, 1], "test": [0, -1]}, "test", 2)],
)
def test_single_unlabelled_rows_are_refused(folder: Path, splits: dict[str, list[int]], split: str, row: int) -> None:
    labelled(folder, **splits)
    what = "labels of this data set are 0 to 2"
    with pytest.raises(UserError, match=rf"^data.label: got -1 in .*, split '{split}', .*, row {row}, but {what}"):
        load(folder)


def test_a_missing_column_is_refused_with_those_there_are(folder: Path) -> None:
    labelled(folder, train=[0, 1], test=[0, 1])
    with pytest.raises(UserError, match=r"^data.text: got 'body', but .*split 'train' has the columns text, label$"):
        load(folder, text="body")


def test_a_data_set_without_a_train_split_is_refused(folder: Path) -> None:
    labelled(folder, test=[0, 1])
    with pytest.raises(UserError, match=r"^data.name: got '.*', but it needs a split 'train'; it has 'test'"):
        load(folder)


def test_two_splits_for_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    loaded = datasets.DatasetDict({"train": one, "val": one, "dev": one})
    asked: dict[str, Any] = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.update(args=a, options=k) or loaded)
    with pytest.raises(
        UserError, match=r"^data.name: got 'x/y \(sub\)', but its splits 'val' and 'dev' both stand for"
    ):
        load("x/y", subset="sub")
    assert asked == {"args": ("x/y", "sub"), "options": {}}  # no code of the data set's is ever allowed to run


@pytest.mark.parametrize(
    ("name", "subset", "message"),
    [
        (
            "nobody/nothing",
            None,
            "data.name: nobody/nothing cannot be loaded: Couldn't reach 'nobody/nothing' on the Hub",
        ),
        ("SET", "other", "data.name: SET .other. cannot be loaded: BuilderConfig 'other' not found"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(
    folder: Path, name: str, subset: str | None, message: str
) -> None:
    labelled(folder, train=[0, 1])
    name = name.replace("SET", str(folder))
    with pytest.raises(UserError, match=f"^{message.replace('SET', str(folder))}") as refusal:
        load(name, subset=subset)
    assert "\n" not in str(refusal.value)
