"""Attention over texts that lie end to end: every token sees its own text and nothing else.

transformers lets a model call an attention function of our own; `varlen_attention` is it, and reads from `PackedSequences` where the texts
of the batch end. On a CPU the texts are taken in tiles of up to 64 tokens, each under a block-diagonal mask: a product
per text, or per length, spends its time on starting products, and one padded batch computes mostly padding. A tile
never spans two clients, because a masked entry is a factor 0, and 0 times a diverged neighbour's NaN is NaN.

Shape suffixes: H heads, T tokens of the batch, D width of a head, N tiles, C tokens of the largest tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from rayfed.device import to_device
from rayfed.lora.packed.ragged import RaggedIndex

NAME = (
    "rayfed_varlen"  # under which transformers knows `varlen_attention`; no mask is registered with it, so none is made
)
TILE = 64  # tokens; a longer text is a tile of its own
LONG = 128  # tokens; with a longer text, scores take more memory than they save time
UNKNOWN = ("softcap", "s_aux", "position_bias")  # variants of attention that nothing here computes

_token_places: ContextVar[PackedSequences | None] = ContextVar("sequences", default=None)


class PackedSequences:
    """How the texts of one batch lie in its row: made once a batch, read by every layer."""

    def __init__(self, clients: Sequence[Sequence[int]], device: torch.device) -> None:
        """``clients``: of each client in the batch, the tokens of each of its texts."""
        self.device = device
        self.lengths = [length for lengths in clients for length in lengths]
        self.longest = max(self.lengths)
        room = TILE if device.type == "cpu" else max(TILE, self.longest)  # a grid is as wide as its longest tile anyway
        self.tiles = [tile for lengths in clients for tile in _tiles(lengths, room)]
        self.sizes = [sum(tile) for tile in self.tiles]
        self._kept: dict[Any, Any] = {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        token = _token_places.set(self)
        try:
            yield
        finally:
            _token_places.reset(token)

    def masks(self, causal: bool, dtype: torch.dtype) -> list[Tensor | None]:
        """Per tile what is added to its scores (C, C), -inf where a token may not look; None where it may everywhere.

        None for a long text, too, of which `_by_tile` knows by itself what is causal.
        """
        return self._once((causal, dtype), lambda: [self._mask(tile, causal, dtype) for tile in self.tiles])

    def ends(self) -> Tensor:
        """(texts + 1,) int32: where the texts start and end, from 0 to T."""
        sizes = torch.tensor([0, *self.lengths], dtype=torch.int32)
        return self._once("ends", lambda: to_device(sizes.cumsum(0, dtype=torch.int32), self.device))

    def texts(self) -> RaggedIndex:
        """The texts side by side."""
        grid: RaggedIndex = self._once("texts", lambda: RaggedIndex(self.lengths, self.device))
        return grid

    def grid(self, causal: bool) -> tuple[RaggedIndex, Tensor]:
        """The tiles as one batch, and who sees whom: (N, 1, C, C), True where seen. Free places see each other."""
        grid = self._once("grid", lambda: RaggedIndex(self.sizes, self.device))
        return grid, self._once(("seen", causal), lambda: to_device(self._seen(causal), self.device))

    def _seen(self, causal: bool) -> Tensor:
        width = max(self.sizes)
        owners = torch.stack([
            torch.cat([_owners(tile), torch.full((width - size,), len(tile))])
            for tile, size in zip(self.tiles, self.sizes)
        ])  # fmt: skip
        seen = owners[:, None, :, None] == owners[:, None, None, :]
        return seen & torch.ones(width, width, dtype=torch.bool).tril() if causal else seen

    def _mask(self, tile: Sequence[int], causal: bool, dtype: torch.dtype) -> Tensor | None:
        if len(tile) == 1 and (not causal or tile[0] > LONG):
            return None
        owners = _owners(tile)
        hidden = owners[:, None] != owners
        if causal:
            hidden |= torch.ones_like(hidden).triu(1)
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **named: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: query (1, H, T, D), key and value (1, H or fewer, T, D); returns (1, T, H, D).

    Raises ValueError for what it cannot do: the model is then run with padding, see `rayfed.tasks.models.unpadded`.
    """
    sequences = _token_places.get()
    if (
        sequences is None
        or query.shape[2] != sum(sequences.lengths)
        or key.shape[2] != query.shape[2]
        or len(query) != 1
    ):
        raise ValueError("attention over flat rows wants the row that is in use")
    if attention_mask is not None or dropout or any(named.get(name) is not None for name in UNKNOWN):
        raise ValueError("flat rows know no other masks, no dropout in attention, no bias and no cap")
    window = named.get("sliding_window")
    if window is not None and window < sequences.longest:
        raise ValueError(f"a text of {sequences.longest} tokens is longer than the window of {window}")
    causal = named.get("is_causal")
    causal = bool(getattr(module, "is_causal", False) if causal is None else causal)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if query.device.type == "cpu":
        key, value = _every_head(key, query), _every_head(value, query)
        if sequences.longest > LONG:
            return _by_tile(query, key, value, sequences, causal, scale), None
        return _Tiles.apply(query, key, value, sequences.sizes, sequences.masks(causal, query.dtype), scale), None
    if _flash_takes(query):
        return _varlen(query, key, value, sequences, causal, scale), None
    return _gridded(query, key, value, sequences, causal, scale), None


