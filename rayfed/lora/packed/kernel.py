"""The low-rank change of a stacked layer, as one autograd function over all slots of a pack.

For the rows of slot k, with u their (dropped-out) input, x the input itself and y what the frozen layer makes of it:

    y += s_k (u A_k^T) B_k^T + x F_k^T              F_k: the slot's frozen change of the base, if it has one

    z = s_k u A_k^T,  h = s_k dy B_k
    dB_k = dy^T z,   dA_k = h^T u,   du = h A_k,   dx = dy F_k,   dy passes through

The scale stands on the narrow side: r columns to multiply instead of out. Nothing as wide as the layer is made that
could be added in place; autograd's own way through the same equations makes several such temporaries. A batch whose
runs are taken together (`Segments.batched`) needs as many products for K slots as for one: each line above is batched.

Shape suffixes: K runs, C entries of the longest; R largest rank, I layer input, O layer output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from rayfed.device import to_device
from rayfed.lora.adapter import LowRank
from rayfed.lora.packed.segments import Segments


@dataclass
class Fixed:
    """What does not train in a layer's slots: their scales, and the frozen changes of their base (None: no change)."""

    scales: list[float]
    frozen: list[LowRank | Tensor | None]
    _tensors: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    def scales_as(self, like: Tensor) -> Tensor:
        """The scales, (slots, 1, 1), in the type and on the device of ``like``."""
        if like.dtype not in self._tensors:
            made = torch.tensor(self.scales, dtype=like.dtype).view(-1, 1, 1)
            self._tensors[like.dtype] = to_device(made, like.device)
        return self._tensors[like.dtype]

    def changes(self, runs: Segments, each: int) -> Iterator[tuple[slice, LowRank | Tensor]]:
        """The frozen changes and the rows they apply to; neighbours with the same change come as one."""
        if not any(change is not None for change in self.frozen):
            return
        ends = [0, *accumulate(each * size for size in runs.sizes)]
        for _, run in groupby(range(len(runs.slots)), lambda i: id(self.frozen[runs.slots[i]])):
            first, *rest = run
            change = self.frozen[runs.slots[first]]
            if change is not None:
                yield slice(ends[first], ends[(rest or [first])[-1] + 1]), change


def change(y: Tensor, x: Tensor, u: Tensor, A_KRI: Tensor, B_KOR: Tensor, runs: Segments, fixed: Fixed) -> Tensor:
    """``y`` plus the change, in place. y (rows, ..., O); x and u (rows, ..., I), or tokens as ``runs`` has them."""
    result: Tensor = _Change.apply(y.contiguous(), x, u, A_KRI, B_KOR, runs, fixed)
    return result


