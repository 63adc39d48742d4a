"""Attention over concatenated texts: every token attends to its own text only.

`varlen_attention` is registered with transformers, whose models then call it. It takes the ends of the texts from the
`PackedSequences` in use. On a CPU the texts are grouped into tiles of up to 64 tokens, each with a block-diagonal mask.
One product per text would spend its time on overhead, and one padded batch would compute mostly padding. A tile never
has texts of two clients: a masked entry has the weight 0, and 0 times the NaN of a diverged client is NaN.

Shape suffixes: H heads, T tokens of the batch, D width of a head, N tiles, C tokens of a tile (of the largest, if
tiles are padded).
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
from rayfed.tasks.models.block_attention import WIDTH, BlockLayout, block_attention, block_layout

NAME = "rayfed_varlen"  # of `varlen_attention` in transformers; no mask function has this name, so no mask is made
TILE = 64  # tokens; a longer text is a tile of its own
LONG = 128  # tokens; with a longer text, saving the scores costs more memory than it is worth
HALF = (torch.bfloat16, torch.float16)
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # arguments for other variants of attention

_in_use: ContextVar[PackedSequences | None] = ContextVar("packed_sequences", default=None)


class PackedSequences:
    """The lengths of a batch's concatenated texts, and the tiles, masks and indices that attention needs.

    They are made once per batch, and every layer uses them.
    """

    def __init__(self, clients: Sequence[Sequence[int]], device: torch.device) -> None:
        """``clients``: for each client in the batch, the number of tokens of each of its texts."""
        self.device = device
        self.lengths = [length for lengths in clients for length in lengths]
        self.longest = max(self.lengths)
        self._clients = clients
        # Elsewhere than on a CPU all tiles are padded to the longest, so they may have the length of the longest text.
        room = TILE if device.type == "cpu" else max(TILE, self.longest)
        self.tiles = [tile for lengths in clients for tile in _tiles(lengths, room)]
        self.sizes = [sum(tile) for tile in self.tiles]
        self._cache: dict[Any, Any] = {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """`varlen_attention` uses these sequences inside the `with` block."""
        token = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(token)

    def masks(self, causal: bool, dtype: torch.dtype) -> list[Tensor | None]:
        """For each tile the mask (C, C) to add to its scores: -inf where a token may not attend, otherwise 0.

        None if every token may attend to all tokens, and for a long causal text, which `_attention_by_tile` masks.
        """
        return self._cached((causal, dtype), lambda: [self._mask(tile, causal, dtype) for tile in self.tiles])

    def offsets(self) -> Tensor:
        """(texts + 1,) int32: text i has the tokens from offset i to offset i + 1; from 0 to T."""
        sizes = torch.tensor([0, *self.lengths], dtype=torch.int32)
        return self._cached("offsets", lambda: to_device(sizes.cumsum(0, dtype=torch.int32), self.device))

    def texts(self) -> RaggedIndex:
        """The index that pads the texts."""
        index: RaggedIndex = self._cached("texts", lambda: RaggedIndex(self.lengths, self.device))
        return index

    def blocks(self, heads: int, causal: bool, dtype: torch.dtype) -> BlockLayout:
        """The layout of attention in blocks."""

        def make() -> BlockLayout:
            tiles = [tile for lengths in self._clients for tile in _tiles(lengths, WIDTH)]
            return block_layout(tiles, heads, causal, dtype)

        layout: BlockLayout = self._cached(("blocks", heads, causal, dtype), make)
        return layout

    def padded_tiles(self, causal: bool) -> tuple[RaggedIndex, Tensor]:
        """The index that pads the tiles, and their mask (N, 1, C, C), True where a token may attend.

        Padding attends to padding, so no row of the mask is all False.
        """
        index = self._cached("tiles", lambda: RaggedIndex(self.sizes, self.device))
        return index, self._cached(("tile mask", causal), lambda: to_device(self._padded_mask(causal), self.device))

    def _padded_mask(self, causal: bool) -> Tensor:
        width = max(self.sizes)
        texts = torch.stack([
            torch.cat([_text_of_token(tile), torch.full((width - size,), len(tile))])
            for tile, size in zip(self.tiles, self.sizes)
        ])  # fmt: skip
        mask = texts[:, None, :, None] == texts[:, None, None, :]
        return mask & torch.ones(width, width, dtype=torch.bool).tril() if causal else mask

    def _mask(self, tile: Sequence[int], causal: bool, dtype: torch.dtype) -> Tensor | None:
        if len(tile) == 1 and (not causal or tile[0] > LONG):
            return None
        texts = _text_of_token(tile)
        hidden = texts[:, None] != texts
        if causal:
            hidden |= torch.ones_like(hidden).triu(1)
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)

    def _cached(self, key: Any, make: Any) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function for transformers: query (1, H, T, D), key and value (1, H or fewer, T, D).

    Returns (1, T, H, D), and None for the attention weights. Raises ValueError for a variant of attention that it does
    not compute; such a model needs padding, see `rayfed.tasks.models.unpadded`.
    """
    sequences = _in_use.get()
    if sequences is None or len(query) != 1 or not query.shape[2] == key.shape[2] == sum(sequences.lengths):
        raise ValueError("attention without padding needs the lengths of the batch in use")
    if attention_mask is not None or dropout or any(kwargs.get(name) is not None for name in UNSUPPORTED):
        raise ValueError("attention without padding supports no other mask, dropout, bias or cap")
    window = kwargs.get("sliding_window")
    if window is not None and window < sequences.longest:
        raise ValueError(f"a text of {sequences.longest} tokens is longer than the window of {window}")
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", False) if causal is None else causal)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if query.device.type == "cpu":
        key, value = _repeat_heads(key, query), _repeat_heads(value, query)
        if sequences.longest > LONG:
            return _attention_by_tile(query, key, value, sequences, causal, scale), None
        if query.dtype in HALF:
            layout = sequences.blocks(query.shape[1], causal, query.dtype)
            return block_attention(query, key, value, layout, scale), None
        masks = sequences.masks(causal, query.dtype)
        return _TiledAttention.apply(query, key, value, sequences.sizes, masks, scale), None
    if _flash_supports(query):
        return _flash_attention(query, key, value, sequences, causal, scale), None
    return _padded_attention(query, key, value, sequences, causal, scale), None


