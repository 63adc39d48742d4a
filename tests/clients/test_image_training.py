"""Packs of image classifiers against a plain loop over a stock PEFT model, and against members trained alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_models import digits, save_vit
from peft import LoraConfig, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification

from rayfed.clients.local_training import PackMember, TrainedClient, TrainingContext, batches, train_pack
from rayfed.config.task import Data, Model
from rayfed.config.training import Client
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.stack import Stack, head_values
from rayfed.lora.peft import match_targets
from rayfed.seeding import derive_seed
from rayfed.tasks._images import ImageTask
from rayfed.tasks.data.images import Images
from rayfed.tasks.image_classification import ImageClassification
from rayfed.tasks.image_multi_label import ImageMultiLabel
from rayfed.tasks.models.base import FrozenBase
from rayfed.tasks.models.images import load_image_base
from rayfed.tasks.models.unpadded import Padded

CLASSES = 10
ROWS = {4: [0, 2, 5, 7, 8], 9: [1, 3], 2: [4, 6, 9]}  # of three clients, whose batches differ in size
SETTINGS = Client(optimizer="adamw", weight_decay=0.1, batch_size=3, epochs=2, clip_norm=1.0)
LR, SEED, ROUND = 0.01, 11, 5
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "fc1"], modules_to_save=["classifier"])


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


def images(multi_label: bool) -> Images:
    rows = digits(0, 10)
    labels = np.array([row["label"] for row in rows])
    sets = (labels[:, None] % np.arange(2, 12)) == 0  # the numbers that divide the digit
    return Images(np.stack([row["image"] for row in rows])[:, None], np.arange(10), sets if multi_label else labels)


def base(vit: Path) -> FrozenBase:
    return load_image_base(Model(name=str(vit)), CLASSES, SEED)


def task(vit: Path, multi_label: bool, **data: Any) -> ImageTask:
    kind = ImageMultiLabel if multi_label else ImageClassification
    return kind(data=Data(task=kind.name, **data), model_settings=Model(name=str(vit)))


def member(vit: Path, client: int) -> PackMember:
    """From a random B: at B = 0 the first change of A is nothing."""
    own = base(vit)
    g = torch.Generator().manual_seed(client)
    layers = {
        name: LowRank(0.1 * torch.randn(out, 2, generator=g), 0.2 * torch.randn(2, inner, generator=g), 2.0)
        for name, (out, inner) in match_targets(own.model, LORA, own.heads).items()
    }
    adapter = Adapter(layers, head_values(own.model, own.head))
    everything = torch.ones(adapter.layout.size, dtype=torch.bool)
    return PackMember(client, adapter.layout, adapter.flatten(), everything, np.array(ROWS[client]))


def train(vit: Path, task: ImageTask, rows: Images, members: list[PackMember]) -> list[TrainedClient]:
    own = base(vit)
    stack = Stack(own.model, match_targets(own.model, LORA, own.heads), own.head)
    outputs = task.make_forward(own.model, Padded(""))
    context = TrainingContext(
        stack, lambda inputs: outputs(inputs, stack.batch.segments), task, rows, True, SETTINGS, SEED,
        torch.device("cpu"),
    )  # fmt: skip
    return train_pack(context, members, lr=LR, t=ROUND)


def plain_loop(vit: Path, task: ImageTask, rows: Images, member: PackMember) -> tuple[torch.Tensor, float]:
    """One client's round with stock transformers and PEFT: their image processor, and transformers' own loss."""
    kind = "multi_label_classification" if rows.labels.ndim == 2 else "single_label_classification"
    stock = AutoModelForImageClassification.from_pretrained(vit, num_labels=CLASSES, problem_type=kind)
    model: Any = get_peft_model(stock, LORA).eval()
    parameters = []
    for entry in member.layout.entries:
        if entry.part in ("A", "B"):
            parameter = getattr(stock.get_submodule(entry.name), f"lora_{entry.part}")["default"].weight
        else:
            parameter = stock.classifier.modules_to_save["default"].get_parameter(entry.name.rpartition(".")[2])
        parameter.data.copy_(member.start[entry.start : entry.start + entry.numel].view(entry.shape))
        parameters.append(parameter)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(map(id, parameters))
    processor = AutoImageProcessor.from_pretrained(vit, backend="pil")
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=SETTINGS.weight_decay)
    losses = []
    for step, chosen in enumerate(batches(member.rows, SETTINGS, SEED, ROUND, member.client)):
        key = derive_seed(SEED, "augment", ROUND, member.client, step), len(chosen)
        pixels = task.augment(rows.batch(chosen, True), [key])["pixel_values"]
        inputs = processor(list(pixels.numpy()), return_tensors="pt")
        labels = torch.from_numpy(rows.labels[chosen])
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels.float() if labels.ndim == 2 else labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return torch.cat([p.detach().reshape(-1) for p in parameters]), float(np.mean(losses))


@pytest.mark.parametrize(("multi_label", "augmented"), [(False, False), (True, True)])
def test_a_pack_gives_each_client_what_a_stock_peft_loop_gives_it(
    vit: Path, multi_label: bool, augmented: bool
) -> None:
    own, rows = task(vit, multi_label, **({"crop": 2, "flip": True} if augmented else {})), images(multi_label)
    members = [member(vit, client) for client in ROWS]
    for start, found in zip(members, train(vit, own, rows, members), strict=True):
        vector, loss = plain_loop(vit, own, rows, start)
        (alone,) = train(vit, own, rows, [start])
        moved = (vector - start.start).abs()
        assert (moved > 1e-3).float().mean() > 0.9  # and the tolerance is far below that
        for result in (found, alone):
            torch.testing.assert_close(result.vector, vector, rtol=0, atol=1e-4)
            assert result.loss == pytest.approx(loss, rel=1e-5)
