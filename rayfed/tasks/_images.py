"""What all tasks on images have in common: any transformers model for image classification.

Rows come from Parquet, from JSON lines or CSV with paths, from folders of images, or from the Hugging Face hub. Images
are decoded once, to the size that the model's image processor gives. All have one size, so no batch needs padding.

Training images may be moved and mirrored at random (`data.crop`, `data.flip`), drawn anew in every step. A draw is
keyed by the run's seed, the client, the round and the step, so an image is the same in any pack.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.config.task import Data
from rayfed.errors import UserError
from rayfed.tasks._texts import SourceTask
from rayfed.tasks.base import Forward
from rayfed.tasks.data.federation import Federation, only_training
from rayfed.tasks.data.images import decoded, read_images, shifted
from rayfed.tasks.data.table import Source, Table
from rayfed.tasks.models.base import FrozenBase, logits_of
from rayfed.tasks.models.cache import shared_base
from rayfed.tasks.models.images import (
    check_rows_stay_whole,
    load_image_base,
    load_image_input,
    need_pillow,
)
from rayfed.tasks.models.new import write_image_model
from rayfed.tasks.models.unpadded import Padded, Unpadded
from rayfed.tasks.models.usage import Usage, image_usage

if TYPE_CHECKING:
    from rayfed.config.execution import Engine
    from rayfed.config.method import Lora
    from rayfed.config.pretrain import Pretrain
    from rayfed.config.training import Eval, Server


@dataclass(frozen=True)
class ImageTask(SourceTask):
    """A task on images. Subclasses say what labels are, and give the loss and the metrics."""

    problem_type: ClassVar[str]
    """transformers' name for what the model's outputs are."""
    columns = ("image", "label", "client")

    _: KW_ONLY
    image: str | None = None
    """The column with the image; None: `data.image`."""

    def check(self, *, lora: Lora, server: Server, eval: Eval, engine: Engine) -> None:
        self._refuse(("model.pooling", self.model_settings.pooling, "stock", "a model has its own head"))
        if self.data.source == "stdlib":
            what = f"with data.task={self.name} rows are images; allowed are files, hub"
            raise UserError(f"data.source: got 'stdlib', but {what}")
        need_pillow()
        super().check(lora=lora, server=server, eval=eval, engine=engine)

    def load_data(self) -> Federation:
        from rayfed.tasks.data.dataset import load_data
        from rayfed.tasks.data.experiences import divide
        from rayfed.tasks.data.partition import client_names

        data = load_data(self.data, self.seed, self._source(self.data))
        strata, owners = self.strata(data.train.labels), data.owners
        parts, experiences = divide(strata, owners, len(data.classes), self.partition, self.seed)
        splits = (data.train, data.validation, data.test)
        images = decoded(splits, load_image_input(self.model_settings))
        names = client_names(owners["train"], self.partition)
        return Federation.of(images, data.classes, parts, names, experiences)

    def load_base(self, federation: Federation) -> FrozenBase:
        settings, classes, seed = self.model_settings, len(federation.classes), self.seed
        return shared_base(self._base_key(f"{self.name} {classes}"), lambda: load_image_base(settings, classes, seed))

    def write_new_base(self, settings: Pretrain, folder: Path) -> None:
        write_image_model(settings, folder, self.seed)

    def load_pretraining(self) -> tuple[Federation, str]:
        from rayfed.tasks.data.dataset import load_pretraining, split_digest

        split, classes = load_pretraining(self.data, self._source(self.data))
        (rows,) = decoded([split], load_image_input(self.model_settings))
        return only_training(rows, classes), split_digest(split)

    def pretrained(self, model: nn.Module) -> nn.Module:
        """The model without its head: a run has a new head."""
        encoder: nn.Module = model.base_model  # type: ignore[assignment]
        return encoder

    def batching(self, base: FrozenBase, padding: str) -> Unpadded | Padded:
        check_rows_stay_whole(base, load_image_input(self.model_settings), self.model_settings.name)
        return Padded("all images have one size")

    def sample(self) -> dict[str, Tensor]:
        return {"pixel_values": load_image_input(self.model_settings).blank(1)}

    def augment(self, batch: dict[str, Tensor], keys: Any) -> dict[str, Tensor]:
        crop, flip = self.data.crop, self.data.flip
        if not crop and not flip:
            return batch
        own = batch["pixel_values"].split([rows for _, rows in keys])
        rngs = (np.random.Generator(np.random.PCG64(seed)) for seed, _ in keys)
        return {**batch, "pixel_values": torch.cat([shifted(x, rng, crop, flip) for x, rng in zip(own, rngs)])}

    def make_forward(self, model: nn.Module, batching: Unpadded | Padded) -> Forward:
        weight = next(model.parameters())
        normalised = load_image_input(self.model_settings).normaliser(weight.device, weight.dtype)
        return lambda inputs, segments: logits_of(model(pixel_values=normalised(inputs["pixel_values"])))

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """The class (n,) by which a partition by label divides rows with these labels (n, ...)."""
        return labels

    def save_tokenizer(self, folder: Any) -> None:
        load_image_input(self.model_settings).processor.save_pretrained(folder)

    def usage(self) -> Usage | None:
        return image_usage(self.model_settings, self.problem_type)

    def _source(self, data: Data) -> Source | None:
        """The rows that are objects: images of Pillow as arrays, so that equal images have equal hashes."""
        found = super()._source(data)
        if found is None:
            return None
        tables = {
            split: Table(table.origin, {**table.columns, data.image: read_images(table, data.image)})
            for split, table in found.tables.items()
        }
        return Source(tables, found.class_names)
