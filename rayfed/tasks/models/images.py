"""Models for images: loading, their image processor, and what a model must do for packs of clients.

The image processor has two halves. Its geometry (resize, crop) is applied once, when images are decoded
(`ImageInput.resized`). Its arithmetic (rescale, normalise) is applied to every batch, on the device
(`ImageInput.normaliser`), so that batches travel as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.config.task import Model
from rayfed.errors import UserError, allowed, first_line
from rayfed.lora.peft import is_conv1d
from rayfed.tasks.models.base import FrozenBase, from_pretrained, load_classifier, logits_of, model_path, quiet

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TRIED = 3  # images of a trial: a number that is no other size of a model


@dataclass(frozen=True)
class ImageInput:
    """What the model's image processor makes of an image. ``shape``: (channels, height, width) of the result."""

    processor: Any
    shape: tuple[int, int, int]

    @property
    def mode(self) -> str:
        """Pillow's name for pixels of that many channels."""
        return "RGB" if self.shape[0] == 3 else "L"

    @property
    def key(self) -> str:
        """Equal keys, equal results of `resized`."""
        import PIL
        import transformers

        settings = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        return f"{settings}|{self.mode}|{transformers.__version__}|{PIL.__version__}"

    def resized(self, images: Sequence[Image]) -> np.ndarray:
        """(images, channels, height, width) uint8: the processor's result without its arithmetic."""
        return _geometry(self.processor, images)

    def normaliser(self, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The processor's arithmetic in float32: (n, channels, height, width) uint8 -> the same shape in ``dtype``."""
        own = self.processor
        rescale = float(own.rescale_factor) if getattr(own, "do_rescale", True) else 1.0
        numbers = (own.image_mean, own.image_std) if getattr(own, "do_normalize", True) else (0.0, 1.0)
        mean, std = (torch.tensor(x, dtype=torch.float32, device=device).view(-1, 1, 1) for x in numbers)
        return lambda pixels: ((pixels.float() * rescale - mean) / std).to(dtype)

    def blank(self, count: int) -> Tensor:
        """(count, channels, height, width) float32: black images, as the model takes them."""
        return self.normaliser(torch.device("cpu"), torch.float32)(torch.zeros(count, *self.shape, dtype=torch.uint8))


def load_image_input(settings: Model) -> ImageInput:
    """The image processor of the model. UserError if it cannot be loaded, or gives something else than RGB or grey."""
    from transformers import AutoConfig, AutoImageProcessor

    need_pillow()
    folder = Path(model_path(settings))
    if folder.is_dir() and not any((folder / name).is_file() for name in PROCESSOR_FILES):
        what = f"this folder holds no image processor ({PROCESSOR_FILES[0]})"
        raise allowed("model.name", settings.name, what)
    # torchvision would resize to other values, and need not be there.
    processor = from_pretrained(AutoImageProcessor, settings, backend="pil")
    channels = getattr(from_pretrained(AutoConfig, settings), "num_channels", 3)
    return image_input(processor, channels, settings.name)


def image_input(processor: Any, channels: int, name: str) -> ImageInput:
    """What the processor makes of images for a model of that many channels. Errors with the model's ``name``."""
    from PIL import Image

    if channels not in (1, 3):
        what = f"it takes images of {channels} channels, and allowed are 3 (RGB) and 1 (grey)"
        raise allowed("model.name", name, what)
    image = Image.new("RGB" if channels == 3 else "L", (64, 48))
    try:
        found = _geometry(processor, [image])
        result = ImageInput(processor, found.shape[1:])
        result.blank(1)
    except Exception as error:  # any processor may be configured
        raise allowed("model.name", name, f"its image processor fails: {first_line(error)}") from None
    if found.dtype != np.uint8 or found.shape[:2] != (1, channels):
        what = f"its image processor gives {found.dtype} {found.shape}, and uint8 (1, {channels}, ...) is needed"
        raise allowed("model.name", name, what)
    return result


def load_image_base(settings: Model, classes: int, seed: int) -> FrozenBase:
    """Loads the base model: float32, frozen, in evaluation mode, on the CPU, with a head for ``classes`` classes.

    Errors as in `rayfed.tasks.models.base.load_base`.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    config = from_pretrained(AutoConfig, settings, num_labels=classes)
    # PEFT has no task for images, and its class for texts would pass ids on.
    return replace(load_classifier(AutoModelForImageClassification, config, settings, classes, seed), task_type=None)


@torch.no_grad()
def check_rows_stay_whole(base: FrozenBase, target: ImageInput, name: str) -> None:
    """UserError where the model fails, or where a linear layer of its encoder sees something else than one image a row.

    Stacked adapters find the images of a client by the first dimension.
    """
    wrong: list[str] = []

    def see(layer: str, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[0] != TRIED:
            wrong.append(f"{layer} sees {tuple(args[0].shape)} for {TRIED} images")

    hooks = [
        module.register_forward_pre_hook(lambda _, args, layer=layer: see(layer, args))
        for layer, module in base.model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and not layer.startswith(base.heads)
    ]
    try:
        logits_of(base.model(pixel_values=target.blank(TRIED)))
    except Exception as error:  # any model may be configured
        what = f"it does not take the images of its image processor, {target.shape}: {first_line(error)}"
        raise allowed("model.name", name, what) from None
    finally:
        for hook in hooks:
            hook.remove()
    if wrong:
        raise allowed("model.name", name, f"{wrong[0]}: images in windows mix clients")


def need_pillow() -> None:
    """UserError where Pillow, which decodes images, is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        what = "images need the package pillow, which is not installed; install rayfed with the extra `images`"
        raise UserError(f"data.task: {what}") from None


def _geometry(processor: Any, images: Sequence[Image]) -> np.ndarray:
    with quiet():
        found = processor(list(images), do_rescale=False, do_normalize=False, return_tensors="np")
    pixels: np.ndarray = found["pixel_values"]
    return pixels
