"""The LoRA term of a stacked layer for all segments of a batch.

For the rows of slot k: x is the layer's input, u is x after dropout, and y is the output of the frozen layer.

    y += s_k (u A_k^T) B_k^T + x F_k^T              F_k: the frozen base change of the slot, if there is one

    z = s_k u A_k^T,  h = s_k dy B_k
    dB_k = dy^T z,   dA_k = h^T u,   du = h A_k,   dx = dy F_k,   dy is passed on

Products are computed in the factors' format. In bfloat16 each result is rounded to bfloat16 once.

The scale multiplies the r columns of z and h, not the O columns of y. Terms are added to y and dx in place; autograd's
own backward for the same equations would allocate several tensors as large as y. For batched segments
(`Segments.batched`) each line above is one batched or grouped product, however many slots there are. `add_lora_` is one
autograd function; `project` and `add_projected_` are the same in two, so that several layers share the first.

Shape suffixes: K segments or slots, C entries of the longest segment, R largest rank, I layer input, O layer output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from rayfed.device import to_device
from rayfed.lora.adapter import LowRank
from rayfed.lora.packed.segments import Segments


@dataclass
class SlotConstants:
    """What does not train in a layer, by slot: the scale s_k and the frozen base change F_k (O, I), or None.

    Without ``scales``, the factors B_k are scaled already.
    """

    scales: list[float] | None
    base_changes: list[LowRank | Tensor | None]
    _scales: Tensor | None = None

    def scale_(self, z_KCR: Tensor, segments: Segments) -> Tensor:
        """Multiplies ``z_KCR`` by the scales of the segments' slots in place and returns it."""
        if self.scales is None:
            return z_KCR
        if self._scales is None:  # dtype and device are the same in every call
            dtype = torch.promote_types(z_KCR.dtype, torch.float32)
            self._scales = to_device(torch.tensor(self.scales, dtype=dtype).view(-1, 1, 1), z_KCR.device)
        return z_KCR.mul_(segments.select(self._scales))

    def base_changes_of(self, segments: Segments, per_entry: int) -> Iterator[tuple[slice, LowRank | Tensor]]:
        """The base changes and the rows of the flattened input (total * per_entry, I) to which they apply.

        Neighbouring segments with the same change are one slice.
        """
        if not any(change is not None for change in self.base_changes):
            return
        ends = [0, *accumulate(per_entry * size for size in segments.sizes)]
        for _, group in groupby(range(len(segments.slots)), lambda i: id(self.base_changes[segments.slots[i]])):
            first, *rest = group
            change = self.base_changes[segments.slots[first]]
            if change is not None:
                yield slice(ends[first], ends[(rest or [first])[-1] + 1]), change


def add_lora_(
    y: Tensor, x: Tensor, u: Tensor, A_KRI: Tensor, B_KOR: Tensor, segments: Segments, constants: SlotConstants
) -> Tensor:
    """Adds the LoRA term and the base change to ``y`` in place and returns it. Nobody else may need ``y``.

    Shapes: y (rows, ..., O); x and u (rows, ..., I); or tokens in place of rows, as in ``segments``.
    """
    result: Tensor = _AddLora.apply(y.contiguous(), x, u, A_KRI, B_KOR, segments, constants)
    return result


def project(x: Tensor, factors: Sequence[Tensor], segments: Segments) -> Sequence[Tensor]:
    """``x A_k^T`` for the factors A_KRI of several layers that read ``x``, in one product; see `add_projected_`.

    The factors are neighbours in memory, as the stack's are: for each slot their rows are one matrix.
    """
    results: Sequence[Tensor] = _Project.apply(x, segments, *factors)
    return results


