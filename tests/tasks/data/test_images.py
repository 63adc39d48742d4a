"""Images from every source, decoded once, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_models import digits, png, save_parquet, save_vit
from PIL import Image
from transformers import AutoImageProcessor

from rayfed.config.task import Data, Model
from rayfed.errors import UserError
from rayfed.tasks.data import images
from rayfed.tasks.data.dataset import TextData, load_data, load_pretraining
from rayfed.tasks.models.images import ImageInput, load_image_input

ROWS = digits(0, 12)
SETTINGS: dict[str, Any] = {"task": "image_classification", "source": "files", "test": 0.25, "validation": 0.0}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def target(vit: Path) -> ImageInput:
    return load_image_input(Model(name=str(vit)))


def parquet(folder: Path) -> Path:
    return save_parquet(folder / "train.parquet", ROWS)


def bytes_in_parquet(folder: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    columns = {"image": [png(row["image"]) for row in ROWS], "label": [row["label"] for row in ROWS]}
    parquet.write_table(pyarrow.table(columns), folder / "train.parquet")
    return folder


def paths_in_jsonl(folder: Path) -> Path:
    (folder / "png").mkdir()
    lines = []
    for i, row in enumerate(ROWS):
        (folder / "png" / f"{i}.png").write_bytes(png(row["image"]))
        lines.append(json.dumps({"image": f"png/{i}.png", "label": row["label"]}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


def folders_of_classes(folder: Path) -> Path:
    for i, row in enumerate(ROWS):
        file = folder / "train" / str(row["label"]) / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(row["image"]))
    return folder


@pytest.mark.parametrize("write", [parquet, bytes_in_parquet, paths_in_jsonl, folders_of_classes])
def test_every_source_gives_the_same_images(write: Callable[[Path], Path], tmp_path: Path, target: ImageInput) -> None:
    data = load_data(Data(path=str(write(tmp_path)), **SETTINGS), seed=0)
    found = images.decoded([data.train, data.test], target)
    assert (len(found[0]), len(found[1]), data.classes) == (9, 3, tuple("0123456789"))
    expected = {row["image"].tobytes(): row["label"] for row in ROWS}
    seen = [(split.pixels[place], label) for split in found for place, label in zip(split.places, split.labels)]
    assert sorted(expected) == sorted(pixels.tobytes() for pixels, _ in seen)
    assert all(expected[pixels.tobytes()] == label for pixels, label in seen)
    assert found[0].pixels is found[1].pixels


def test_an_image_of_a_hub_data_set_is_the_bytes_of_its_file(tmp_path: Path, target: ImageInput) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [png(row["image"]) for row in ROWS], "label": [row["label"] for row in ROWS]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[f"n{i}" for i in range(10)]))
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    settings = {**SETTINGS, "source": "hub", "name": str(tmp_path)}
    data = load_data(Data(**settings), seed=0)
    (train,) = images.decoded([data.train], target)
    assert data.classes[3] == "n3"
    assert sum(train.pixels.tobytes().count(row["image"].tobytes()) for row in ROWS) == 9


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_what_the_image_processor_gives(channels: int, tmp_path: Path) -> None:
    target = load_image_input(Model(name=str(save_vit(tmp_path, channels, size=16))))
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)) for i in range(3)]
    items = images.read_images(_table([{"image": picture} for picture in pictures]), "image")
    (rows,) = images.decoded([_split(items)], target)
    found = rows.batch(np.array([2, 0]), padded=True)["pixel_values"]
    assert found.dtype == torch.uint8
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    stock = processor([p.convert("RGB" if channels == 3 else "L") for p in pictures], return_tensors="pt")
    normalised = target.normaliser(torch.device("cpu"), torch.float32)(found)
    torch.testing.assert_close(normalised, stock["pixel_values"][[2, 0]])


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (b"no image", r"data.image: rows, row 2 cannot be decoded: cannot identify image file"),
        (png(ROWS[0]["image"])[:40], r"data.image: rows, row 2 cannot be decoded: "),
        ("missing.png", r"data.image: got 'missing.png' in rows, column 'image', row 2, but there is no such file"),
        (None, r"data.image: got None in rows, column 'image', row 2, but an image is the bytes or the path"),
        (7, r"data.image: got 7 in rows, column 'image', row 2, but an image is the bytes or the path"),
        (
            np.zeros((8, 8, 5), np.uint8),
            r"data.image: got an array of uint8 \(8, 8, 5\) in rows, column 'image', row 2",
        ),
        (np.zeros((8, 8)), r"data.image: got an array of float64 \(8, 8\) in rows, column 'image', row 2, but it has"),
        (png(Image.new("I;16", (8, 8))), r"data.image: got pixels 'I;16' in rows, row 2, but allowed are 1, L, LA"),
        (
            Image.new("F", (8, 8)),
            r"data.image: got pixels 'F' in rows, column 'image', row 2, but allowed are 1, L, LA",
        ),
    ],
)
def test_a_bad_image_is_named_by_its_row(image: Any, line: str, target: ImageInput) -> None:
    with pytest.raises(UserError, match=rf"^{line}") as error:
        images.decoded([_split(images.read_images(_table([ROWS[0], {"image": image}]), "image"))], target)
    assert "\n" not in str(error.value)


def test_a_second_run_maps_the_decoded_images_and_decodes_none(
    tmp_path: Path, target: ImageInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "CACHED", 0)
    monkeypatch.setenv("RAYFED_CACHE", str(tmp_path))
    split = _split([row["image"] for row in ROWS])
    first = images.decoded([split], target)[0].pixels.copy()
    (file,) = (tmp_path / "images").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(images, "_decode", None)  # whatever calls it fails
        (again,) = images.decoded([split], target)
        assert isinstance(again.pixels.base, np.memmap)
        np.testing.assert_array_equal(again.pixels, first)
    file.write_bytes(file.read_bytes()[:200])
    np.testing.assert_array_equal(images.decoded([split], target)[0].pixels, first)
    assert len(file.read_bytes()) > 768  # it is whole again
    monkeypatch.setenv("RAYFED_CACHE", str(file))  # no folder can be made there
    np.testing.assert_array_equal(images.decoded([split], target)[0].pixels, first)


def test_images_are_moved_and_mirrored_by_their_generator_alone() -> None:
    pixels = torch.arange(1, 1 + 6 * 16, dtype=torch.uint8).view(6, 1, 4, 4)

    def draw(crop: int, flip: bool) -> torch.Tensor:
        return images.shifted(pixels, np.random.default_rng(5), crop, flip)

    assert torch.equal(draw(0, False), pixels)
    assert torch.equal(draw(1, True), draw(1, True))
    mirrored = draw(0, True)
    kinds = [torch.equal(new, old.flip(-1)) for new, old in zip(mirrored, pixels)]
    assert all(kind or torch.equal(new, old) for kind, new, old in zip(kinds, mirrored, pixels))
    assert 0 < sum(kinds) < 6
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1))
    windows = [padded[..., y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    moves = [next(i for i, w in enumerate(windows) if torch.equal(w[n], new)) for n, new in enumerate(draw(1, False))]
    assert len(set(moves)) > 2


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_no_client_has_a_row_of_the_pretraining(share: float) -> None:
    source = _source(digits(0, 300))
    settings = {"source": "object", "fingerprint": "given", "task": "image_classification", "pretrain_share": share}
    kept, classes = load_pretraining(Data(**settings), source)
    everything: list[TextData] = [load_data(Data(**settings), seed, source) for seed in (0, 1)]
    whole = load_data(Data(**{**settings, "pretrain_share": 0.0}), 0, source)
    assert classes == whole.classes
    assert len(kept) == pytest.approx(300 * share, abs=30)
    own = {item.tobytes() for item in kept.texts}
    for data in everything:
        rows = [item.tobytes() for split in (data.train, data.validation, data.test) for item in split.texts]
        assert len(rows) == 300 - len(kept)
        assert own.isdisjoint(rows)


def _table(rows: list[dict[str, Any]]) -> Any:
    from rayfed.tasks.data.table import Table

    return Table("rows", {"image": [row["image"] for row in rows]})


def _split(items: list[Any]) -> Any:
    from rayfed.tasks.data.dataset import Split

    return Split(items, np.zeros(len(items), np.int64), origin="rows")


def _source(rows: list[dict[str, Any]]) -> Any:
    from rayfed.tasks.data.table import Source, Table

    return Source({"train": Table("rows", {key: [row[key] for row in rows] for key in ("image", "label")})})
