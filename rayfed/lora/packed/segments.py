"""Which rows of a batch belong to which client: each client of a pack has one segment of consecutive rows.

The rows are either padded to one length, (rows, tokens, I), or their tokens are concatenated without padding,
(1, tokens, I) or (tokens, I), see `rayfed.tasks.models.unpadded`. The shape of a tensor tells which. A stacked layer
asks the `Batch` for the `Segments` of its input. They are made once per batch and form.

Shape suffixes: K segments, each of its own slot; C entries (rows or tokens) of the longest segment; I features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from rayfed.device import to_device
from rayfed.lora.packed.dropout import token_keys
from rayfed.lora.packed.ragged import RaggedIndex

HALF = (torch.bfloat16, torch.float16)
ROUNDED = 64  # on a CPU in 16 bits, the longest segment's tokens are rounded up to a multiple of this


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of the batch that belong to one slot.

    ``dropout_key`` is the client's key for this step (None: no dropout). ``lengths`` are the tokens of each row, needed
    for batches without padding.
    """

    slot: int
    rows: int
    dropout_key: int | None = None
    lengths: Sequence[int] | None = None

    @cached_property
    def tokens(self) -> int:
        """Tokens of all rows; one per row if there are no lengths."""
        return sum(self.lengths) if self.lengths is not None else self.rows


