from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from rayfed.config.task import Data
from rayfed.errors import UserError
from rayfed.tasks.data import files
from rayfed.tasks.data.dataset import TextData, load_data
from rayfed.tasks.data.files import read_files

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
ROWS = [
    {"text": "plain", "label": "b", "who": "007", "id": 1},
    {"text": 'quotes " and, commas\nand lines', "label": "a", "who": "x", "id": 2},
    {"text": "2020-01-01", "label": "b", "who": "007", "id": 3},
    {"text": "", "label": "c é", "who": "y", "id": 4},
]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        if ".csv" in path.name:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\n".join(json.dumps(row) for row in rows))


def load(path: Path, **settings: Any) -> TextData:
    return load_data(Data(source="files", path=str(path), **settings), seed=0)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "csv", "csv.gz", "parquet"])
def test_every_format_gives_the_same_columns(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"train.{ending}", ROWS)
    settings = Data(source="files", path=str(tmp_path), client="who")
    columns = read_files(settings).tables["train"].columns
    for name in ("text", "label", "who"):
        assert columns[name] == [row[name] for row in ROWS]
    assert list(columns) == ["text", "label", "who", "id"]
    assert columns["id"] == []  # nobody asked for it


@pytest.mark.parametrize("name", ["validation", "val", "dev"])
def test_a_folder_has_its_splits_and_other_files_are_left_alone(tmp_path: Path, name: str) -> None:
    for stem, row in (("train", 0), ("test", 1), (name, 3), ("oos_test", 2)):
        write(tmp_path / f"{stem}.jsonl", [ROWS[row], ROWS[0]])
    for other in ("README.md", "labels.json", "train.txt", "train.md"):
        (tmp_path / other).write_text("not data")
    data = load(tmp_path)
    assert (data.train.texts[0], data.test.texts[0], data.validation.texts[0]) == ("plain", ROWS[1]["text"], "")
    assert data.classes == ("a", "b", "c é")
    assert data.test.labels.tolist() == [0, 1]
    assert data.train.owners is None


