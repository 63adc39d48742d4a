from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayfed.config.task import Data
from rayfed.errors import UserError
from rayfed.tasks.data.dataset import TextData, load_data


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Loads given splits: each a list of labels, or of rows."""

    def load(seed: int = 0, splits: dict[str, list[Any]] | None = None, **settings: Any) -> TextData:
        for name, rows in (splits or {}).items():
            full = [
                row if isinstance(row, dict) else {"text": f"{name} {i}", "label": row} for i, row in enumerate(rows)
            ]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in full))
        return load_data(Data(source="files", path=str(tmp_path), **settings), seed)

    return load


def numbers(texts: list[str]) -> list[int]:
    return [int(text.split()[1]) for text in texts]


def test_integer_labels_are_numbered_in_ascending_order_over_all_splits(load: Any) -> None:
    data = load(splits={"train": [10, -3, 10], "validation": [10], "test": [9, -3]})
    assert data.classes == ("-3", "9", "10")
    assert data.train.labels.tolist() == [2, 0, 2]
    assert data.test.labels.tolist() == [1, 0]
    assert data.train.labels.dtype == np.int64


def test_string_labels_are_sorted(load: Any) -> None:
    data = load(splits={"train": ["b", "a"], "validation": ["10"], "test": ["B"]})
    assert data.classes == ("10", "B", "a", "b")
    assert data.train.labels.tolist() == [3, 2]


def test_missing_splits_are_carved_by_share_and_rows_keep_their_order(load: Any) -> None:
    data = load(splits={"train": [0, 1] * 50}, test=0.29, validation=0.1)
    sizes = [len(split) for split in (data.train, data.validation, data.test)]
    assert sizes == [64, 7, 29]  # floor(0.29 * 100), floor(0.1 * 71)
    rows = [numbers(split.texts) for split in (data.train, data.validation, data.test)]
    assert all(r == sorted(r) for r in rows)
    assert sorted(rows[0] + rows[1] + rows[2]) == list(range(100))
    assert data.test.labels.tolist() == [row % 2 for row in rows[2]]
    assert rows[2] != list(range(29))


def test_only_what_the_source_lacks_is_carved(load: Any) -> None:
    data = load(splits={"train": [0, 1] * 10, "test": [0, 1]}, validation=0.25)
    assert (len(data.train), len(data.validation), len(data.test)) == (15, 5, 2)
    data = load(splits={"train": [0, 1] * 10, "validation": [0]}, validation=0.25, test=0.25)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 1, 2)


def test_no_validation_is_allowed(load: Any) -> None:
    assert len(load(splits={"train": [0, 1], "test": [0]}, validation=0.0).validation) == 0


def test_the_seed_decides_the_splits(load: Any) -> None:
    splits = {"train": [0, 1] * 50}
    same = [load(seed=1, splits=splits).test.texts for _ in range(2)]
    assert same[0] == same[1]
    assert load(seed=2).test.texts != same[0]


def test_examples_draws_from_train_and_validation_and_leaves_rows_in_theirs(load: Any) -> None:
    splits = {"train": list(range(200)), "validation": [0] * 100, "test": [0] * 50}
    data = load(splits=splits, examples=120)
    sizes = [len(data.train), len(data.validation)]
    assert sum(sizes) == 120
    assert 60 < sizes[0] < 100
    assert len(data.classes) == 200  # the task stays the same
    assert numbers(data.train.texts) == sorted(set(numbers(data.train.texts)))
    assert data.train.labels.tolist() == numbers(data.train.texts)
    assert {text.split()[0] for text in data.validation.texts} == {"validation"}
    assert load(examples=120).train.texts == data.train.texts
    assert load(seed=5, examples=120).train.texts != data.train.texts
    assert len(load(examples=10**6).train) == 200


def test_a_given_test_split_stays_whole_unless_test_examples_asks(load: Any) -> None:
    splits = {"train": [0, 1] * 50, "test": [0, 1] * 30}
    whole, cut, both = (
        load(splits=splits, **own) for own in ({}, {"examples": 40}, {"examples": 40, "test_examples": 25})
    )
    assert whole.test.texts == cut.test.texts
    assert len(whole.test) == 60
    assert len(both.test) == 25
    assert both.test.labels.tolist() == [number % 2 for number in numbers(both.test.texts)]
    assert both.train.texts == cut.train.texts  # one cut does not move the other
    assert len(load(test_examples=10**6).test) == 60


def test_test_examples_needs_a_given_test_split(load: Any) -> None:
    what = r"^data.test_examples: got 5, but the source has no test split; set data.test$"
    with pytest.raises(UserError, match=what):
        load(splits={"train": [0, 1] * 10}, test_examples=5)


def test_examples_come_before_the_carving(load: Any) -> None:
    data = load(splits={"train": [0, 1] * 50}, examples=50, test=0.2, validation=0.1)
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 10)


def test_owners_follow_their_rows(load: Any) -> None:
    rows = [{"text": f"x {i}", "label": i % 2, "who": i if i % 3 else f"owner {i}"} for i in range(40)]
    data = load(splits={"train": rows}, client="who", examples=30)
    assert data.train.owners.tolist() == [str(rows[i]["who"]) for i in numbers(data.train.texts)]
    assert data.train.owners.dtype.kind == "U"
    data = load(splits={"train": rows, "test": [0, 1]}, client="who")  # the test has no such column, and needs none
    assert data.test.owners is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"label": 1.5},
            r"data.label: got 1.5 in .*train.jsonl, column 'label', row 3, but labels are integers or str",
        ),
        ({"label": None}, r"data.label: got None in .*, row 3"),
        ({"label": True}, r"data.label: got True in .*, row 3"),
        ({"label": [1]}, r"data.label: got \[1\] in .*, row 3"),
        (
            {"label": 10**400},
            r"data.label: got 1000.*, row 3, but labels are integers or strings, of 64 bits or of 1 to",
        ),
        ({"who": "a\0"}, r"data.client: got 'a\\x00' in .*, row 3"),
        ({"who": "x" * 201}, r"data.client: got 'xxx.*, row 3"),
        ({"label": "a"}, r"data.label: got 0 \(.*row 1\) and 'a' \(.*row 3\) in column 'label', but labels are all"),
        ({"text": None}, r"data.text: got None in .*train.jsonl, column 'text', row 3, but texts are strings"),
        ({"text": 7}, r"data.text: got 7 in .*, row 3"),
        ({"text": "\ud800"}, r"data.text: got '\\ud800' in .*, row 3, but texts are valid Unicode"),
        ({"who": None}, r"data.client: got None in .*, column 'who', row 3, but owners are integers or strings"),
        ({"who": 1.0}, r"data.client: got 1.0 in .*, row 3"),
    ],
)
def test_a_bad_value_is_refused_by_file_column_and_row(load: Any, row: dict[str, Any], message: str) -> None:
    good = [{"text": "t", "label": i, "who": "w"} for i in range(5)]
    rows = [*good[:2], good[2] | row, *good[3:]]
    with pytest.raises(UserError, match=f"^{message}") as refusal:
        load(splits={"train": rows}, client="who")
    assert "\n" not in str(refusal.value)


def test_integers_in_one_split_and_strings_in_another_are_refused(load: Any) -> None:
    with pytest.raises(UserError, match=r"got 0 \(.*train.jsonl row 1\) and 'a' \(.*test.jsonl row 1\) in column"):
        load(splits={"train": [0, 1], "test": ["a", "b"]})


@pytest.mark.parametrize("field", ["text", "label", "client"])
def test_a_missing_column_is_refused_with_those_there_are(load: Any, field: str) -> None:
    rows = [{"text": "t", "label": i, "id": i} for i in range(3)]
    with pytest.raises(
        UserError, match=rf"^data.{field}: got 'nope', but .*train.jsonl has the columns text, label, id$"
    ):
        load(splits={"train": rows}, **{field: "nope"})


def test_a_split_that_ends_up_empty_is_refused(load: Any) -> None:
    with pytest.raises(UserError, match=r"^data.path: no rows are left for the test split \(.*data.test=0.2, "):
        load(splits={"train": [0, 1, 0]})
    with pytest.raises(UserError, match=r"^data.path: no rows are left for the train split \(data.examples=1,"):
        load(splits={"train": [0], "validation": [0] * 100, "test": [1]}, examples=1)
    with pytest.raises(UserError, match=r"^data.path: .*test.jsonl holds no rows"):
        load(splits={"train": [0, 1, 0], "test": []})


def test_one_class_is_refused(load: Any) -> None:
    with pytest.raises(UserError, match=r"^data.label: got column 'label' with the one class 3, but two are needed"):
        load(splits={"train": [3] * 10})


@pytest.mark.parametrize("name", ["", " ", "a\0", "\x1b[2J", "a\nb", "\x9b2J", "a\u202eb", "\ud800", "x" * 201])
def test_a_class_name_that_a_terminal_or_report_cannot_show_is_refused(load: Any, name: str) -> None:
    with pytest.raises(UserError, match=r"^data.label: got .*, column 'label', row 2, but labels are") as refusal:
        load(splits={"train": ["a", name, "b"]})
    assert str(refusal.value).isprintable()
    assert load(splits={"train": ["é\u200d中", "x" * 200, "a b"] * 9}).classes == ("a b", "x" * 200, "é\u200d中")


def test_empty_texts_are_counted_in_the_log(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(["a", "", "b", " \n", "c"])]
    assert len(load(splits={"train": rows}).train) == 4
    (record,) = caplog.records
    assert re.fullmatch(r"data.text: 2 of 5 texts in .*train.jsonl are empty; the first is row 2", record.getMessage())
    caplog.clear()
    load(splits={"train": [0, 1] * 5})
    assert not caplog.records


def test_rows_know_their_place_in_the_source(load: Any) -> None:
    data = load(splits={"train": [0, 1] * 50}, examples=60)
    for split in (data.train, data.validation, data.test):
        assert [split.place(i) for i in range(len(split))] == [
            f"{split.origin}, row {number + 1}" for number in numbers(split.texts)
        ]
    assert data.test.origin.endswith("train.jsonl")
