"""Sequences of different lengths and their padded batch, for products of the whole batch at once.

`RaggedIndex.pad` does what `torch.nn.utils.rnn.pad_sequence` does, and `unpad` is its inverse. Both are gathers, and
each is the gradient of the other. No sum is involved, so the order of additions cannot change the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayfed.device import to_device


class RaggedIndex:
    """Where the entries of ``count`` sequences of these ``sizes`` are in a padded batch (count, longest).

    ``longest`` is the largest size, rounded up to a multiple of ``multiple``. ``padding_mask`` (count * longest,) is
    True at padding.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, multiple: int = 1) -> None:
        self.count, self.longest = len(sizes), -(-max(sizes) // multiple) * multiple
        lengths, column = torch.tensor(sizes)[:, None], torch.arange(self.longest)
        first, filled = lengths.cumsum(0) - lengths, column < lengths
        self._places = to_device(filled.flatten().nonzero().squeeze(1), device)  # (entries,): position when padded
        # (count * longest,): the entry at each position. Padding repeats the first entry of its sequence.
        self._sources = to_device(torch.where(filled, first + column, first).flatten(), device)
        self.padding_mask = to_device(~filled.flatten(), device)
        self._padding = to_device((~filled.flatten()).nonzero().squeeze(1), device)

    def pad(self, x: Tensor) -> Tensor:
        """(entries, ...) -> (count * longest, ...), with zeros as padding."""
        result: Tensor = _Move.apply(x, self, True)
        return result

    def unpad(self, x: Tensor) -> Tensor:
        """(count * longest, ...) -> (entries, ...). The padding is ignored."""
        result: Tensor = _Move.apply(x, self, False)
        return result

    def _pad(self, x: Tensor) -> Tensor:
        # Filled, not multiplied: 0 times NaN is NaN. A mask would take 4 times as long on a CPU.
        return x.index_select(0, self._sources).index_fill_(0, self._padding, 0)

    def _unpad(self, x: Tensor) -> Tensor:
        return x.index_select(0, self._places)


class _Move(torch.autograd.Function):
    """Pads or unpads. The gradient does the opposite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: RaggedIndex, pad: bool) -> Tensor:
        ctx.index, ctx.pad = index, pad
        return index._pad(x) if pad else index._unpad(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.index._unpad(dy) if ctx.pad else ctx.index._pad(dy), None, None
