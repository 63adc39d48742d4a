"""Attention over concatenated texts in 16 bits on a CPU: all tiles of a batch in one batched product.

A CPU that multiplies in bfloat16 does so several times faster than in float32, but only in large calls: torch's own
function takes 3 to 9 times as long as in float32 on short texts, and each new shape costs a fraction of a millisecond,
because oneDNN makes a kernel for it. So tiles of up to 32 tokens (or one longer text) are padded to the next multiple
of 32, all tiles of one width are one batch, and the number of tiles is rounded up. Thus few shapes occur.

Padding repeats a token of its own tile, and attends to padding alone. So no value of one client meets one of another.

Shape suffixes: H heads, T tokens of the batch, D width of a head, N tiles of one width, C tokens of a padded tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

WIDTH = 32  # tokens: softmax is fast for rows of whole vectors
COUNT = 8  # the number of tiles is rounded up to a multiple of this


@dataclass(frozen=True)
class Blocks:
    """The tiles of one width. ``sources`` (N * H * C,): their rows in an input (T * H, D); ``bias`` (N, 1, C, C)."""

    sources: Tensor
    bias: Tensor


@dataclass(frozen=True)
class BlockLayout:
    """All tiles of a batch, by width. ``places`` (T * H,): where each row of the input is in the blocks' rows."""

    blocks: Sequence[Blocks]
    places: Tensor


def block_layout(tiles: Sequence[Sequence[int]], heads: int, causal: bool, dtype: torch.dtype) -> BlockLayout:
    """The layout of ``tiles``: for each tile the lengths of its texts, in the order of the batch."""
    sizes = np.array([sum(tile) for tile in tiles])
    starts, lengths = np.cumsum(sizes) - sizes, np.concatenate([np.asarray(tile) for tile in tiles])
    text_T, head = np.repeat(np.arange(len(lengths)), lengths), np.arange(heads)[:, None]
    widths = -(-sizes // WIDTH) * WIDTH
    places_TH = np.empty((len(text_T), heads), np.int32)
    blocks, rows = [], 0
    for C in np.unique(widths).tolist():
        own = np.flatnonzero(widths == C)
        filled = np.concatenate([own, np.repeat(own[:1], -len(own) % COUNT)])
        column = np.arange(C)
        padding = column >= sizes[filled, None]
        token_NC = starts[filled, None] + np.minimum(column, sizes[filled, None] - 1)
        label_NC = np.where(padding, -1, text_T[token_NC])
        hidden_NCC = label_NC[:, :, None] != label_NC[:, None, :]
        if causal:
            hidden_NCC |= column > column[:, None]
        bias = torch.zeros(hidden_NCC.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden_NCC), -torch.inf)
        sources = (token_NC[:, None] * heads + head).astype(np.int32)
        blocks.append(Blocks(torch.from_numpy(sources.reshape(-1)), bias[:, None]))
        place_NHC = rows + np.arange(sources.size).reshape(sources.shape)
        real_NC = ~padding[: len(own)]
        places_TH[token_NC[: len(own)][real_NC]] = place_NHC[: len(own)].swapaxes(1, 2)[real_NC]
        rows += sources.size
    return BlockLayout(blocks, torch.from_numpy(places_TH.reshape(-1)))


def block_attention(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    """Attention in blocks: query, key, value (1, H, T, D); the result is (1, T, H, D). Saves the attention weights."""
    result: Tensor = _BlockAttention.apply(query, key, value, layout, scale)
    return result


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float) -> Tensor:
        _, H, T, D = query.shape
        rows = [t[0].transpose(0, 1).reshape(T * H, D) for t in (query, key, value)]
        saved, results = [], []
        for block in layout.blocks:
            N, _, C, _ = block.bias.shape
            q, k, v = (t.index_select(0, block.sources).view(N * H, C, D) for t in rows)
            scores = torch.add(block.bias, torch.bmm(q, k.mT).view(N, H, C, C), alpha=scale)
            w = torch.softmax(scores, -1).view(N * H, C, C)
            results.append(torch.bmm(w, v))
            saved += [q, k, v, w]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.scale, ctx.shape = layout, scale, (1, T, H, D)
        return _joined(results, layout).view(ctx.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_1THD: Tensor) -> tuple[Tensor | None, ...]:
        saved, layout = ctx.saved_tensors, ctx.layout
        rows = dy_1THD.reshape(-1, dy_1THD.shape[-1])
        grads: tuple[list[Tensor], ...] = ([], [], [])
        for block, q, k, v, w in zip(layout.blocks, *(saved[i::4] for i in range(4)), strict=True):
            dy = rows.index_select(0, block.sources).view(q.shape)
            ds = torch._softmax_backward_data(torch.bmm(dy, v.mT), w, -1, w.dtype).mul_(ctx.scale)
            for grad, product in zip(grads, (torch.bmm(ds, k), torch.bmm(ds.mT, q), torch.bmm(w.mT, dy))):
                grad.append(product)
        return *(_joined(grad, layout).view(ctx.shape).transpose(1, 2) for grad in grads), None, None


def _joined(parts: Sequence[Tensor], layout: BlockLayout) -> Tensor:
    """The blocks' rows, each (N * H, C, D), in the order of the batch: (T * H, D)."""
    rows = [part.view(-1, part.shape[-1]) for part in parts]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).index_select(0, layout.places)