class _Change(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, u: Tensor, A_KRI: Tensor, B_KOR: Tensor, runs: Segments, fixed: Fixed
    ) -> Tensor:
        flat_y, flat_x, flat_u = (t.reshape(-1, t.shape[-1]) for t in (y, x, u.to(A_KRI.dtype)))
        each = len(flat_y) // runs.count  # rows of the flat form per row, or token, that is shared out
        if runs.batched:
            z_KCR = torch.bmm(runs.grid(flat_u), runs.of(A_KRI).mT).mul_(runs.of(fixed.scales_as(A_KRI)))
            if runs.even:
                _add(runs.grid(flat_y), z_KCR, runs.of(B_KOR).mT)
            else:
                flat_y += runs.row(torch.bmm(z_KCR, runs.of(B_KOR).mT))
            narrow = [z_KCR]
        else:
            narrow = []
            for k, rows in _rows(runs, each):
                z = (flat_u[rows] @ A_KRI[k].T).mul_(fixed.scales[k])
                _add(flat_y[rows], z, B_KOR[k].T)
                narrow.append(z)
        for rows, frozen in fixed.changes(runs, each):
            if isinstance(frozen, LowRank):
                _add(flat_y[rows], (flat_x[rows].to(frozen.A.dtype) @ frozen.A.T).mul_(frozen.scale), frozen.B.T)
            else:
                _add(flat_y[rows], flat_x[rows], frozen.T)
        ctx.save_for_backward(u, A_KRI, B_KOR, *narrow)
        ctx.runs, ctx.fixed, ctx.each, ctx.x_shape = runs, fixed, each, x.shape
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, A_KRI, B_KOR, *narrow = ctx.saved_tensors
        runs, fixed = ctx.runs, ctx.fixed
        _, need_x, *needs, _, _ = ctx.needs_input_grad
        flat_dy = dy.reshape(-1, dy.shape[-1])
        wide, flat_u = flat_dy.to(A_KRI.dtype), u.to(A_KRI.dtype).reshape(-1, u.shape[-1])
        way_back = _batched if runs.batched else _one_by_one
        du, dA, dB = way_back(wide, flat_u, A_KRI, B_KOR, narrow, runs, fixed, needs)
        dx = None
        for rows, frozen in fixed.changes(runs, ctx.each) if need_x else ():
            dx = flat_dy.new_zeros(len(flat_dy), u.shape[-1]) if dx is None else dx
            if isinstance(frozen, LowRank):
                _add(dx[rows], (wide[rows] @ frozen.B).mul_(frozen.scale), frozen.A)
            else:
                _add(dx[rows], flat_dy[rows], frozen)
        du_shaped = None if du is None else du.to(u.dtype).view(u.shape)
        return dy, None if dx is None else dx.view(ctx.x_shape), du_shaped, dA, dB, None, None


Found = tuple[Tensor | None, Tensor | None, Tensor | None]  # du, dA, dB


def _batched(
    dy: Tensor, u: Tensor, A_KRI: Tensor, B_KOR: Tensor, narrow: list[Tensor], runs: Segments, fixed: Fixed,
    needs: list[bool],
) -> Found:  # fmt: skip
    need_u, need_A, need_B = needs
    du, dA, dB = None, None, None
    dy_KCO = runs.grid(dy)
    if need_B:
        dB = runs.into(torch.bmm(dy_KCO.mT, narrow[0]), len(B_KOR))
    if need_A or need_u:
        h_KCR = torch.bmm(dy_KCO, runs.of(B_KOR)).mul_(runs.of(fixed.scales_as(A_KRI)))
        if need_A:
            dA = runs.into(torch.bmm(h_KCR.mT, runs.grid(u)), len(A_KRI))
        if need_u:
            du = runs.row(torch.bmm(h_KCR, runs.of(A_KRI)))
    return du, dA, dB


def _one_by_one(
    dy: Tensor, u: Tensor, A_KRI: Tensor, B_KOR: Tensor, narrow: list[Tensor], runs: Segments, fixed: Fixed,
    needs: list[bool],
) -> Found:  # fmt: skip
    need_u, need_A, need_B = needs
    du = torch.empty_like(u) if need_u else None
    dA = torch.zeros_like(A_KRI) if need_A else None
    dB = torch.zeros_like(B_KOR) if need_B else None
    for z, (k, rows) in zip(narrow, _rows(runs, len(u) // runs.count), strict=True):
        if dB is not None:
            torch.mm(dy[rows].T, z, out=dB[k])
        if dA is not None or du is not None:
            h = (dy[rows] @ B_KOR[k]).mul_(fixed.scales[k])
            if dA is not None:
                torch.mm(h.T, u[rows], out=dA[k])
            if du is not None:
                torch.mm(h, A_KRI[k], out=du[rows])
    return du, dA, dB


def _rows(runs: Segments, each: int) -> Iterator[tuple[int, slice]]:
    """Each slot and its rows of the flat form."""
    start = 0
    for slot, size in zip(runs.slots, runs.sizes):
        yield slot, slice(start, start + each * size)
        start += each * size


def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in place, batched or not, also where the base computes in a coarser number format."""
    if left.dtype == right.dtype == total.dtype:
        total.baddbmm_(left, right) if total.ndim == 3 else total.addmm_(left, right)
    else:
        total += left.to(right.dtype) @ right  # summed in the finer format, rounded once
