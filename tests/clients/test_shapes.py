"""K clients in a pack train as each would alone, with everything on at once, for models of four shapes.

Mixed ranks, ragged steps, clipping, dropout, momentum or AdamW, from a random B. Dropout keyed by place in the pack, or
a client that still moves after its last step, is seen here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from small_runs import CLASSIFICATION

from rayfed.clients.local_training import PackMember, TrainingContext, train_pack
from rayfed.config.training import Client
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.stack import Stack, head_values
from rayfed.lora.peft import layer_shape
from rayfed.tasks.models.base import FrozenBase, in_dtype
from rayfed.tasks.models.checkpointing import enable_gradient_checkpointing

CLASSES = 3
COMMON = {"num_labels": CLASSES, "initializer_range": 0.2}
TEXT = {**COMMON, "vocab_size": 40, "pad_token_id": 0}
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@dataclass
class Rows:
    """Rows of images, all alike, or of texts of 3 to 8 tokens, padded behind."""

    images: bool

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.labels = torch.randint(CLASSES, (40,), generator=g)
        self.lengths = np.full(40, 5) if self.images else np.arange(40) % 6 + 3
        self.pixels = torch.randn(40, 3, 32, 32, generator=g, dtype=torch.float64)
        self.ids = torch.randint(1, 40, (40, 8), generator=g)

    def batch(self, rows: np.ndarray, padded: bool) -> dict[str, torch.Tensor]:
        chosen = torch.as_tensor(rows)
        if self.images:
            inputs = {"pixel_values": self.pixels[chosen].to(torch.get_default_dtype())}
        else:
            lengths = torch.as_tensor(self.lengths[rows])
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            inputs = {"input_ids": self.ids[chosen, : mask.shape[1]] * mask, "attention_mask": mask}
        return {**inputs, "labels": self.labels[chosen]}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, **WIDE)), "classifier"


def gpt2():
    config = transformers.GPT2Config(**TEXT, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2ForSequenceClassification(config), "score"


def llama():
    config = transformers.LlamaConfig(**TEXT, **WIDE, num_key_value_heads=1)
    return transformers.LlamaForSequenceClassification(config), "score"


def vit():
    config = transformers.ViTConfig(**COMMON, **WIDE, image_size=32, patch_size=16)
    return transformers.ViTForImageClassification(config), "classifier"


SHAPES = {  # and the layers that get adapters
    bert: ("query", "value", "intermediate.dense"),
    gpt2: ("c_attn", "c_fc"),
    llama: ("q_proj", "v_proj", "up_proj"),
    vit: ("q_proj", "v_proj"),
}
SETTINGS = {
    "sgd": Client(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.02, clip_norm=0.5, batch_size=4),
    "adamw": Client(optimizer="adamw", lr=0.01, weight_decay=0.1, clip_norm=0.5, batch_size=4),
}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def tolerance(request):
    """Everything in that format; how much a tensor's training may differ, relative."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield 1e-3 if request.param == torch.float32 else 1e-5
    torch.set_default_dtype(before)


def model_of(build):
    torch.manual_seed(0)
    model, head = build()
    model = model.eval().to(torch.get_default_dtype())
    shapes = {name: layer_shape(module) for name, module in model.named_modules() if name.endswith(SHAPES[build])}
    return model, head, shapes


def train(build, members, settings, dtype="float32", again=False):
    model, head, shapes = model_of(build)
    in_dtype(FrozenBase(model, (head,)), dtype)
    stack = Stack(model, shapes, [head], 0.2, torch.bfloat16 if dtype == "bfloat16" else None)
    if again:
        enable_gradient_checkpointing(model)
    context = TrainingContext(
        stack, lambda inputs: model(**inputs).logits, CLASSIFICATION, Rows(build is vit), True, settings, 1,
        torch.device("cpu"),
    )  # fmt: skip
    return [result.vector for result in train_pack(context, members, lr=settings.lr, t=3)]


def member(build, client, rank, rows):
    model, head, shapes = model_of(build)
    g = torch.Generator().manual_seed(client)
    layers = {
        name: LowRank(0.2 * torch.randn(out, rank, generator=g), 0.2 * torch.randn(rank, inner, generator=g), 4 / rank)
        for name, (out, inner) in shapes.items()
    }
    adapter = Adapter(layers, head_values(model, [head]))
    everything = torch.ones(adapter.layout.size, dtype=torch.bool)
    return PackMember(client, adapter.layout, adapter.flatten(), everything, np.asarray(rows))


def pack_of(build):
    # 2, 4 and 3 steps; the last batches are ragged
    return [member(build, 5, 4, range(7)), member(build, 6, 1, range(7, 22)), member(build, 8, 2, range(22, 33))]


@pytest.mark.parametrize("optimizer", SETTINGS)
@pytest.mark.parametrize("build", SHAPES, ids=lambda build: build.__name__)
def test_a_pack_is_its_members_alone(build, optimizer, tolerance):
    settings = SETTINGS[optimizer]
    members = pack_of(build)
    together = train(build, members, settings)
    for mine, own in zip(together, members, strict=True):
        (alone,) = train(build, [own], settings)
        for entry in own.layout.entries:
            place = slice(entry.start, entry.start + entry.numel)
            moved = (alone[place] - own.start[place]).norm()
            assert moved > 1e-4, entry
            assert (mine[place] - alone[place]).norm() <= tolerance * moved, entry


@pytest.mark.parametrize("build", SHAPES, ids=lambda build: build.__name__)
def test_layers_computed_anew_change_no_bit(build):
    members, settings = pack_of(build), SETTINGS["adamw"]
    kept, anew = train(build, members, settings), train(build, members, settings, again=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, anew, strict=True))


@pytest.mark.parametrize("build", SHAPES, ids=lambda build: build.__name__)
def test_a_base_in_bfloat16_trains_nearly_alike(build):
    members, settings = pack_of(build), SETTINGS["sgd"]
    fine, coarse = (train(build, members, settings, dtype) for dtype in ("float32", "bfloat16"))
    for own, a, b in zip(members, fine, coarse, strict=True):
        distance = (a - b).norm() / (a - own.start).norm()
        assert 1e-4 < distance < 0.1


@pytest.mark.parametrize("optimizer", SETTINGS)
@pytest.mark.parametrize("build", SHAPES, ids=lambda build: build.__name__)
def test_in_bfloat16_a_pack_changes_no_more_than_the_format_does(build, optimizer):
    """Its distance from members alone in bfloat16 is at most twice theirs from float32: roundings of equal size."""
    members, settings = pack_of(build), SETTINGS[optimizer]
    for own, mine in zip(members, train(build, members, settings, "bfloat16"), strict=True):
        (alone,), (fine,) = (train(build, [own], settings, dtype) for dtype in ("bfloat16", "float32"))
        assert (mine - alone).norm() / 2 < (alone - fine).norm() < 0.3 * (fine - own.start).norm()
