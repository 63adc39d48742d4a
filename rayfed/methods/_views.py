"""Views: what a client knows of the global change, as the sum of what it was sent.

Of a large layer the view is the stack of the pairs that were sent, while that has fewer entries than the matrix. Then,
and of layers up to 256 (`SMALL`), it is a matrix. Clients are stored with tensors of these names: ``W`` for a matrix
of layer W; ``A.W`` and ``B.W`` for a pair, of scale 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rayfed.lora.adapter import LowRank
from rayfed.lora.algebra import add, stack
from rayfed.methods._means import SMALL
from rayfed.methods._messages import matrix
from rayfed.methods._state import Change


def as_tensors(view: Mapping[str, Change]) -> dict[str, Tensor]:
    """The view as tensors by their stored names."""
    tensors: dict[str, Tensor] = {}
    for name, change in view.items():
        if isinstance(change, LowRank):
            tensors |= {f"A.{name}": change.A, f"B.{name}": change.B}
        else:
            tensors[name] = change
    return tensors


def as_view(tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """The view by layer that gave these `as_tensors`."""
    read, view = dict(tensors.items()), {}
    for name in [name[2:] for name in read if name.startswith("A.") and f"B.{name[2:]}" in read]:
        view[name] = LowRank(read.pop(f"B.{name}"), read.pop(f"A.{name}"), 1.0)
    return {**view, **read}


def extended(view: Mapping[str, Change], sent: Mapping[str, LowRank]) -> dict[str, Change]:
    """The view after a client was sent these pairs, too."""
    return {**view, **{name: _sum(view.get(name), pair) for name, pair in sent.items()}}


def lacking(W: Tensor, V: Change | None) -> Tensor:
    """``W - V`` (out, in), what a view V lacks of W; None: the view is 0."""
    if V is None:
        return W
    return add(W, V, -1.0) if isinstance(V, LowRank) else W - V


def _sum(below: Change | None, pair: LowRank) -> Change:
    """The change ``below`` plus the pair: a pair while that is smaller, or a matrix. None: there is nothing below."""
    out, inner = pair.B.shape[0], pair.A.shape[1]
    if min(out, inner) > SMALL and not isinstance(below, Tensor):
        pairs = [pair] if below is None else [below, pair]
        whole = stack(pairs, [1.0] * len(pairs))
        moved = whole.B.any(0)  # the other rows of A are fresh, and multiplied by zeros
        if int(moved.sum()) * (out + inner) < out * inner:
            return LowRank(whole.B[:, moved], whole.A[moved], 1.0)
    return pair.dense() if below is None else add(matrix(below), pair)