def add_projected_(y: Tensor, z: Tensor, B_KOR: Tensor, segments: Segments) -> Tensor:
    """`add_lora_` for a result of `project`, without a scale or a base change."""
    result: Tensor = _AddProjected.apply(y.contiguous(), z, B_KOR, segments)
    return result


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Segments, *factors: Tensor) -> tuple[Tensor, ...]:
        first, ctx.ranks = factors[0], [A.shape[1] for A in factors]
        assert all(a.data_ptr() + a[0].nbytes == b.data_ptr() for a, b in pairwise(factors))
        A_KRI = first.as_strided((len(first), sum(ctx.ranks), first.shape[2]), first.stride())
        u = segments.pad_input(x, x.to(A_KRI.dtype).reshape(-1, x.shape[-1]))
        ctx.save_for_backward(u, A_KRI)
        ctx.segments, ctx.x_dtype, ctx.x_shape = segments, x.dtype, x.shape
        return segments.product(u, segments.select(A_KRI).mT).split(ctx.ranks, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dz: Tensor) -> tuple[Tensor | None, ...]:
        (u, A_KRI), segments, (need_x, _, *need_A) = ctx.saved_tensors, ctx.segments, ctx.needs_input_grad
        h, dx, dA = torch.cat(dz, -1), None, [None] * len(dz)
        if any(need_A):
            dA = segments.scatter(segments.outer(h, u), len(A_KRI)).split(ctx.ranks, 1)
        if need_x:
            dx = segments.unpad(segments.product(h, segments.select(A_KRI))).to(ctx.x_dtype).view(ctx.x_shape)
        return dx, None, *dA


class _AddProjected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, B_KOR: Tensor, segments: Segments) -> Tensor:
        y = y.detach()  # as in `_AddLora`
        _add_projected(y.reshape(-1, y.shape[-1]), z, segments.select(B_KOR).mT, segments)
        ctx.save_for_backward(z, B_KOR)
        ctx.segments = segments
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (z, B_KOR), segments, (_, need_z, need_B, _) = ctx.saved_tensors, ctx.segments, ctx.needs_input_grad
        padded = segments.pad(dy.reshape(-1, dy.shape[-1]).to(B_KOR.dtype))
        dB = segments.scatter(segments.outer(padded, z), len(B_KOR)) if need_B else None
        return dy, segments.product(padded, segments.select(B_KOR)) if need_z else None, dB, None


class _AddLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, u: Tensor, A_KRI: Tensor, B_KOR: Tensor, segments: Segments,
        constants: SlotConstants,
    ) -> Tensor:  # fmt: skip
        ctx.u_dtype, ctx.u_shape = u.dtype, u.shape
        y = y.detach()  # not marked as dirty: y is a view of what a linear layer computed, and autograd would copy it
        flat_y, flat_x, flat_u = (t.reshape(-1, t.shape[-1]) for t in (y, x, u.to(A_KRI.dtype)))
        per_entry = len(flat_y) // segments.total  # vectors per row, or per token
        if segments.batched:
            u, B_KRO = segments.pad_input(u, flat_u), segments.select(B_KOR).mT
            z_KCR = constants.scale_(segments.product(u, segments.select(A_KRI).mT), segments)
            _add_projected(flat_y, z_KCR, B_KRO, segments)
            z_saved = [z_KCR]
        else:
            z_saved, scales = [], constants.scales or [1.0] * len(A_KRI)
            for k, rows in _slot_rows(segments, per_entry):
                z = (flat_u[rows] @ A_KRI[k].T).mul_(scales[k])
                _add_product(flat_y[rows], z, B_KOR[k].T)
                z_saved.append(z)
        for rows, F in constants.base_changes_of(segments, per_entry):
            if isinstance(F, LowRank):
                _add_product(flat_y[rows], (flat_x[rows].to(F.A.dtype) @ F.A.T).mul_(F.scale), F.B.T)
            else:
                _add_product(flat_y[rows], flat_x[rows], F.T)
        ctx.save_for_backward(u, A_KRI, B_KOR, *z_saved)
        ctx.segments, ctx.constants, ctx.per_entry, ctx.x_shape = segments, constants, per_entry, x.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, A_KRI, B_KOR, *z_saved = ctx.saved_tensors
        segments, constants = ctx.segments, ctx.constants
        _, need_x, *needs, _, _ = ctx.needs_input_grad
        flat_dy = dy.reshape(-1, dy.shape[-1])
        fine_dy = flat_dy.to(A_KRI.dtype)
        backward = _backward_batched if segments.batched else _backward_by_segment
        du, dA, dB = backward(fine_dy, u, A_KRI, B_KOR, z_saved, segments, constants, needs)
        dx = None
        for rows, F in constants.base_changes_of(segments, ctx.per_entry) if need_x else ():
            dx = flat_dy.new_zeros(len(flat_dy), ctx.x_shape[-1]) if dx is None else dx
            if isinstance(F, LowRank):
                _add_product(dx[rows], (fine_dy[rows] @ F.B).mul_(F.scale), F.A)
            else:
                _add_product(dx[rows], flat_dy[rows], F)
        du = None if du is None else du.to(ctx.u_dtype).view(ctx.u_shape)
        return dy, None if dx is None else dx.view(ctx.x_shape), du, dA, dB, None, None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # du, dA, dB


