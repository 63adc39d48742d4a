"""Images in local files: Parquet, JSON lines or CSV with a column of images, or folders of image files.

A folder of images has `train/CLASS/`, `test/CLASS/` and optionally `validation/CLASS/`, or `CLASS/` alone, which is the
training split. Images are read when they are decoded (`rayfed.tasks.data.images`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayfed.config.task import Data
from rayfed.errors import UserError, allowed, first_line
from rayfed.tasks.data.files import check_size, existing, read_file, split_files
from rayfed.tasks.data.hub import read_hub
from rayfed.tasks.data.table import SPLITS, Source, Table

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_image_source(settings: Data) -> Source:
    """The splits that ``settings`` name, where `data.text` is the column with the images.

    An image is bytes, a struct of bytes and path, or a path: an absolute one where the source is a file. UserError,
    with the file, if something is missing or malformed.
    """
    if settings.source == "hub":
        return read_hub(settings)
    path = existing(settings)
    if path.is_dir() and (folders := _split_folders(path)):
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
    return Table(str(folder), {settings.text: [file for file, _ in rows], settings.label: [name for _, name in rows]})


def _columns(file: Path, settings: Data) -> dict[str, list[Any]]:
    """The columns of a file, with absolute paths."""
    column = settings.text
    if file.suffix.lower() == ".parquet":
        found = read_file(file, settings.model_copy(update={"text": ""}))  # without the images
        if column in found:
            found[column] = _parquet_images(file, column)
    else:
        found = read_file(file, settings)
    if column in found:
        found[column] = [_absolute(value, file.parent) for value in found[column]]
    return found


def _absolute(value: Any, folder: Path) -> Any:
    """A path below the folder as an absolute one; bytes as they are."""
    if isinstance(value, dict) and not value.get("bytes"):
        value = value.get("path")
    return str(folder / value) if isinstance(value, str) and value else value


def _parquet_images(file: Path, column: str) -> list[Any]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            meta = table.metadata
            parts = [i for i in range(meta.num_columns) if meta.schema.column(i).path.split(".")[0] == column]
            groups = (meta.row_group(i) for i in range(meta.num_row_groups))
            check_size(file, sum(group.column(i).total_uncompressed_size for group in groups for i in parts))
            values: list[Any] = table.read(columns=[column]).column(column).to_pylist()
            return values
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many kinds
        raise UserError(f"data.path: {file} cannot be read: {first_line(error)}") from error
