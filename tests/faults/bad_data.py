"""Over 100 bad data sets and model folders: `bad_inputs` lists them, each with words of the refusal that it needs.

Every case is a function that writes a folder from a seeded random generator, so that positions, rows and damaged bytes
differ from seed to seed.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

Rows = list[dict[str, Any]]
Make = Callable[[Path, random.Random], Path | str | None]


@dataclass(frozen=True)
class BadInput:
    """A bad data set or model folder.

    ``make`` writes it: a data set into an empty folder, a model into a copy of a good one. It returns the path to name
    in the settings (None: the folder). ``refusal`` is found in the one line. Some hang or fill the memory where the
    refusal fails: run them in a process with limits.
    """

    name: str
    kind: str  # "data" or "model"
    make: Make
    refusal: str


def good_rows(draw: random.Random) -> Rows:
    """40 rows of two classes."""
    return [{"text": f"card{draw.randrange(6)} loan{draw.randrange(6)}", "label": i % 2} for i in range(40)]


def bad_inputs() -> list[BadInput]:
    """All cases, in a fixed order, with unique names."""
    return [*_rows(), *_json(), *_tables(), *_files(), *_configs(), *_weights(), *_tokenizers(), *_names()]


# Data sets


def _write(folder: Path, rows: Rows, ending: str = "jsonl") -> None:
    path = folder / f"train.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(change: dict[str, Any], ending: str = "jsonl") -> Make:
    """One row, anywhere, with other values."""

    def make(folder: Path, draw: random.Random) -> None:
        rows = good_rows(draw)
        rows[draw.randrange(1, len(rows))] |= change
        _write(folder, rows, ending)

    return make


def _column(name: str, value: Callable[[int], Any], ending: str = "jsonl") -> Make:
    """All rows with the values ``value(row)`` in a column."""

    def make(folder: Path, draw: random.Random) -> None:
        _write(folder, [row | {name: value(i)} for i, row in enumerate(good_rows(draw))], ending)

    return make


def _rows() -> list[BadInput]:
    labels = {
        "float": 1.5, "one as a float": 1.0, "nan": float("nan"), "infinity": float("inf"), "true": True, "null": None,
        "list": [0], "object": {"a": 0}, "string": "a", "2 ** 63": 2**63, "10 ** 400": 10**400,
    }  # fmt: skip
    names = {
        "empty": "", "blank": "  ", "NUL": "a\0", "terminal sequence": "\x1b[2J", "line end": "a\nb",
        "8-bit CSI": "\x9b2J", "reversed writing": "a\u202eb", "half a surrogate": "\ud800", "long": "x" * 10**6,
    }  # fmt: skip
    texts = {"null": None, "number": 7, "list": ["a"], "half a surrogate": "a\udfff", "boolean": False}
    csv_labels = ["nan", "NaN", "N/A", "null", "true", "", "1.0", "-inf"]
    return [
        *(
            BadInput(f"label: {name}", "data", _row({"label": value}), "data.label: got")
            for name, value in labels.items()
        ),
        *(
            BadInput(
                f"class: {name}", "data", _column("label", lambda i, v=value: v if i % 3 else "ok"), "data.label: got"
            )
            for name, value in names.items()
        ),
        *(BadInput(f"text: {name}", "data", _row({"text": value}), "data.text: got") for name, value in texts.items()),
        *(
            BadInput(f"CSV label {value!r}", "data", _row({"label": value}, "csv"), "data.label: got")
            for value in csv_labels
        ),
        BadInput("one class", "data", _column("label", lambda i: 3), "with the one class 3"),
        BadInput(
            "no column of labels", "data", _bytes("train.jsonl", b'{"text": "a", "kind": 1}\n'), "has the columns"
        ),
        BadInput(
            "hostile column names",
            "data",
            _bytes("train.jsonl", b'{"text": "a", "\\u001b[31m\\n": 1}\n'),
            r"\x1b[31m\n",
        ),
        BadInput("10 MB without a space", "data", _row({"text": "ab" * 5_000_000}), "characters in"),
    ]


def _bytes(name: str, content: bytes) -> Make:
    def make(folder: Path, draw: random.Random) -> None:
        (folder / name).write_bytes(content)

    return make


def _line(content: bytes) -> Make:
    """A bad line of JSON anywhere between good ones."""

    def make(folder: Path, draw: random.Random) -> None:
        lines = [json.dumps(row).encode() for row in good_rows(draw)]
        lines.insert(draw.randrange(len(lines)), content)
        (folder / "train.jsonl").write_bytes(b"\n".join(lines))

    return make


def _json() -> list[BadInput]:
    lines = {
        "nested lists": (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
        "nested objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        "10,000 digits": (b'{"text": "a", "label": ' + b"9" * 10_000 + b"}", "is not JSON"),
        "a key twice": (b'{"text": "a", "label": 0, "label": 1}', "'label' is there twice"),
        "not UTF-8": (b'{"text": "\xff", "label": 0}', "is not JSON"),
        "a cut line": (b'{"text": "a", "lab', "is not JSON"),
        "a list": (b'["a", 0]', "is not a JSON object"),
        "a number": (b"1", "is not a JSON object"),
        "a raw NUL": (b'{"text": "a\0", "label": 0}', "is not JSON"),
    }
    huge = b"[" + b'{"text": "a", "label": 0}, ' * 1_500_000 + b"]"
    return [
        *(BadInput(f"JSON: {name}", "data", _line(line), refusal) for name, (line, refusal) in lines.items()),
        BadInput("JSON: one huge line", "data", _bytes("train.json", huge), "has more than"),
    ]


def _tables() -> list[BadInput]:
    head = b"label,text\n0,a\n1,b\n"

    def cut(folder: Path, draw: random.Random) -> None:
        _write(folder, good_rows(draw), "parquet")
        path = folder / "train.parquet"
        path.write_bytes(path.read_bytes()[: draw.randrange(20, path.stat().st_size - 1)])

    def damaged(folder: Path, draw: random.Random) -> None:
        _write(folder, good_rows(draw), "parquet")
        path = folder / "train.parquet"
        content = bytearray(path.read_bytes())
        content[4:40] = draw.randbytes(36)  # the first page's header
        path.write_bytes(content)

    def table(columns: dict[str, Any]) -> Make:
        def make(folder: Path, draw: random.Random) -> None:
            parquet.write_table(pyarrow.table(columns), folder / "train.parquet", compression="zstd")

        return make

    def dictionary(folder: Path, draw: random.Random) -> None:
        words = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10_000, pyarrow.int32()), ["x" * 2**20])
        table({"text": words, "label": [i % 2 for i in range(10_000)]})(folder, draw)

    def gzipped(name: str, repeat: int, piece: bytes) -> Make:
        def make(folder: Path, draw: random.Random) -> None:
            with gzip.open(folder / name, "wb", compresslevel=1) as file:
                for _ in range(repeat):
                    file.write(piece * 10_000)

        return make

    def gzip_cut(folder: Path, draw: random.Random) -> None:
        content = gzip.compress("".join(json.dumps(row) + "\n" for row in good_rows(draw)).encode())
        (folder / "train.jsonl.gz").write_bytes(content[: draw.randrange(12, len(content) - 9)])

    return [
        BadInput("CSV: open quote", "data", _bytes("train.csv", head + b'1,"c\n0,d\n1,e\n'), "quote that never closes"),
        BadInput(
            "CSV: open quote, long", "data", _bytes("train.csv", head + b'1,"c\n' + b"0,d\n" * 10**7), "never closes"
        ),
        BadInput(
            "CSV: a cell of 100 MB", "data", _bytes("train.csv", head + b"1," + b"x" * 10**8), "a row of more than"
        ),
        BadInput("CSV: too few cells", "data", _bytes("train.csv", head + b"1\n"), "Row #4"),
        BadInput("CSV: not UTF-8", "data", _bytes("train.csv", head + b"1,\xff\n"), "row 3 is not UTF-8"),
        BadInput("CSV: terminal sequence", "data", _bytes("train.csv", head + b"1,\x1b[31m,\n"), r"\x1b[31m"),
        BadInput("CSV: a column twice", "data", _bytes("train.csv", b"text,text,label\na,b,0\n"), "is there twice"),
        BadInput("CSV: no name in the header", "data", _bytes("train.csv", b"text,\na,0\n"), "has the columns"),
        BadInput("Parquet: cut short", "data", cut, "cannot be read"),
        BadInput("Parquet: damaged page", "data", damaged, "cannot be read"),
        BadInput(
            "Parquet: lists", "data", table({"text": [["a"], ["b"]], "label": [0, 1]}), "a row has a single value"
        ),
        BadInput("Parquet: 10 GB of one string", "data", dictionary, "times its own size"),
        BadInput(
            "Parquet: 80 MB of nothing",
            "data",
            table({"text": ["a"] * 10**7, "label": [0] * 10**7}),
            "times its own size",
        ),
        BadInput("gzip: cut short", "data", gzip_cut, "cannot be read"),
        BadInput("gzip: bomb of blank lines", "data", gzipped("train.jsonl.gz", 2_000, b"\n"), "times its own"),
        BadInput("gzip: bomb of rows", "data", gzipped("train.csv.gz", 3_000, b"text,label\n"), "times its own"),
    ]


def _files() -> list[BadInput]:
    def pipe(folder: Path, draw: random.Random) -> None:
        os.mkfifo(folder / "train.jsonl")

    def named_pipe(folder: Path, draw: random.Random) -> Path:
        os.mkfifo(folder / "train.jsonl")
        return folder / "train.jsonl"

    def link(target: str) -> Make:
        def make(folder: Path, draw: random.Random) -> None:
            (folder / "train.csv").symlink_to(target)

        return make

    def subfolder(folder: Path, draw: random.Random) -> None:
        _write(folder, good_rows(draw))
        (folder / "test.jsonl").mkdir()

    return [
        BadInput("no file", "data", lambda folder, draw: None, "it holds nothing"),
        BadInput("an empty file", "data", _bytes("train.jsonl", b""), "holds no rows"),
        BadInput("a pipe in the folder", "data", pipe, "is not a file"),
        BadInput("a pipe", "data", named_pipe, "is not a file"),
        BadInput("a broken link", "data", link("gone/at/all"), "is not a file"),
        BadInput("a link to itself", "data", link("train.csv"), "is not a file"),
        BadInput("a folder as a split", "data", subfolder, "is not a file"),
        BadInput("a long name", "data", lambda folder, draw: "x" * 500, "cannot be read"),
        BadInput("an unknown home", "data", lambda folder, draw: "~nobody-at-all/data", "cannot be read"),
    ]


# Model folders


def _settings(name: str = "config.json", **changes: Any) -> Make:
    def make(folder: Path, draw: random.Random) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return make


def _without(*names: str) -> Make:
    def make(folder: Path, draw: random.Random) -> None:
        for name in names:
            (folder / name).unlink()

    return make


def _configs() -> list[BadInput]:
    changes: dict[str, dict[str, Any]] = {
        "huge width": {"hidden_size": 10**9}, "wrong width": {"hidden_size": 64}, "no width": {"hidden_size": 0},
        "negative width": {"hidden_size": -32}, "width as text": {"hidden_size": "32"},
        "no heads": {"num_attention_heads": 0}, "more layers": {"num_hidden_layers": 3},
        "100,000 layers": {"num_hidden_layers": 10**5},
        "a billion layers": {"num_hidden_layers": 10**9}, "a billion labels": {"num_labels": 10**9},
        "huge vocabulary": {"vocab_size": 10**12}, "small vocabulary": {"vocab_size": 10},
        "huge length": {"max_position_embeddings": 10**18}, "unknown type": {"model_type": "nothing"},
        "unknown activation": {"hidden_act": "nothing"}, "unknown format": {"dtype": "float999"},
        "code from outside": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}},
        "kernels from outside": {"attn_implementation": "someone/kernel"}, "padding outside": {"pad_token_id": 10**6},
    }  # fmt: skip
    contents = {"list": b"[]", "not JSON": b"{oops", "empty": b"", "NULs": bytes(99), "nested": b'{"a":' + b"[" * 10**5}
    return [
        *(
            BadInput(f"config.json: {name}", "model", _settings(**change), "model.name: ")
            for name, change in changes.items()
        ),
        *(
            BadInput(f"config.json: {name}", "model", _bytes("config.json", content), "its config.json is not")
            for name, content in contents.items()
        ),
        BadInput("no config.json", "model", _without("config.json"), "holds no config.json"),
        BadInput("an adapter", "model", _bytes("adapter_config.json", b"{}"), "name its base model"),
    ]


def _header(change: Callable[[dict[str, Any], random.Random], None]) -> Make:
    """A safetensors file whose header is changed."""

    def make(folder: Path, draw: random.Random) -> None:
        content = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header, draw)
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return make


def _inner(header: dict[str, Any], draw: random.Random) -> str:
    """One of the encoder's tensors."""
    return draw.choice(sorted(name for name in header if "encoder.layer" in name))


