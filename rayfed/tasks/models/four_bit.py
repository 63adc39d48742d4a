"""A base in 4 bits: NF4 of the package bitsandbytes, as QLoRA has it (arXiv 2305.14314).

The linear layers of the frozen base hold their weights in 4 bits, with one scale for every 64 of them. For a product
the weights are widened to `model.dtype`. Embeddings, norms, the output layer and the head stay in `model.dtype`, as
transformers leaves them. Adapters train as over any other base.
"""

from __future__ import annotations

from torch import nn

from rayfed.errors import UserError
from rayfed.lora.peft import output_layer
from rayfed.tasks.models.base import FrozenBase


def linear_layers(base: FrozenBase) -> dict[str, nn.Linear]:
    """The layers that get 4 bits, by name: every nn.Linear but the head's and the output layer. UserError if none."""
    output = output_layer(base.model)
    found = {
        name: module
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not output
        and not any(name == head or name.startswith(f"{head}.") for head in base.heads)
    }
    if not found:
        raise UserError("model.load_in_4bit: got true, but this base has no nn.Linear below its head; allowed is false")
    return found


def to_4_bits(base: FrozenBase) -> None:
    """Replaces the linear layers (in place). Weights are rounded when the model moves to its device.

    UserError if bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        raise UserError(
            "model.load_in_4bit: got true, but the package bitsandbytes is not installed; install rayfed with the "
            "extra `bitsandbytes`"
        ) from None
    for name, layer in linear_layers(base).items():
        coarse = Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        coarse.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        coarse.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(base.model.get_submodule(parent), last, coarse)
    base.model.eval().requires_grad_(False)