class Batch:
    """The segments of the batch that is passing through the model. All stacked layers of a model share one."""

    def __init__(self, grouped: bool = False) -> None:
        """``grouped``: products in 16 bits may use `torch.nn.functional.grouped_mm`: all widths are multiples of 8."""
        self.grouped = grouped
        self.segments: Sequence[Segment] = []
        self._cache: dict[tuple[bool, bool], Segments] = {}

    @contextmanager
    def using(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Forward passes inside the `with` block take batches of these segments, in this order."""
        self.segments, self._cache = segments, {}
        try:
            yield
        finally:
            for own in self._cache.values():
                own.forget_input()  # its graph refers to these segments, and such a cycle is never collected
            self.segments, self._cache = [], {}

    def segments_of(self, x: Tensor, dtype: torch.dtype | None = None) -> Segments:
        """The segments of ``x``: by rows for (rows, ..., I), by tokens for (1, tokens, I) and (tokens, I).

        ``dtype`` is that of the products that will be computed; None: float32 or finer.

        Raises:
            ValueError: ``x`` has another number of rows and tokens than the segments.
        """
        rows = sum(s.rows for s in self.segments)
        by_token = x.shape[0] != rows  # else padded, or one vector per row
        if by_token:
            tokens, found = sum(s.tokens for s in self.segments), x.shape[:-1].numel()
            if found != tokens or x.shape[0] not in (1, tokens):
                raise ValueError(
                    f"the batch has {x.shape[0]} rows, its segments {rows} of {tokens} tokens: "
                    "rows stay whole and in order"
                )
        half = dtype in HALF
        if (by_token, half) not in self._cache:
            self._cache[by_token, half] = Segments(self.segments, by_token, x.device, half, self.grouped)
        return self._cache[by_token, half]


class Segments:
    """The segments of one batch, in rows or (``by_token``) in tokens, and how to split, pad and index by them.

    ``batched``: one batched product computes all segments, from `pad`. It pays where all segments have one size, and
    always on a GPU, where starting a kernel is slow. A CPU computes segments of different sizes one after the other. In
    16 bits (``half``), where it spends a fraction of a millisecond on each new shape, it pads them to a rounded size.
    ``grouped``: segments of different sizes are not padded; one grouped product computes them where they are.
    """

    def __init__(
        self, segments: Sequence[Segment], by_token: bool, device: torch.device, half: bool = False,
        grouped: bool = False,
    ) -> None:  # fmt: skip
        self.segments, self.by_token, self.device = segments, by_token, device
        self.slots = [s.slot for s in segments]
        self.sizes = [s.tokens if by_token else s.rows for s in segments]
        self.total = sum(self.sizes)
        self._multiple = ROUNDED if half and by_token and device.type == "cpu" else 1
        self.equal_sizes = len(set(self.sizes)) == 1 and self.sizes[0] % self._multiple == 0  # then no padding
        self.grouped = grouped and half and not self.equal_sizes
        self.batched = device.type != "cpu" or half or (self.equal_sizes and len(segments) > 1)
        self._padded: tuple[Tensor, int, Tensor] | None = None
        self._keys: dict[tuple[int, ...], Tensor] = {}
        self._ends: dict[int, Tensor] = {}
        self.projections: dict[int, tuple[Tensor, int, Sequence[Tensor]]] = {}  # by `SameInput`

    def split(self, x: Tensor) -> list[Tensor]:
        """The segments of x as views: (rows, ..., I) each, or (tokens, I) each."""
        return list((x.reshape(self.total, -1) if self.by_token else x).split(self.sizes))

    def pad(self, x: Tensor) -> Tensor:
        """(total * m, I) -> (K, C * m, I), for m vectors per entry, padded with zeros. A view if sizes are equal.

        The operand of `product` and `outer`. For grouped products it is ``x`` itself, in whole rows.
        """
        if self.grouped:
            return x.contiguous()
        K, width = len(self.slots), x.shape[-1]
        return (x if self.equal_sizes else self._ragged.pad(x.reshape(self.total, -1))).view(K, -1, width)

    def pad_input(self, key: Tensor, x: Tensor) -> Tensor:
        """`pad`, computed once for modules that follow each other with the same input ``key``, such as query and value.

        ``x`` is ``key`` as (total * m, I).
        """
        if self._padded is None or self._padded[0] is not key or self._padded[1] != key._version:
            self._padded = key, key._version, self.pad(x)  # the version changes where a model writes to its input
        return self._padded[2]

    def forget_input(self) -> None:
        """Lets the last input of `pad_input` go, and the graph behind it."""
        self._padded = None

    def unpad(self, padded: Tensor) -> Tensor:
        """The inverse of `pad`: (K, C * m, I) -> (total * m, I)."""
        if self.grouped:
            return padded
        width = padded.shape[-1]
        if self.equal_sizes:
            return padded.reshape(-1, width)
        return self._ragged.unpad(padded.reshape(len(self.slots) * self._ragged.longest, -1)).view(-1, width)

    def product(self, x: Tensor, W_KIO: Tensor) -> Tensor:
        """For each segment ``x_k @ W_k``: x and the result as `pad` makes them, W (K, I, O)."""
        return grouped_mm(x, W_KIO, offs=self._offsets(x)) if self.grouped else torch.bmm(x, W_KIO)

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """For each segment ``x_k^T @ y_k``, (K, I, O): x and y with I and O features, as `pad` makes them."""
        return grouped_mm(x.mT, y, offs=self._offsets(x)) if self.grouped else torch.bmm(x.mT, y)

    def _offsets(self, x: Tensor) -> Tensor:
        """(K,) int32: where each segment ends in ``x`` (total * m, I)."""
        per_entry = len(x) // self.total
        if per_entry not in self._ends:
            ends = torch.tensor(self.sizes).cumsum(0) * per_entry
            self._ends[per_entry] = to_device(ends.int(), self.device)
        return self._ends[per_entry]

    def select(self, stacked: Tensor) -> Tensor:
        """The slots of the segments: (slots, ...) -> (K, ...). A view if the slots are consecutive."""
        first, last = self.slots[0], self.slots[-1]
        if self.slots == list(range(first, last + 1)):
            return stacked[first : last + 1]
        return stacked.index_select(0, self._index)

    def scatter(self, values: Tensor, slots: int) -> Tensor:
        """The inverse of `select`: (K, ...) -> (slots, ...), with zeros in slots that have no segment."""
        if self.slots == list(range(slots)):
            return values
        return values.new_zeros(slots, *values.shape[1:]).index_copy_(0, self._index, values)

    def dropout_keys(self, shape: torch.Size) -> Tensor | None:
        """Token keys for an input of shape (*shape, I): (*shape, 1) int32. None if a segment has no key."""
        if any(s.dropout_key is None for s in self.segments):
            return None
        if shape not in self._keys:
            keys = []
            for s in self.segments:
                assert s.dropout_key is not None
                padded = [shape[1:].numel()] * s.rows
                keys.append(token_keys(s.dropout_key, s.lengths if self.by_token and s.lengths is not None else padded))
            self._keys[shape] = to_device(torch.from_numpy(np.concatenate(keys)), self.device).view(*shape, 1)
        return self._keys[shape]

    @cached_property
    def _index(self) -> Tensor:
        return to_device(torch.tensor(self.slots), self.device)

    @cached_property
    def _ragged(self) -> RaggedIndex:
        return RaggedIndex(self.sizes, self.device, self._multiple)
