"""Three kinds of base model, each loaded once and handed out as fresh copies, and real PEFT models to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CLASSES = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def assert_close_float32() -> Callable[[Any, Any], None]:
    """assert_close_float32(found, expected): equal up to the rounding of float32, for one tensor or for lists of them.

    Two correct float32 computations differ by rounding. In a sum of n terms the roundings add up like a random walk, to
    about sqrt(n) * eps of the largest values (Higham 2002, section 4.2). n is at most 128, the widest layer here, and a
    gradient passes through about 16 such sums one after the other (8 products forward and 8 backward in each of the 2
    layers, some of them in parallel). Their roundings add up like a random walk, too: sqrt(128 * 16) * eps = 5e-6,
    relative to the largest value of all tensors given, because small gradients are differences of large terms.
    """
    import torch

    def check(found: Any, expected: Any) -> None:
        found, expected = (list(ts) if isinstance(ts, list) else [ts] for ts in (found, expected))
        size = max(float(tensor.detach().abs().max()) for tensor in expected)
        tolerance = (128 * 16) ** 0.5 * torch.finfo(torch.float32).eps * size
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)

    return check


@pytest.fixture(scope="session")
def base(tiny_bert: Path, tiny_gpt2: Path) -> Callable[[str], Any]:
    """base("bert" | "mean" | "gpt2") -> a fresh copy of a frozen `Base`."""
    from rayfed.config.task import Model
    from rayfed.tasks.models.base import load_base

    loaded = {
        "bert": load_base(Model(name=str(tiny_bert), pooling="stock"), CLASSES, seed=1),
        "mean": load_base(Model(name=str(tiny_bert), pooling="mean"), CLASSES, seed=1),
        "gpt2": load_base(Model(name=str(tiny_gpt2), pooling="stock"), CLASSES, seed=1),
    }
    return lambda kind: copy.deepcopy(loaded[kind])


@pytest.fixture(scope="session")
def inputs() -> dict[str, Any]:
    """Six texts of 3 to 9 tokens, padded on the right, without special tokens among the words."""
    import torch

    g = torch.Generator().manual_seed(5)
    lengths = torch.tensor([9, 3, 5, 4, 7, 6])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(4, 40, (6, 9), generator=g) * mask
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., Any]:
    """random_adapter(shapes, head, rank, scale, seed) -> an adapter with B, A and head all away from zero."""
    import torch

    from rayfed.lora.adapter import Adapter, LowRank

    def make(shapes: Any, head: Any, rank: int, scale: float, seed: int) -> Adapter:
        g = torch.Generator().manual_seed(seed)
        layers = {
            name: LowRank(0.1 * torch.randn(out, rank, generator=g), 0.2 * torch.randn(rank, inner, generator=g), scale)
            for name, (out, inner) in shapes.items()
        }
        return Adapter(layers, {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in head.items()})

    return make


@pytest.fixture(scope="session")
def peft_model() -> Callable[..., Any]:
    """peft_model(model, config, adapter) -> the model wrapped by real PEFT, holding the adapter's factors and head."""
    import torch
    from peft import get_peft_model

    def make(model: Any, config: Any, adapter: Any) -> Any:
        wrapped = get_peft_model(model, copy.deepcopy(config)).eval()
        with torch.no_grad():
            for name, pair in adapter.layers.items():
                layer = wrapped.base_model.model.get_submodule(name)
                layer.lora_A["default"].weight.copy_(pair.A)
                layer.lora_B["default"].weight.copy_(pair.B)
            for name, value in adapter.head.items():
                module, _, kind = name.rpartition(".")
                wrapped.base_model.model.get_submodule(module).modules_to_save["default"].get_parameter(kind).copy_(
                    value
                )
        return wrapped

    return make
