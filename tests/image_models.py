"""A tiny ViT and real images, without a download: scikit-learn's digits, 8 x 8 pixels in grey."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

WIDE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2,
}  # fmt: skip


def save_vit(folder: Path, channels: int = 1, size: int = 8, **changes: Any) -> Path:
    """The folder, with a ViT of random weights without a head, and its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(**{**WIDE, "image_size": size, "patch_size": size // 2, "num_channels": channels, **changes})
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    half = [0.5] * channels
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=half, image_std=half)
    processor.save_pretrained(folder)
    return folder


def digits(start: int, stop: int) -> list[dict[str, Any]]:
    """These rows of the digits: an array of 8 x 8 bytes, and the digit."""
    found = load_digits()
    pixels = (found.images[start:stop] * 15).astype(np.uint8)
    return [{"image": image, "label": int(label)} for image, label in zip(pixels, found.target[start:stop])]


def png(image: np.ndarray | Image.Image) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, "PNG")
    return file.getvalue()


def save_parquet(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """The rows as `datasets` stores an Image: a struct of bytes and path."""
    import pyarrow
    from pyarrow import parquet

    images = [{"bytes": png(row["image"]), "path": None} for row in rows]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    labels = [row["label"] for row in rows]
    parquet.write_table(pyarrow.table({"image": pyarrow.array(images, kind), "label": labels}), file)
    return file
