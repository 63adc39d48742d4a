"""Images in local files: Parquet, JSON lines or CSV with a column of images, or folders of image files.

A folder of images has `train/CLASS/`, `test/CLASS/` and optionally `validation/CLASS/`, or `CLASS/` alone, which is the
training split. Images are read when they are decoded (`rayfed.tasks.data.images`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayfed.config.task import Data
from rayfed.errors import allowed
from rayfed.tasks.data.files import existing, read_file, split_file, split_files
from rayfed.tasks.data.table import SPLITS, Source, Table

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_image_files(settings: Data) -> Source:
    """The splits at `data.path`, as `read_files` gives them. An image is bytes, or the path of a file.

    UserError, with the file, if something is missing or malformed.
    """
    path = existing(settings)
    if path.is_dir() and split_file(path, "train") is None and (folders := _split_folders(path)):
        return Source({split: _folder(folder, settings) for split, folder in folders.items()})
    files = split_files(path)
    return Source({split: Table(str(file), _columns(file, settings)) for split, file in files.items()})


def _split_folders(path: Path) -> dict[str, Path]:
    """The folder of each split; the path itself where its folders are classes; empty where it holds no images."""
    inner = sorted(entry for entry in path.iterdir() if entry.is_dir())
    splits = {split: entry for split, names in SPLITS.items() for entry in inner if entry.name.lower() in names}
    if "train" in splits:
        return splits
    return {"train": path} if any(_images(entry) for entry in inner) else {}


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def _folder(folder: Path, settings: Data) -> Table:
    """The images in the folders of classes, in the order of the classes' and the files' names."""
    rows = [(file, entry.name) for entry in sorted(folder.iterdir()) if entry.is_dir() for file in _images(entry)]
    if not rows:
        what = f"it needs a folder for each class, with files that end in {', '.join(SUFFIXES)}"
        raise allowed("data.path", str(folder), what)
    return Table(str(folder), {settings.image: [file for file, _ in rows], settings.label: [name for _, name in rows]})


def _columns(file: Path, settings: Data) -> dict[str, list[Any]]:
    """The columns of a file. Paths of images are relative to its folder."""
    found = read_file(file, settings)
    if settings.image in found:
        found[settings.image] = [_placed(value, file.parent) for value in found[settings.image]]
    return found


def _placed(value: Any, folder: Path) -> Any:
    """An image's path as one below the folder; anything else, such as its bytes, as it is."""
    if isinstance(value, dict) and not value.get("bytes"):
        value = value.get("path")
    return folder / value if isinstance(value, str) and value else value
