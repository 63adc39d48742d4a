"""Clients a second by pack size: K clients in one forward and backward pass, against the same K one after the other.

The models have random weights, and all rows have one length: a MiniLM (6 layers, 384 wide), a GPT-2 and a ViT-B (12
layers, 768 wide). A is `train_pack` with K clients; B is `train_pack` with one client, K times. Both load the
adapters, take the steps and read the results, as a run does.

Facts: clients and tokens a second, and the share of the speed of one large matrix product on this device, in the format
of the base. Training on a frozen base takes 4 operations for each token and weight of the base's linear layers: 2
forward, and 2 to send gradients back through the layer. Attention, adapters and head are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from rayfed.bench import Sizes
from rayfed.bench.timing import Row, paired, timed
from rayfed.clients.local_training import PackMember, TrainingContext, train_pack
from rayfed.config import validate
from rayfed.config.types import Names
from rayfed.device import prepare_gpu
from rayfed.errors import UserError
from rayfed.lora.adapter import fresh_adapter
from rayfed.lora.packed.stack import Stack, head_values
from rayfed.lora.peft import is_conv1d, layer_shape
from rayfed.tasks.models.base import FrozenBase, in_dtype
from rayfed.tasks.models.padded_attention import use_float32_attention
from rayfed.tasks.text_classification import TextClassification

CLASSES, RANK, STEPS = 10, 16, 3


@dataclass(frozen=True)
class Shape:
    """A model's config, its head, the modules that get adapters, the tokens of a row, the kind of inputs."""

    config: Any
    head: str
    targets: tuple[str, ...]
    tokens: int
    images: bool = False


MINILM = AutoConfig.for_model(
    "bert", num_labels=CLASSES, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)
GPT2 = AutoConfig.for_model("gpt2", num_labels=CLASSES, pad_token_id=0, use_cache=False)
VIT = AutoConfig.for_model("vit", num_labels=CLASSES)
SHAPES = {
    "minilm": Shape(MINILM, "classifier", ("query", "value"), 16),
    "gpt2": Shape(GPT2, "score", ("c_attn",), 64),
    "vit": Shape(VIT, "classifier", ("q_proj", "v_proj"), 197, images=True),
}


def measure(
    shapes: Names = ("minilm",), packs: Sizes = (1, 2, 4, 8), batch: PositiveInt = 16,
    device: Literal["cpu", "cuda"] = "cpu", dtype: Literal["float32", "bfloat16"] = "float32", pairs: PositiveInt = 3,
) -> list[Row]:  # fmt: skip
    """One row for each shape and pack size. ``batch``: rows of a client's step; ``dtype``: the frozen base's.

    On a GPU: shapes=[minilm,gpt2,vit] packs=[1,2,4,8,16,32] device=cuda dtype=bfloat16.
    """
    unknown = [shape for shape in shapes if shape not in SHAPES]
    if unknown:
        raise UserError(f"shapes: got {unknown[0]!r}, but there are {', '.join(SHAPES)}")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device: got 'cuda', but torch finds no GPU here; allowed is cpu")
        prepare_gpu(deterministic=True)  # as a run does
    place = torch.device(device)
    peak = _matmul_rate(place, getattr(torch, dtype))
    return [_row(shape, size, batch, place, dtype, peak, pairs) for shape in shapes for size in packs]


def _row(name: str, size: int, batch: int, device: torch.device, dtype: str, peak: float, pairs: int) -> Row:
    shape = SHAPES[name]
    together, alone = (_Bench(shape, batch, device, dtype) for _ in range(2))
    row = paired(
        f"{name}, {batch} rows of {shape.tokens} tokens",
        (f"a pack of {size}", lambda: together.train([range(size)])),
        ("one after the other", lambda: alone.train([[client] for client in range(size)])),
        pairs,
    )
    tokens = size * STEPS * batch * shape.tokens / row.seconds_a
    share = 4 * together.weights * tokens / peak
    row.facts.update({"clients/s": size / row.seconds_a, "tokens/s": tokens, f"share of the {dtype} rate": share})
    return row


class _Bench:
    """One model and the data of all its clients."""

    def __init__(self, shape: Shape, batch: int, device: torch.device, dtype: str) -> None:
        torch.manual_seed(0)
        kind = AutoModelForImageClassification if shape.images else AutoModelForSequenceClassification
        model = in_dtype(FrozenBase(kind.from_config(shape.config).eval(), (shape.head,)), dtype).model.to(device)
        if device.type == "cpu" and dtype != "float32":
            use_float32_attention(model)  # as a run does
        linear = {
            name: layer_shape(layer)
            for name, layer in model.named_modules()
            if (isinstance(layer, nn.Linear) or is_conv1d(layer)) and not name.startswith(shape.head)
        }
        self.weights = sum(out * inner for out, inner in linear.values())
        shapes = {name: found for name, found in linear.items() if name.endswith(shape.targets)}
        adapter = fresh_adapter(shapes, head_values(model, [shape.head]), RANK, 1.0, seed=0)
        self.layout, self.vector = adapter.layout, adapter.flatten()
        self.rows, self.device = _Rows(shape, batch, getattr(torch, dtype)), device
        settings = validate({"client": {"batch_size": batch, "steps": STEPS}})
        self.context = TrainingContext(
            Stack(model, shapes, [shape.head], compute=getattr(torch, dtype)),
            lambda inputs: model(**inputs).logits,
            TextClassification(settings.data, settings.partition, settings.model, seed=0),
            self.rows,
            padded=True,
            settings=settings.client,
            seed=0,
            device=device,
        )

    def train(self, packs: Sequence[Sequence[int]]) -> None:
        everything, own = torch.ones(self.layout.size, dtype=torch.bool), np.arange(len(self.rows))
        for pack in packs:
            members = [PackMember(client, self.layout, self.vector, everything, own) for client in pack]
            train_pack(self.context, members, lr=1e-3, t=0)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class _Rows:
    """Random rows of one length; the same for every client."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype) -> None:
        g, count = torch.Generator().manual_seed(1), STEPS * batch
        self.lengths = np.full(count, shape.tokens)
        if shape.images:
            self.tensors = {"pixel_values": torch.randn(count, 3, 224, 224, generator=g).to(dtype)}
        else:
            ids = torch.randint(5, 1000, (count, shape.tokens), generator=g)
            self.tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.tensors["labels"] = torch.randint(CLASSES, (count,), generator=g)
        self.labels = self.tensors["labels"].numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray, padded: bool) -> dict[str, Tensor]:
        return {name: tensor[torch.from_numpy(rows)] for name, tensor in self.tensors.items()}


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large product, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    # To read a number waits for the device.
    return 2 * size**3 / min(timed(lambda: float((a @ a)[0, 0]))[0].wall for _ in range(10))