def _weights() -> list[BadInput]:
    def rename(header: dict[str, Any], draw: random.Random) -> None:
        name = _inner(header, draw)
        header[name[:-1] + "\x1b"] = header.pop(name)

    def overlap(header: dict[str, Any], draw: random.Random) -> None:
        header[_inner(header, draw)]["data_offsets"] = [0, 4]

    def shape(header: dict[str, Any], draw: random.Random) -> None:
        header[_inner(header, draw)]["shape"] = [2**62, 8]

    def not_finite(value: float) -> Make:
        def make(folder: Path, draw: random.Random) -> None:
            tensors = load_file(folder / "model.safetensors")
            tensor = tensors[_inner(tensors, draw)]
            tensor.view(-1)[draw.randrange(tensor.numel())] = value
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})

        return make

    def cut(folder: Path, draw: random.Random) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])

    def long_header(folder: Path, draw: random.Random) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])

    def pickled(folder: Path, draw: random.Random) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    def pickled_beside(folder: Path, draw: random.Random) -> None:
        pickled(folder, draw)
        save_file({name: torch.zeros(9_000) for name in "abc"}, folder / "other.safetensors")

    return [
        BadInput("weights: a damaged name", "model", _header(rename), "its weights lack"),
        BadInput("weights: overlapping", "model", _header(overlap), "cannot be read"),
        BadInput("weights: absurd shape", "model", _header(shape), "cannot be read"),
        BadInput("weights: NaN", "model", not_finite(float("nan")), "not finite"),
        BadInput("weights: infinite", "model", not_finite(float("-inf")), "not finite"),
        BadInput("weights: cut short", "model", cut, "cannot be read"),
        BadInput("weights: header of 2 ** 60", "model", long_header, "cannot be read"),
        BadInput(
            "weights: header no JSON", "model", _bytes("model.safetensors", b"\4" + bytes(7) + b"{oop"), "cannot be"
        ),
        BadInput("weights: pickled", "model", pickled, "pickled weights ('pytorch_model.bin') are never loaded"),
        BadInput("weights: pickled beside others", "model", pickled_beside, "cannot be loaded"),
        BadInput("weights: none", "model", _without("model.safetensors"), "holds no *.safetensors"),
    ]


