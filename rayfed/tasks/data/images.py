"""Images: the values of a column, decoded once to the size of the model's input, and batches of them.

An image of a source is `Encoded`: the bytes of a file, the path of a file, or an array. `decoded` makes one array of
bytes (uint8) of all images of a run. Large arrays are files in a cache folder (`RAYFED_CACHE`, by default
~/.cache/rayfed), named by a hash of the images and of the image processor, and mapped into memory: the next run with
the same images decodes none.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayfed.errors import UserError, allowed, first_line
from rayfed.files import atomic_path
from rayfed.tasks.data.table import Table, content, listed

if TYPE_CHECKING:
    from PIL.Image import Image

    from rayfed.tasks.data.dataset import Split
    from rayfed.tasks.models.images import ImageInput

Encoded = bytes | Path | np.ndarray
"""An image before it is decoded. An array is uint8, (height, width) or (height, width, 1, 3 or 4)."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded. Pillow knows more: some run other programs, such as Ghostscript."""
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's kinds of pixels that have 8 bits a channel, so that nothing but transparency is lost."""
AT_ONCE = 256  # images that are resized together
CACHED = 2**23  # bytes: to decode fewer takes less than a second


@dataclass(frozen=True, eq=False)
class Images:
    """`Rows` of images of one size. The splits of a run share the ``pixels``; ``places`` has the split's own."""

    pixels: np.ndarray  # (images, channels, height, width) uint8
    places: np.ndarray  # (n,) int64, indices into pixels
    labels: np.ndarray  # (n,) int64, class indices

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(n,): 1 per image. All images have the same number of patches."""
        return np.ones(len(self), dtype=np.int64)

    def batch(self, rows: np.ndarray, padded: bool) -> dict[str, torch.Tensor]:
        """``pixel_values`` (b, channels, height, width) uint8, not normalised, and ``labels`` (b, ...)."""
        pixels = self.pixels[self.places[rows]]  # a copy: writable
        return {"pixel_values": torch.from_numpy(pixels), "labels": torch.from_numpy(self.labels[rows])}


def read_images(table: Table, column: str) -> list[Any]:
    """The column's images, each `Encoded`, not yet decoded. UserError for the first value that is none."""
    if column not in table.columns:
        raise allowed("data.image", column, f"{table.origin} has the columns {listed(table.columns)}")
    return [
        _encoded(value, f"{table.origin}, column {column!r}, row {i}")
        for i, value in enumerate(table.columns[column], 1)
    ]


def decoded(splits: Sequence[Split], target: ImageInput) -> list[Images]:
    """The splits as rows of the size that the image processor gives. Splits of one table share their pixels.

    UserError, with the file and the row, where an image cannot be decoded or has other pixels than `MODES`.
    """
    pools: dict[str, dict[int, tuple[Encoded, str]]] = {}
    for split in splits:
        pool = pools.setdefault(split.origin, {})
        pool.update(
            (number, (item, split.place(i))) for i, (number, item) in enumerate(zip(_numbers(split), split.texts))
        )
    numbers = {origin: np.array(sorted(pool), dtype=np.int64) for origin, pool in pools.items()}
    pixels = {origin: _pixels([pool[i] for i in numbers[origin].tolist()], target) for origin, pool in pools.items()}
    return [
        Images(pixels[split.origin], np.searchsorted(numbers[split.origin], _numbers(split)), split.labels)
        for split in splits
    ]


def shifted(pixels: torch.Tensor, rng: np.random.Generator, crop: int, flip: bool) -> torch.Tensor:
    """(n, channels, height, width) images at random: moved by up to ``crop`` pixels, mirrored. 0 where uncovered.

    As padding by ``crop`` and cropping at a random place, then mirroring with probability 1/2. One draw an image.
    """
    count, _, height, width = pixels.shape
    down, right = rng.integers(0, 2 * crop + 1, (2, count))
    mirrored = rng.random(count) < 0.5
    padded = torch.nn.functional.pad(pixels, (crop,) * 4) if crop else pixels
    found = torch.stack([padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(zip(down, right))])
    return torch.where(torch.from_numpy(mirrored & flip)[:, None, None, None], found.flip(-1), found)


