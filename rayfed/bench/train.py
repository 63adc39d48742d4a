"""Clients a second by pack size: K clients in one forward and backward pass against the same K one after the other.

Three models with random weights, on rows of one length: a MiniLM (6 layers, 384 wide), a GPT-2 and a ViT-B (12 layers,
768 wide). A is `train_pack` with K clients, B is `train_pack` K times with one; both load the adapters, take the steps
and read the results, as a run does. Beside the ratio: clients and tokens a second, and the share of the rate that one
large matrix product reaches on this device. Training with a frozen base takes 4 operations for each weight of its
linear layers and token (2 forward, 2 to send gradients back through it); attention, adapters and head are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.bench.timing import Row, paired
from rayfed.clients.local_training import PackMember, train_pack
from rayfed.config import validate
from rayfed.engine.setup import prepare_gpu
from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, fresh_adapter
from rayfed.lora.packed.stack import Stack, head_values
from rayfed.lora.peft import layer_shape
from rayfed.tasks.models.base import FrozenBase, in_dtype

CLASSES, RANK, STEPS = 10, 16, 3


@dataclass(frozen=True)
class Shape:
    """A model with its head, the modules that get adapters, the tokens of a row, and a row's inputs."""

    build: Callable[[], nn.Module]
    head: str
    targets: tuple[str, ...]
    tokens: int
    images: bool = False


def measure(
    shapes: Sequence[str] = ("minilm",), packs: Sequence[int] = (1, 2, 4, 8), batch: int = 16, device: str = "cpu",
    dtype: str = "float32", pairs: int = 3,
) -> list[Row]:  # fmt: skip
    """One row for each shape and pack size. ``batch``: rows of a client's step; ``dtype``: the frozen base's.

    On a GPU: shapes=[minilm,gpt2,vit] packs=[1,2,4,8,16,32] device=cuda dtype=bfloat16.
    """
    unknown = [shape for shape in shapes if shape not in SHAPES]
    if unknown:
        raise UserError(f"shapes: got {unknown[0]!r}, but there are {', '.join(SHAPES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: got 'cuda', but torch finds no GPU here; allowed is cpu")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype: got {dtype!r}, but allowed are float32 and bfloat16")
    if device == "cuda":
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
    row.facts.update(
        {
            "clients/s": size / row.seconds_a,
            "tokens/s": tokens,
            "share of the matmul rate": 4 * together.weights * tokens / peak,
        }
    )
    return row


class _Bench:
    """One model and the data of all its clients."""

    def __init__(self, shape: Shape, batch: int, device: torch.device, dtype: str) -> None:
        torch.manual_seed(0)
        base = FrozenBase(shape.build().eval(), (shape.head,))
        self.model = in_dtype(base, dtype).to(device)
        linear = {name: found for name, module in self.model.named_modules() if (found := _linear(module))}
        self.weights = sum(out * inner for name, (out, inner) in linear.items() if not name.startswith(shape.head))
        shapes = {name: found for name, found in linear.items() if name.endswith(shape.targets)}
        head = head_values(self.model, [shape.head])
        self.adapter: Adapter = fresh_adapter(shapes, head, RANK, 1.0, seed=0)
        self.stack = Stack(self.model, shapes, [shape.head])
        self.rows = _Rows(shape, batch, getattr(torch, dtype))
        self.device, self.batch = device, batch
        self.settings = validate({"client": {"batch_size": batch, "steps": STEPS}}).client

    def train(self, packs: Sequence[Sequence[int]]) -> None:
        layout, vector = self.adapter.layout, self.adapter.flatten()
        everything = torch.ones(layout.size, dtype=torch.bool)
        own = np.arange(STEPS * self.batch)
        for pack in packs:
            members = [PackMember(client, layout, vector, everything, own) for client in pack]
            train_pack(
                self.stack, lambda inputs: self.model(**inputs).logits, self.rows, 0, members, self.settings, lr=1e-3,
                t=0, seed=0, device=self.device,
            )  # fmt: skip
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class _Rows:
    """Random rows of one length; the same for every client."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(1)
        self.count = STEPS * batch
        self.lengths = np.full(self.count, shape.tokens)
        if shape.images:
            self.inputs = {"pixel_values": torch.randn(self.count, 3, 224, 224, generator=g).to(dtype)}
        else:
            ids = torch.randint(5, 1000, (self.count, shape.tokens), generator=g)
            self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.labels = torch.randint(CLASSES, (self.count,), generator=g)

    def batch(self, rows: np.ndarray, pad_id: int) -> dict[str, Tensor]:
        chosen = torch.from_numpy(np.asarray(rows))
        return {**{name: tensor[chosen] for name, tensor in self.inputs.items()}, "labels": self.labels[chosen]}


def _linear(module: nn.Module) -> tuple[int, int] | None:
    try:
        return layer_shape(module)
    except TypeError:
        return None


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large product, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _minilm() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    wide: dict[str, Any] = {
        "num_labels": CLASSES,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    return BertForSequenceClassification(BertConfig(**wide))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    settings: dict[str, Any] = {"num_labels": CLASSES, "pad_token_id": 0, "use_cache": False}
    return GPT2ForSequenceClassification(GPT2Config(**settings))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    settings: dict[str, Any] = {"num_labels": CLASSES}
    return ViTForImageClassification(ViTConfig(**settings))


SHAPES: dict[str, Shape] = {
    "minilm": Shape(_minilm, "classifier", ("query", "value"), 16),
    "gpt2": Shape(_gpt2, "score", ("c_attn",), 64),
    "vit": Shape(_vit, "classifier", ("q_proj", "v_proj"), 197, images=True),
}