def _backward_batched(
    dy: Tensor, u_KCI: Tensor, A_KRI: Tensor, B_KOR: Tensor, z_saved: list[Tensor], segments: Segments,
    constants: SlotConstants, needs: list[bool],
) -> Gradients:  # fmt: skip
    need_u, need_A, need_B = needs
    du, dA, dB = None, None, None
    dy_KCO = segments.pad(dy)
    if need_B:
        dB = segments.scatter(segments.outer(dy_KCO, z_saved[0]), len(B_KOR))
    if need_A or need_u:
        h_KCR = constants.scale_(segments.product(dy_KCO, segments.select(B_KOR)), segments)
        if need_A:
            dA = segments.scatter(segments.outer(h_KCR, u_KCI), len(A_KRI))
        if need_u:
            du = segments.unpad(segments.product(h_KCR, segments.select(A_KRI)))
    return du, dA, dB


def _backward_by_segment(
    dy: Tensor, u: Tensor, A_KRI: Tensor, B_KOR: Tensor, z_saved: list[Tensor], segments: Segments,
    constants: SlotConstants, needs: list[bool],
) -> Gradients:  # fmt: skip
    need_u, need_A, need_B = needs
    scales = constants.scales or [1.0] * len(A_KRI)
    u = u.to(A_KRI.dtype).reshape(-1, u.shape[-1])
    du = torch.empty_like(u) if need_u else None
    dA = torch.zeros_like(A_KRI) if need_A else None
    dB = torch.zeros_like(B_KOR) if need_B else None
    for z, (k, rows) in zip(z_saved, _slot_rows(segments, len(u) // segments.total), strict=True):
        if dB is not None:
            torch.mm(dy[rows].T, z, out=dB[k])
        if dA is not None or du is not None:
            h = (dy[rows] @ B_KOR[k]).mul_(scales[k])
            if dA is not None:
                torch.mm(h.T, u[rows], out=dA[k])
            if du is not None:
                torch.mm(h, A_KRI[k], out=du[rows])
    return du, dA, dB


def _slot_rows(segments: Segments, per_entry: int) -> Iterator[tuple[int, slice]]:
    """The slot of each segment and its rows in the flattened input (total * per_entry, I)."""
    start = 0
    for slot, size in zip(segments.slots, segments.sizes):
        yield slot, slice(start, start + per_entry * size)
        start += per_entry * size


def _add_projected(flat_y: Tensor, z_KCR: Tensor, B_KRO: Tensor, segments: Segments) -> None:
    """Adds ``z_k @ B_k`` of every segment to its rows of ``flat_y`` (rows, O) in place."""
    if segments.equal_sizes:
        _add_product(segments.pad(flat_y), z_KCR, B_KRO)
    else:
        flat_y += segments.unpad(segments.product(z_KCR, B_KRO))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in place, for 2 or 3 dimensions. ``total`` and ``left`` may have a coarser dtype."""
    if left.dtype == right.dtype == total.dtype:
        total.baddbmm_(left, right) if total.ndim == 3 else total.addmm_(left, right)
    else:
        total += left.to(right.dtype) @ right  # summed in the finer dtype, rounded once
