"""The part of the head that trains where the loss compares only some classes (`partition.sequence`).

The last layer of the head has one row a class. Rows of classes that the loss does not compare get no gradient. They do
not train either: momentum and weight decay of clients leave them alone, and no upload has room for them. So they keep
their bits, and a client's message is as much smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from rayfed.lora.adapter import Entry, Layout
from rayfed.methods import Trainable
from rayfed.tasks.models.base import PEFT_HEADS


def for_classes(
    trainable: Trainable, layout: Layout, head: Mapping[str, Tensor], classes: tuple[int, ...] | None, total: int
) -> Trainable:
    """``trainable`` without the head rows of all but these ``classes`` of ``total``; unchanged where they are None.

    ``layout`` is that of the client's adapter, ``head`` has the trained head's parameters by name.
    """
    if classes is None or not head:
        return trainable
    entries = _entries(layout.entries, output_layer(head, total), classes)
    return replace(trainable, entries=entries if trainable.entries is None else trainable.entries & entries)


def output_layer(head: Mapping[str, Tensor], classes: int) -> str:
    """The name of the head's layer that gives the logits, ending in a dot: it has one row for each of the classes.

    Of several such layers, as in a head as wide as there are classes, the last one of `classifier` or `score`.
    """
    found = [name for name, tensor in head.items() if tensor.ndim == 2 and len(tensor) == classes]
    found = [name for name in found if name.split(".")[0] in PEFT_HEADS] or found
    return found[-1].removesuffix("weight")


@lru_cache(maxsize=64)
def _entries(entries: tuple[Entry, ...], layer: str, classes: tuple[int, ...]) -> Tensor:
    """Boolean (n,). One tensor for equal arguments: supports are compared by identity, see `Trainable`."""
    chosen = torch.ones(entries[-1].start + entries[-1].numel, dtype=torch.bool)
    for entry in entries:
        if entry.part == "head" and entry.name.startswith(layer):
            rows = torch.zeros(entry.shape, dtype=torch.bool)
            rows[list(classes)] = True
            chosen[entry.start : entry.start + entry.numel] = rows.flatten()
    return chosen