class _Tiles(torch.autograd.Function):
    """Attention tile by tile, written out: with short texts, and unlike torch's own, most of its time is arithmetic.

    Scores are kept for the way back, H times a tile's size for every token, which is why texts must be short. Results
    and gradients are written where the model's layout (T, H, D) has them, so nothing needs joining or copying after.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sizes: list[int], masks: list[Tensor | None], scale: float
    ) -> Tensor:
        y_1THD = query.new_empty(query.transpose(1, 2).shape)
        weights = []
        rows = zip(*(t[0].split(sizes, 1) for t in (query, key, value)), y_1THD[0].split(sizes), masks)
        for q_HCD, k_HCD, v_HCD, y_CHD, mask in rows:
            if mask is None:
                scores = torch.bmm(q_HCD, k_HCD.mT).mul_(scale)
            else:
                scores = torch.baddbmm(mask, q_HCD, k_HCD.mT, alpha=scale)
            w_HCC = torch.softmax(scores, -1)
            y_CHD.transpose(0, 1).copy_(torch.bmm(w_HCC, v_HCD))
            weights.append(w_HCC)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.sizes, ctx.scale = sizes, scale
        return y_1THD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_1THD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *weights = ctx.saved_tensors
        grads = [torch.empty_like(dy_1THD) for _ in range(3)]
        inputs = (t[0].split(ctx.sizes, 1) for t in (query, key, value, dy_1THD.transpose(1, 2)))
        outputs = (t[0].transpose(0, 1).split(ctx.sizes, 1) for t in grads)
        for w_HCC, q_HCD, k_HCD, v_HCD, dy_HCD, dq, dk, dv in zip(weights, *inputs, *outputs):
            dv.copy_(torch.bmm(w_HCC.mT, dy_HCD))
            dw_HCC = torch.bmm(dy_HCD, v_HCD.mT)
            ds_HCC = torch._softmax_backward_data(dw_HCC, w_HCC, -1, w_HCC.dtype).mul_(ctx.scale)
            dq.copy_(torch.bmm(ds_HCC, k_HCD))
            dk.copy_(torch.bmm(ds_HCC.mT, q_HCD))
        return *(t.transpose(1, 2) for t in grads), None, None, None


def _by_tile(
    query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences, causal: bool, scale: float
) -> Tensor:
    """A call of torch's own per tile; it keeps no scores, so that texts may be long."""
    tiles = zip(*(t.split(sequences.sizes, dim=2) for t in (query, key, value)), sequences.masks(causal, query.dtype))
    parts = [
        nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale
        ).transpose(1, 2)
        for q, k, v, mask in tiles
    ]
    return torch.cat(parts, dim=1)


def _gridded(
    query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences, causal: bool, scale: float
) -> Tensor:
    """All tiles in one call, padded to the largest: few kernels, for a device that is slow to start one."""
    grid, seen = sequences.grid(causal)

    def tile(x: Tensor) -> Tensor:  # (1, H, T, D) -> (N, H, C, D)
        spread = grid.pad(_every_head(x, query)[0].transpose(0, 1))
        return spread.view(grid.count, grid.longest, *spread.shape[1:]).transpose(1, 2)

    y_NHCD = nn.functional.scaled_dot_product_attention(
        tile(query), tile(key), tile(value), attn_mask=seen, scale=scale
    )
    return grid.unpad(y_NHCD.transpose(1, 2).flatten(0, 1))[None]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences, causal: bool, scale: float
) -> Tensor:
    """The kernel made for it: flash attention by cumulative lengths."""
    from torch.nn.attention.varlen import varlen_attn

    q_THD, k_THD, v_THD = (
        t[0].transpose(0, 1).contiguous() for t in (query, _every_head(key, query), _every_head(value, query))
    )
    window = (-1, 0) if causal else (-1, -1)
    ends, longest = sequences.ends(), sequences.longest
    y_THD: Any = varlen_attn(q_THD, k_THD, v_THD, ends, ends, longest, longest, scale=scale, window_size=window)
    return y_THD[None]


def _flash_takes(query: Tensor) -> bool:
    """16 bits, heads of a width that it knows, and a GPU from Ampere on."""
    if query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] % 8 or query.shape[-1] > 256:
        return False
    return query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) >= (8, 0)


def _every_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values shared by groups of heads, once for every head."""
    shared = query.shape[1] // x.shape[1]
    return x if shared == 1 else x.repeat_interleave(shared, dim=1)


def _owners(tile: Sequence[int]) -> Tensor:
    """Which of the tile's texts each of its tokens belongs to."""
    return torch.repeat_interleave(torch.tensor(tile))


def _tiles(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Neighbouring texts together, up to so many tokens; a longer text alone."""
    tiles: list[list[int]] = []
    left = 0
    for length in lengths:
        if length > left or length > room:
            tiles.append([])
            left = room
        tiles[-1].append(length)
        left -= length
    return tiles
