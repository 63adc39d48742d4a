"""Norms of the gradients of single rows, from one backward pass and without the gradient of any row.

For a matrix whose gradient is a sum over the T tokens of a row, G = sum_t p_t q_t^T, the squared norm follows from
inner products of tokens alone (Li et al., arXiv 2110.05679, "ghost clipping"):

    ||G||_F^2 = sum_{t, t'} (p_t . p_t') (q_t . q_t')

With x, u, y, z, h as in `rayfed.lora.packed.kernel`, p and q are: h and u for A; dy and z for B; dy and x for a layer
of the head, whose bias has the gradient sum_t dy_t. With a core R, B R takes the place of B in h, and they are dy and
z R^T for B, s dy B and u A^T for R. The norm is over all tensors that train (`requires_grad`). Where only some entries
of a tensor train, it is over all of them, and so not too small.

Shape suffixes: N rows of the batch, T tokens, R rank, I layer input, O layer output; K segments or slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from rayfed.lora.packed.dropout import hash_dropout
from rayfed.lora.packed.layers import StackedLinear, StackedLora
from rayfed.lora.packed.ragged import RaggedIndex
from rayfed.lora.packed.segments import Segments
from rayfed.lora.packed.stack import Stack


class RowNorms:
    """Inside the `with` block, forward passes through the stack and one backward pass of the sum of the rows' losses
    give ``squares`` (N,): each row's squared gradient norm. Then call `close` before any other backward pass."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.rows = sum(segment.rows for segment in stack.batch.segments)
        self.squares: Tensor | None = None
        self._open = True
        self._ragged: RaggedIndex | None = None
        self._grams: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}  # query and value have one input
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        layers: dict[str, nn.Module] = {**self.stack.lora, **self.stack.head}
        self._hooks = [layer.register_forward_hook(partial(self._see, name)) for name, layer in layers.items()]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def close(self) -> Tensor:
        """Ends the recording, and returns the squares."""
        self._open, self._grams = False, {}
        assert self.squares is not None
        return self.squares

    def _see(self, name: str, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        if not y.requires_grad:
            return
        (x,) = args
        add = partial(self._add_lora, self.stack.scales(name)) if isinstance(layer, StackedLora) else self._add_linear
        y.register_hook(partial(self._called, add, layer, x, self.stack.batch.segments_of(x)))

    def _called(self, add: Any, layer: nn.Module, x: Tensor, segments: Segments, dy: Tensor) -> None:
        if self._open:
            found = add(layer, x.detach(), dy.float(), segments)
            self.squares = found if self.squares is None else self.squares + found

    def _add_lora(
        self, scaling: tuple[Tensor, bool], layer: StackedLora, x: Tensor, dy: Tensor, segments: Segments
    ) -> Tensor:
        A_KRI, B_KOR = layer.A_KRI.detach().float(), layer.B_KOR.detach().float()
        R_KRR = None if layer.R_KRR is None else layer.R_KRR.detach()
        keys = segments.dropout_keys(x.shape[:-1]) if layer.features_I is not None else None
        u = x if keys is None or layer.features_I is None else hash_dropout(x, layer.dropout, keys, layer.features_I)
        scales_K, scaled = scaling
        B_KOR = segments.select(B_KOR if scaled else B_KOR * scales_K)
        z = self._by_slot(u.float(), segments, segments.select(A_KRI).mT)
        total = torch.zeros(self.rows, device=dy.device)
        if layer.A_KRI.requires_grad:
            h = self._by_slot(dy, segments, B_KOR if R_KRR is None else B_KOR @ segments.select(R_KRR))
            gram = self._gram(u, segments) if keys is not None else self._gram_once(x, segments)
            total += (self._gram(h, segments) * gram).sum((1, 2))
        if layer.B_KOR.requires_grad:
            core = torch.eye(z.shape[-1], device=z.device) if R_KRR is None else R_KRR.mT
            q = self._by_slot(z, segments, segments.select(scales_K * core))
            total += (self._gram(dy, segments) * self._gram(q, segments)).sum((1, 2))
        if layer.R_KRR is not None and layer.R_KRR.requires_grad:
            p = self._by_slot(dy, segments, B_KOR)
            total += (self._gram(p, segments) * self._gram(z, segments)).sum((1, 2))
        return total

    def _add_linear(self, layer: StackedLinear, x: Tensor, dy: Tensor, segments: Segments) -> Tensor:
        total = (self._gram(dy, segments) * self._gram(x, segments)).sum((1, 2))
        if layer.bias_KO is not None:
            total += self._by_row(dy, segments).sum(1).square().sum(1)
        return total

    def _by_slot(self, x: Tensor, segments: Segments, weights_K: Tensor) -> Tensor:
        """Every vector of ``x`` (..., F) times the matrix (F, G) of its slot: (..., G)."""
        flat = x.reshape(-1, x.shape[-1])
        return segments.unpad(torch.bmm(segments.pad(flat), weights_K)).view(*x.shape[:-1], -1)

    def _by_row(self, x: Tensor, segments: Segments) -> Tensor:
        """(N, T, F) of an input in rows, or in tokens, with zeros as padding."""
        if not segments.by_token:
            return x.reshape(self.rows, -1, x.shape[-1])
        if self._ragged is None:
            self._ragged = RaggedIndex(_lengths(segments), x.device)
        return self._ragged.pad(x.reshape(-1, x.shape[-1])).view(self.rows, -1, x.shape[-1])

    def _gram(self, x: Tensor, segments: Segments) -> Tensor:
        """The inner products of a row's tokens, (N, T, T) float32."""
        x_NTF = self._by_row(x.float(), segments)
        return torch.bmm(x_NTF, x_NTF.mT)

    def _gram_once(self, x: Tensor, segments: Segments) -> Tensor:
        key = (x.data_ptr(), x.shape)
        if key not in self._grams:
            self._grams[key] = x, self._gram(x, segments)
        return self._grams[key][1]


def _lengths(segments: Segments) -> Sequence[int]:
    return [n for segment in segments.segments for n in (segment.lengths or [1] * segment.rows)]
