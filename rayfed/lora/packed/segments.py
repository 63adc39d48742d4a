"""Whose rows pass through the model: every slot of a pack owns a run of them, and each stacked layer asks which.

Rows lie one below the other in the first dimension, padded to one length, or their tokens lie end to end without any
padding (`rayfed.tasks.models.unpadded`); which of the two, a tensor's shape tells. What layers need to know about either is found
once a batch and kept in a `Segments`.

Shape suffixes: K runs, each of a slot of its own; C entries of the longest run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rayfed.device import to_device
from rayfed.lora.packed.dropout import token_keys
from rayfed.lora.packed.ragged import RaggedIndex


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of the batch that belong to one slot.

    `key` makes its dropout (None: no dropout); `lengths` are its rows' tokens, needed where they lie end to end.
    """

    slot: int
    rows: int
    key: int | None = None
    lengths: Sequence[int] | None = None

    @cached_property
    def tokens(self) -> int:
        """Tokens of all rows; one each where they have no lengths."""
        return sum(self.lengths) if self.lengths is not None else self.rows


class Batch:
    """The segments of the batch now passing through the model; shared by all stacked layers of a model."""

    def __init__(self) -> None:
        self.segments: Sequence[Segment] = []
        self._segments: dict[bool, Segments] = {}

    @contextmanager
    def using(self, segments: Sequence[Segment]) -> Iterator[None]:
        self.segments, self._segments = segments, {}
        try:
            yield
        finally:
            self.segments, self._segments = [], {}

    def segments_of(self, x: Tensor) -> Segments:
        """How ``x`` is shared out: by rows (rows, ..., I), or by tokens (1, tokens, I) or (tokens, I), end to end.

        ValueError where rows are not what the segments announced.
        """
        rows = sum(s.rows for s in self.segments)
        flat = x.shape[0] != rows  # otherwise padded, or one vector a row
        if flat:
            tokens, found = sum(s.tokens for s in self.segments), x.shape[:-1].numel()
            if found != tokens or x.shape[0] not in (1, tokens):
                raise ValueError(
                    f"the batch has {x.shape[0]} rows, its segments {rows} of {tokens} tokens: "
                    "rows stay whole and in order"
                )
        if flat not in self._segments:
            self._segments[flat] = Segments(self.segments, flat, x.device)
        return self._segments[flat]


class Segments:
    """Runs of rows (``flat``: of tokens), each of a slot of its own, in the order of the batch.

    ``batched``: the runs are computed in one product for all, side by side in a grid. That pays where they are equally
    long, and on a device that is slow to start a product always; a CPU takes runs of different length one by one.
    """

    def __init__(self, segments: Sequence[Segment], flat: bool, device: torch.device) -> None:
        self.segments, self.flat, self.device = segments, flat, device
        self.slots = [s.slot for s in segments]
        self.sizes = [s.tokens if flat else s.rows for s in segments]
        self.count = sum(self.sizes)
        self.even = len(set(self.sizes)) == 1
        self.batched = device.type != "cpu" or (self.even and len(segments) > 1)
        self._keys: dict[tuple[int, ...], Tensor] = {}

    def each(self, x: Tensor) -> list[Tensor]:
        """The runs of x, as views: (rows, ..., I), or (tokens, I)."""
        return list((x.reshape(self.count, -1) if self.flat else x).split(self.sizes))

    def grid(self, x: Tensor) -> Tensor:
        """(count * m, I) -> (K, C * m, I): the runs side by side, zeros behind the shorter ones; a view where even."""
        K, width = len(self.slots), x.shape[-1]
        return (x if self.even else self._grid.pad(x.reshape(self.count, -1))).view(K, -1, width)

    def row(self, grid: Tensor) -> Tensor:
        """`grid` turned back: (K, C * m, I) -> (count * m, I)."""
        width = grid.shape[-1]
        if self.even:
            return grid.reshape(-1, width)
        return self._grid.unpad(grid.reshape(self._grid.lines * self._grid.longest, -1)).view(-1, width)

    def of(self, stacked: Tensor) -> Tensor:
        """The runs' slots of something stacked (slots, ...): (K, ...), a view where the slots follow each other."""
        first, last = self.slots[0], self.slots[-1]
        if self.slots == list(range(first, last + 1)):
            return stacked[first : last + 1]
        return stacked.index_select(0, self._index)

    def into(self, found: Tensor, slots: int) -> Tensor:
        """`of` turned back: (K, ...) -> (slots, ...), zeros in slots without a run."""
        if self.slots == list(range(slots)):
            return found
        return found.new_zeros(slots, *found.shape[1:]).index_copy_(0, self._index, found)

    def counts(self, like: Tensor) -> Tensor:
        """(K,): the rows of every run."""
        return self._sent(torch.tensor(self.sizes, dtype=like.dtype))

    def keys(self, shape: torch.Size) -> Tensor | None:
        """Keys for dropout of entries that lie like this, (*shape, 1) int32; None where nothing is dropped."""
        if any(s.key is None for s in self.segments):
            return None
        if shape not in self._keys:
            found = []
            for s in self.segments:
                assert s.key is not None
                alike = [shape[1:].numel()] * s.rows
                found.append(token_keys(s.key, s.lengths if self.flat and s.lengths is not None else alike))
            self._keys[shape] = self._sent(torch.from_numpy(np.concatenate(found))).view(*shape, 1)
        return self._keys[shape]

    @cached_property
    def _index(self) -> Tensor:
        return self._sent(torch.tensor(self.slots))

    @cached_property
    def _grid(self) -> RaggedIndex:
        return RaggedIndex(self.sizes, self.device)

    def _sent(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self.device)