def _encoded(value: Any, place: str) -> Encoded:
    if isinstance(value, Mapping) and {"bytes", "path"} >= value.keys():
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str | Path) and value:
        path = Path(value)
        try:
            if path.is_file() and os.access(path, os.R_OK):
                return path
        except (OSError, ValueError):  # too long; a NUL character
            pass
        what = "there is no such file, or none that can be read"
        raise UserError(f"data.image: got {reprlib.repr(str(value))} in {place}, but {what}")
    array = value
    if hasattr(value, "convert") and hasattr(value, "mode"):  # an image of Pillow
        if value.mode not in MODES:
            raise UserError(f"data.image: got pixels {value.mode!r} in {place}, but allowed are {', '.join(MODES)}")
        array = np.asarray(value if value.mode in ("L", "RGB") else value.convert("RGB"))
    elif isinstance(value, torch.Tensor):
        array = value.numpy()
    if not isinstance(array, np.ndarray):
        what = "an image is the bytes or the path of a file, an image of Pillow, or an array"
        raise UserError(f"data.image: got {reprlib.repr(value)} in {place}, but {what}")
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not fits or not array.size:
        what = "it has bytes (uint8), (height, width) or (height, width, 1, 3 or 4)"
        raise UserError(f"data.image: got an array of {array.dtype} {array.shape} in {place}, but {what}")
    return array


def _numbers(split: Split) -> list[int]:
    return list(range(len(split))) if split.numbers is None else split.numbers.tolist()


def _pixels(images: Sequence[tuple[Encoded, str]], target: ImageInput) -> np.ndarray:
    """(images, channels, height, width) uint8 of images with their places: from the cache, or decoded."""
    shape = (len(images), *target.shape)
    if math.prod(shape) >= CACHED:
        try:
            file = _cache_file(images, target)
            if (found := _mapped(file, shape)) is None:
                with atomic_path(file) as temporary, temporary.open("wb") as stream:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                    for chunk in _decoded_chunks(images, target):
                        stream.write(chunk.tobytes())
                found = _mapped(file, shape)
            if found is not None:
                return found
        except OSError:  # no room, or no right to write
            pass
    return np.concatenate([np.empty((0, *target.shape), np.uint8), *_decoded_chunks(images, target)])


def _mapped(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array in the file, mapped into memory; None where the file is missing or damaged."""
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    # Of NumPy's own class, which Ray sends without a copy in between.
    return found.view(np.ndarray) if found.shape == shape and found.dtype == np.uint8 else None


def _cache_file(images: Sequence[tuple[Encoded, str]], target: ImageInput) -> Path:
    digest = hashlib.sha256(target.key.encode())
    for item, _ in images:
        digest.update(hashlib.sha256(content(item)).digest())
    folder = Path(os.environ.get("RAYFED_CACHE") or Path.home() / ".cache" / "rayfed")
    return folder / "images" / f"{digest.hexdigest()}.npy"


def _decoded_chunks(images: Sequence[tuple[Encoded, str]], target: ImageInput) -> Iterator[np.ndarray]:
    for start in range(0, len(images), AT_ONCE):
        yield target.resized([_decode(item, place, target.mode) for item, place in images[start : start + AT_ONCE]])


def _decode(item: Encoded, place: str, mode: str) -> Image:
    """The image in the ``mode`` (RGB or L), upright. UserError where it cannot be decoded."""
    from PIL import Image, ImageOps

    try:
        if isinstance(item, np.ndarray):
            image = Image.fromarray(item[..., 0] if item.shape[2:] == (1,) else item)
        else:
            image = Image.open(io.BytesIO(item) if isinstance(item, bytes) else item, formats=FORMATS)
        if image.mode in MODES:
            return ImageOps.exif_transpose(image).convert(mode)
    except Exception as error:  # a decoder may raise any error; Pillow refuses images that would fill the memory
        raise UserError(f"data.image: {place} cannot be decoded: {first_line(error)}") from None
    raise UserError(f"data.image: got pixels {image.mode!r} in {place}, but allowed are {', '.join(MODES)}")
