"""Both ends of the wire, as server and client understand them alike: what a download fills, where an upload belongs.

Neither carries more than the other side cannot know: a download leaves out what the client holds, an upload what cannot
have changed or stays personal. Both sides work that out from the same order, so no index bits are spent on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed.errors import RunError
from rayfed.lora.adapter import Layout
from rayfed.methods.base import Sparse
from rayfed.wire import Payload


@dataclass(frozen=True)
class Uploadable:
    """The entries of an adapter (n,) that a client may send up: ``places`` (m,) int64, rising; None: all."""

    n: int
    places: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> Uploadable:
        """The entries where ``mask`` (n,), boolean, is true."""
        return cls(len(mask), None if bool(mask.all()) else mask.nonzero().squeeze(1))

    def placed(self, payload: Payload) -> Tensor | Sparse:
        """An upload of these entries, as a change of the whole adapter. RunError where it has another length."""
        candidates = self.n if self.places is None else len(self.places)
        if payload.n != candidates:
            raise RunError(f"an upload has {payload.n} entries where {candidates} may be sent")
        if self.places is None:
            return payload.values if payload.indices is None else Sparse(self.n, payload.indices, payload.values)
        places = self.places if payload.indices is None else self.places[payload.indices]
        return Sparse(self.n, places, payload.values)


def received(payload: Payload) -> Tensor | None:
    """Which entries arrived in a payload: boolean (n,), or None where all did."""
    if payload.indices is None:
        return None
    mask = torch.zeros(payload.n, dtype=torch.bool)
    mask[payload.indices] = True
    return mask


def assemble(layout: Layout, payload: Payload, held: Payload | None) -> tuple[Tensor, Tensor | None]:
    """What a client starts from (n,), and which entries it has a value for (n,), None: all.

    ``payload`` fills the entries that it does not hold, in their order; ``held`` has the others at their indices.
    """
    arrived = received(payload)
    if held is None:
        return payload.dense(), arrived
    start, has = held.dense(), torch.zeros(layout.size, dtype=torch.bool)
    has[slice(None) if held.indices is None else held.indices] = True
    travels = ~has
    start[travels] = payload.dense()
    has[travels] = True if arrived is None else arrived
    return start, has