class _TiledAttention(torch.autograd.Function):
    """Attention of short texts, tile by tile, with less overhead per call than torch's own function.

    It saves the attention weights for the gradient: H times the size of the tile per token, so texts must be short. It
    writes results and gradients directly into the model's layout (T, H, D).
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


def _attention_by_tile(
    query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences, causal: bool, scale: float
) -> Tensor:
    """One call of torch's function per tile. It saves no scores, so texts may be long.

    In float32: torch's 16-bit function is slower on a CPU.
    """
    dtype = query.dtype
    query, key, value = (t.float() if t.dtype in HALF else t for t in (query, key, value))
    tiles = zip(*(t.split(sequences.sizes, dim=2) for t in (query, key, value)), sequences.masks(causal, query.dtype))
    parts = [
        nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale
        ).transpose(1, 2)
        for q, k, v, mask in tiles
    ]
    return torch.cat(parts, dim=1).to(dtype)


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences, causal: bool, scale: float
) -> Tensor:
    """All tiles in one call, padded to the largest: few kernel launches, for a GPU."""
    index, mask = sequences.padded_tiles(causal)

    def pad(x: Tensor) -> Tensor:  # (1, H, T, D) -> (N, H, C, D)
        padded = index.pad(_repeat_heads(x, query).squeeze(0).transpose(0, 1))
        return padded.view(index.count, index.longest, *padded.shape[1:]).transpose(1, 2)

    y_NHCD = nn.functional.scaled_dot_product_attention(pad(query), pad(key), pad(value), attn_mask=mask, scale=scale)
    return index.unpad(y_NHCD.transpose(1, 2).flatten(0, 1))[None]


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences, causal: bool, scale: float
) -> Tensor:
    """Flash attention over concatenated texts, given their offsets."""
    from torch.nn.attention.varlen import varlen_attn

    q_THD, k_THD, v_THD = (t.squeeze(0).transpose(0, 1).contiguous() for t in (query, key, value))
    offsets, longest = sequences.offsets(), sequences.longest
    y_THD: Any = varlen_attn(
        q_THD, k_THD, v_THD, offsets, offsets, longest, longest, scale=scale,
        window_size=(-1, 0) if causal else (-1, -1), enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    return y_THD[None]


def _flash_supports(query: Tensor) -> bool:
    """Whether flash attention supports it: 16 bits, heads of width 8, 16, ..., 256, and a GPU of Ampere or newer."""
    if query.dtype not in HALF or query.shape[-1] % 8 or query.shape[-1] > 256:
        return False
    return query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) >= (8, 0)


def _repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values that groups of heads share, repeated for every head of ``query``."""
    shared = query.shape[1] // x.shape[1]
    return x if shared == 1 else x.repeat_interleave(shared, dim=1)


def _text_of_token(tile: Sequence[int]) -> Tensor:
    """(C,): for each token of the tile the number of its text, from 0."""
    return torch.repeat_interleave(torch.tensor(tile))


def _tiles(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Groups neighbouring texts into tiles of up to ``room`` tokens. A longer text is a tile of its own."""
    tiles: list[list[int]] = []
    left = 0
    for length in lengths:
        if length > left or length > room:
            tiles.append([])
            left = room
        tiles[-1].append(length)
        left -= length
    return tiles
