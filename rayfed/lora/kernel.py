"""The low-rank change of a stacked layer, as one autograd function over all slots of a pack.

For the rows of slot k, with u their (dropped-out) input, x the input itself and y what the frozen layer makes of it:

    y += s_k (u A_k^T) B_k^T + x F_k^T              F_k: the slot's frozen change of the base, if it has one

    z = s_k u A_k^T,  h = s_k dy B_k
    dB_k = dy^T z,   dA_k = h^T u,   du = h A_k,   dx = dy F_k,   dy passes through

The scale stands on the narrow side: r columns to multiply instead of out. Products are accumulated in place, so a layer
makes no temporary as large as its output; autograd's own way through the same equations makes several. Where all slots
have equally many rows (images, padded texts, full batches of a regression), each line above is one batched product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayfed.lora.adapter import LowRank


@dataclass(frozen=True)
class Piece:
    """Rows (or, without padding, tokens) ``start`` to ``stop`` of the batch, which pass through one slot."""

    slot: int
    start: int
    stop: int
    scale: float
    frozen: LowRank | Tensor | None = None


def change(y: Tensor, x: Tensor, u: Tensor, A_KRI: Tensor, B_KOR: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """``y`` plus the change, in place. y (rows, ..., O); x and u (rows, ..., I); the pieces cover all rows in order.

    Tokens end to end, (1, tokens, O), are covered by pieces that count tokens.
    """
    result: Tensor = _Change.apply(y.contiguous(), x, u, A_KRI, B_KOR, pieces)
    return result


class _Change(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, u: Tensor, A_KRI: Tensor, B_KOR: Tensor, pieces: Sequence[Piece]
    ) -> Tensor:
        flat_y, flat_x, flat_u = (t.reshape(-1, t.shape[-1]) for t in (y, x, u.to(A_KRI.dtype)))
        each = flat_y.shape[0] // pieces[-1].stop  # rows of the flat form per row that the pieces count
        slots = _alike(pieces)
        narrow = []
        if slots is not None:
            K, scales = len(pieces), _scales(pieces, A_KRI)
            z_KTR = torch.bmm(flat_u.view(K, -1, flat_u.shape[-1]), A_KRI[slots].mT).mul_(scales)
            _add(flat_y.view(K, -1, flat_y.shape[-1]), z_KTR, B_KOR[slots].mT)
            narrow.append(z_KTR)
        for piece in pieces:
            rows = slice(each * piece.start, each * piece.stop)
            if slots is None:
                z = (flat_u[rows] @ A_KRI[piece.slot].T).mul_(piece.scale)
                _add(flat_y[rows], z, B_KOR[piece.slot].T)
                narrow.append(z)
            if isinstance(piece.frozen, LowRank):
                A, B, scale = piece.frozen.A, piece.frozen.B, piece.frozen.scale
                _add(flat_y[rows], (flat_x[rows].to(A.dtype) @ A.T).mul_(scale), B.T)
            elif piece.frozen is not None:
                _add(flat_y[rows], flat_x[rows], piece.frozen.T)
        ctx.save_for_backward(u, A_KRI, B_KOR, *narrow)
        ctx.pieces, ctx.slots, ctx.each, ctx.x_shape = pieces, slots, each, x.shape
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, A_KRI, B_KOR, *narrow = ctx.saved_tensors
        _, need_x, need_u, need_A, need_B, _ = ctx.needs_input_grad
        flat_dy = dy.reshape(-1, dy.shape[-1])
        wide = flat_dy.to(A_KRI.dtype)
        flat_u = u.to(A_KRI.dtype).reshape(-1, u.shape[-1])
        dA = torch.zeros_like(A_KRI) if need_A else None
        dB = torch.zeros_like(B_KOR) if need_B else None
        du = flat_u.new_empty(flat_u.shape) if need_u else None
        dx = None
        if need_x and any(piece.frozen is not None for piece in ctx.pieces):
            dx = flat_dy.new_zeros(len(flat_dy), u.shape[-1])
        slots = ctx.slots
        if slots is not None:
            K = len(ctx.pieces)
            dy_KTO, u_KTI = wide.view(K, -1, wide.shape[-1]), flat_u.view(K, -1, flat_u.shape[-1])
            if dB is not None:
                dB[slots] = torch.bmm(dy_KTO.mT, narrow[0])
            if dA is not None or du is not None:
                h_KTR = torch.bmm(dy_KTO, B_KOR[slots]).mul_(_scales(ctx.pieces, A_KRI))
                if dA is not None:
                    dA[slots] = torch.bmm(h_KTR.mT, u_KTI)
                if du is not None:
                    torch.bmm(h_KTR, A_KRI[slots], out=du.view(K, -1, du.shape[-1]))
        for i, piece in enumerate(ctx.pieces):
            rows = slice(ctx.each * piece.start, ctx.each * piece.stop)
            if slots is None and dB is not None:
                dB[piece.slot] += wide[rows].T @ narrow[i]
            if slots is None and (dA is not None or du is not None):
                h = (wide[rows] @ B_KOR[piece.slot]).mul_(piece.scale)
                if dA is not None:
                    dA[piece.slot] += h.T @ flat_u[rows]
                if du is not None:
                    torch.mm(h, A_KRI[piece.slot], out=du[rows])
            if dx is not None and isinstance(piece.frozen, LowRank):
                _add(dx[rows], (wide[rows] @ piece.frozen.B).mul_(piece.frozen.scale), piece.frozen.A)
            elif dx is not None and piece.frozen is not None:
                _add(dx[rows], flat_dy[rows], piece.frozen)
        du_shaped = None if du is None else du.to(u.dtype).view(u.shape)
        return dy, None if dx is None else dx.view(ctx.x_shape), du_shaped, dA, dB, None


def _alike(pieces: Sequence[Piece]) -> slice | list[int] | None:
    """The index of the slots, if they are several, each with a piece of its own, and all pieces have as many rows."""
    slots = [piece.slot for piece in pieces]
    if len(slots) < 2 or len(set(slots)) < len(slots) or len({piece.stop - piece.start for piece in pieces}) > 1:
        return None
    return slice(slots[0], slots[-1] + 1) if slots == list(range(slots[0], slots[-1] + 1)) else slots  # a view


def _scales(pieces: Sequence[Piece], like: Tensor) -> Tensor:
    """The pieces' scales, (K, 1, 1)."""
    return torch.tensor([piece.scale for piece in pieces], dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in place, batched or not, also where the base computes in a coarser number format."""
    if left.dtype == right.dtype == total.dtype:
        total.baddbmm_(left, right) if total.ndim == 3 else total.addmm_(left, right)
    else:
        total += left.to(right.dtype) @ right  # summed in the finer format, rounded once