def test_a_single_file_is_the_training_split(tmp_path: Path) -> None:
    write(tmp_path / "whatever.jsonl", ROWS)
    assert list(read_files(Data(source="files", path=str(tmp_path / "whatever.jsonl"))).tables) == ["train"]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(["10", "9", "+9"], ("9", "10")), (["1", "x", "2.5"], ("1", "2.5", "x")), (["true", "no", "no"], ("no", "true"))],
)
def test_csv_labels_are_integers_only_if_all_are(tmp_path: Path, labels: list[str], classes: tuple[str, ...]) -> None:
    write(tmp_path / "train.csv", [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    write(tmp_path / "test.csv", [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    assert load(tmp_path).classes == classes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", '{"text": "a", "label": 0}\n\n{"text": oops}\n', r"train.jsonl, line 3 is not JSON: Expecting"),
        ("train.jsonl", '{"text": "a", "label": 0}\n{"text"', r"train.jsonl, line 2 is not JSON"),
        ("train.json", '[{"text": "a"}]', r"train.json, line 1 is not a JSON object"),
        ("train.jsonl", "null\n", r"train.jsonl, line 1 is not a JSON object"),
        ("train.jsonl", b"\xff\xfe", r"train.jsonl, line 1 is not JSON: 'utf-8' codec can't decode"),
        ("train.jsonl.gz", b"not gzip", r"train.jsonl.gz cannot be read: Not a gzipped file"),
        (
            "train.jsonl.gz",
            gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:30],
            r"train.jsonl.gz cannot be read: Compressed file",
        ),
        ("train.csv", "text,label\na,b\nc\n", r"train.csv cannot be read: CSV parse error: Row #3: Expected 2 columns"),
        ("train.csv", b"text,label\n\xff,b\n", r"train.csv, column 'text', row 1 is not UTF-8: invalid start byte"),
        ("train.jsonl", '{"text": "a", "label": 0, "label": 1}', r"line 1 is not JSON: the key 'label' is there twice"),
        ("train.jsonl", '{"a":' * 10**5, r"train.jsonl, line 1 is nested too deeply"),
        ("train.jsonl", '{"text": "' + "x" * 2**20 + '"}', r"train.jsonl, line 1 has more than 1048576 bytes"),
        ("train.csv", 'label,text\n0,a\n1,"b\n0,c\n', r"train.csv, row 2 opens a quote that never closes"),
        ("train.csv", 'label,text\n0,"' + "a\n" * 2**21, r"a row of more than 1048576 bytes, or a quote that never"),
        ("train.csv", "text,label\na,b\n\x1b[31m\n", r"Expected 2 columns, got 1: \\x1b\[31m"),
        ("train.jsonl.gz", gzip.compress(b"\n" * 2**19), r"train.jsonl.gz holds more than 100 times its own size"),
        (
            "train.csv.gz",
            gzip.compress(b"text,label\n" * 2**16),
            r"train.csv.gz holds more than 100 times its own size",
        ),
        ("train.csv", "text,text,label\na,b,c\n", r"the column 'text' is there twice"),
        ("train.csv.gz", b"not gzip", r"train.csv.gz cannot be read: "),
        ("train.parquet", b"not parquet", r"train.parquet cannot be read: Parquet magic bytes not found"),
        ("train.jsonl", "", r"train.jsonl holds no rows"),
        ("train.jsonl", "\n\n", r"train.jsonl holds no rows"),
        ("train.csv", "", r"train.csv cannot be read: Empty CSV file"),
        ("train.csv", "text,label\n", r"train.csv holds no rows"),
        ("test.jsonl", "{}", r"but the folder needs a train file \(train.jsonl, .*\); it holds test.jsonl"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes, message: str
) -> None:
    monkeypatch.setattr(files, "MOST_ROW_BYTES", 2**20)
    monkeypatch.setattr(files, "SMALL", 2**16)
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=rf"^data.path: .*{message}") as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value)


def test_paths_that_are_not_there_or_not_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data.path: got '.*gone', but there is no such file or folder"):
        load(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"^data.path: got .*notes.txt', but a data file ends in .jsonl, .jsonl.gz, "):
        load(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "pair", [("train.csv", "train.jsonl"), ("dev.jsonl", "val.jsonl"), ("test.csv", "test.csv.gz")]
)
def test_two_files_for_one_split_are_refused_by_name(tmp_path: Path, pair: tuple[str, str]) -> None:
    for name in {*pair, "train.jsonl"}:
        write(tmp_path / name, ROWS)
    with pytest.raises(UserError, match=rf"^data.path: .*{pair[0]} and {pair[1]} are both there"):
        load(tmp_path)


@pytest.mark.parametrize("label", ["nan", "NaN", "N/A", "none", "TRUE", "-inf", "1.5", "1.0", "1e999", ""])
def test_a_csv_label_that_is_no_integer_among_integers_is_refused(tmp_path: Path, label: str) -> None:
    (tmp_path / "train.csv").write_text(f"text,label\na,0\nb,1\nc,{label}\nd,0\n")
    with pytest.raises(UserError, match=r"^data.label: got .*row [13]"):
        load(tmp_path)


def test_csv_quotes_and_long_rows_are_read(tmp_path: Path) -> None:
    texts = ["x" * 2_000_000, 'say "hi",\nplease', '5" nail', "ends with a line\n"]
    write(tmp_path / "train.csv", [{"label": i % 2, "text": text} for i, text in enumerate(texts)])
    columns = read_files(Data(source="files", path=str(tmp_path))).tables["train"].columns
    assert columns == {"label": [0, 1, 0, 1], "text": texts}
    (tmp_path / "train.csv").write_text('label,text\n0,5" nail\n1,"a\n\nb"\n\n')
    columns = read_files(Data(source="files", path=str(tmp_path))).tables["train"].columns
    assert columns["text"] == ['5" nail', "a\n\nb"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text": [["a"], ["b"]], "label": [0, 1]},
            "column 'text' has the type list<.*>, but a row has a single value",
        ),
        ({"text": ["a"] * 2**16, "label": [0] * 2**16}, "holds more than 100 times its own size"),
        ({"text": ["a" * 2**12] * 1000, "label": [0] * 1000}, "holds more than 100 times its own size"),
    ],
)
def test_parquet_that_grows_out_of_proportion_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(files, "SMALL", 2**16)
    parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=f"^data.path: .*train.parquet.* {message}"):
        load(tmp_path)


def test_parquet_in_row_groups_of_every_encoding(tmp_path: Path) -> None:
    rows = [{"text": f"text {i % 7} é", "label": i % 3, "who": None if i == 5 else f"w{i}"} for i in range(50)]
    for options in ({"use_dictionary": False}, {"use_dictionary": True}, {"compression": "zstd"}):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=9, **options)
        columns = read_files(Data(source="files", path=str(tmp_path), client="who")).tables["train"].columns
        assert columns == {name: [row[name] for row in rows] for name in rows[0]}


def test_only_files_are_opened(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    pipe = tmp_path / "test.jsonl"
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("gone", path)):
        make(pipe)
        with pytest.raises(UserError, match=r"^data.path: .*test.jsonl is not a file"):
            load(tmp_path)
        pipe.rmdir() if pipe.is_dir() else pipe.unlink()


@pytest.mark.parametrize("path", ["x" * 500, "~nobody-at-all/data"])
def test_a_path_that_no_file_can_have_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"^data.path: got '.*', but it cannot be read"):
        read_files(Data(source="files", path=path))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not here")
def test_real_data_sets() -> None:
    banking = load(SHARED / "banking77")
    assert (len(banking.train), len(banking.validation), len(banking.test)) == (9003, 1000, 3080)
    assert banking.classes == tuple(str(i) for i in range(77))
    clinc = load(SHARED / "clinc150", client="domain")
    assert (len(clinc.train), len(clinc.validation), len(clinc.test)) == (15000, 3000, 4500)
    assert clinc.train.owners is not None
    assert len(np.unique(clinc.train.owners)) == 10
    with pytest.raises(UserError, match=r"data.label: got 'label', but .*train.jsonl.gz has the columns text, answer"):
        load(SHARED / "gsm8k")
