"""Runs of different length side by side: what one batched product needs, and the way back.

A `RaggedIndex` has a line of equal length for every run; behind the shorter runs there are free places, which hold zeros. Both
ways are gathers, and each is the other's gradient: no sum whose order could change, and no sort to keep it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayfed.device import to_device


class RaggedIndex:
    """Where the entries of runs of these ``sizes`` stand: ``lines`` runs of up to ``longest`` entries each."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.lines, self.longest = len(sizes), max(sizes)
        lengths, column = torch.tensor(sizes)[:, None], torch.arange(self.longest)
        first, taken = lengths.cumsum(0) - lengths, column < lengths
        self.places = to_device(taken.flatten().nonzero().squeeze(1), device)  # (entries,): each entry's place
        self.sources = to_device(
            torch.where(taken, first + column, first).flatten(), device
        )  # (places,): a free one's: any
        self.free = to_device(~taken.flatten(), device)  # (places,) bool

    def pad(self, x: Tensor) -> Tensor:
        """(entries, ...) -> (lines * longest, ...), zeros in the free places."""
        result: Tensor = _Move.apply(x, self, True)
        return result

    def unpad(self, x: Tensor) -> Tensor:
        """(lines * longest, ...) -> (entries, ...); what is in the free places counts for nothing."""
        result: Tensor = _Move.apply(x, self, False)
        return result

    def _spread(self, x: Tensor) -> Tensor:
        free = self.free.view(-1, *[1] * (x.ndim - 1))
        return x.index_select(0, self.sources).masked_fill_(free, 0)  # filled, not multiplied: 0 times NaN is NaN

    def _gather(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.places)


class _Move(torch.autograd.Function):
    """One way forward (``spread``, or gather), the other way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: RaggedIndex, spread: bool) -> Tensor:
        ctx.grid, ctx.spread = grid, spread
        return grid._spread(x) if spread else grid._gather(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.grid._gather(dy) if ctx.spread else ctx.grid._spread(dy), None, None