def _tokenizers() -> list[BadInput]:
    token = {"id": 10**9, "content": "card", "special": True}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": []}
    pattern = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    changes: dict[str, dict[str, Any]] = {
        "a token outside": {"added_tokens": [token]},
        "a panic in the template": {"post_processor": template | {"special_tokens": {}}},
        "a panic in the charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "no pattern": {"pre_tokenizer": pattern},
        "no vocabulary": {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "[UNK]"}},
        "no unigrams": {"model": {"type": "Unigram", "unk_id": 0, "vocab": []}},
        "unknown model": {"model": {"type": "Nothing"}},
        "negative ids": {"model": {"type": "WordLevel", "vocab": {"[UNK]": -1}, "unk_token": "[UNK]"}},
    }
    return [
        *(
            BadInput(f"tokenizer.json: {name}", "model", _settings("tokenizer.json", **change), "model.name: ")
            for name, change in changes.items()
        ),
        BadInput("tokenizer.json: a list", "model", _bytes("tokenizer.json", b"[]"), "cannot be loaded"),
        BadInput("tokenizer.json: not JSON", "model", _bytes("tokenizer.json", b"{oops"), "cannot be loaded"),
        BadInput("tokenizer_config.json: a list", "model", _bytes("tokenizer_config.json", b"[]"), "cannot be loaded"),
        BadInput(
            "tokenizer_config.json: no length",
            "model",
            _settings("tokenizer_config.json", model_max_length="x"),
            "model.name",
        ),
        BadInput("no tokenizer", "model", _without("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer"),
    ]


def _names() -> list[BadInput]:
    return [
        BadInput("a file", "model", lambda folder, draw: folder / "config.json", "that is a file"),
        BadInput("300 characters", "model", lambda folder, draw: "x" * 300, "is no name"),
    ]


def write(case: BadInput, folder: Path, good_model: Path, seed: int) -> str:
    """Writes the case below ``folder``, which is empty, and returns the path to name in the settings."""
    own = folder / "input"
    if case.kind == "model":
        shutil.copytree(good_model, own)
    else:
        own.mkdir()
    return str(case.make(own, random.Random(f"{seed} {case.name}")) or own)
