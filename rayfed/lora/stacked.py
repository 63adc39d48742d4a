"""Stacked layers: the adapters and heads of K clients over one frozen model, in one forward pass.

The rows of a batch belong to clients in consecutive segments, and each segment passes through its own client's factors.
Rows lie one below the other in the first dimension, padded to one length, or their tokens lie end to end without any
padding (`rayfed.tasks.flat`); a layer tells which from the shape. K = 1 is a pack of one: there is no second path.
Ranks may differ; shorter pairs are padded with zeros on both sides, where gradients are zero, so it stays zero.

Shape suffixes: K slots of the pack, R largest rank, I layer input, O layer output, T tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from rayfed.lora.adapter import LowRank
from rayfed.lora.kernel import Piece, change


@dataclass
class Segment:
    """Consecutive rows of the batch that belong to one slot.

    `rng` draws its dropout (None: no dropout). `lengths` are its rows' tokens: in a padded batch nothing is drawn for
    what lies behind the longest of them (None: no position is padding); without padding they say where a row ends.
    """

    slot: int
    rows: int
    rng: torch.Generator | None = None
    lengths: Sequence[int] | None = None

    @cached_property
    def longest(self) -> int | None:
        return max(self.lengths) if self.lengths is not None else None

    @cached_property
    def tokens(self) -> int:
        """Tokens of all rows; one each where they have no lengths."""
        return sum(self.lengths) if self.lengths is not None else self.rows


@dataclass
class Batch:
    """Who owns the rows of the batch now passing through the model; shared by all stacked layers of a model."""

    segments: Sequence[Segment] = field(default_factory=list)

    @contextmanager
    def of(self, segments: Sequence[Segment]) -> Iterator[None]:
        self.segments = segments
        try:
            yield
        finally:
            self.segments = []

    def split(self, x: Tensor) -> list[tuple[Segment, Tensor]]:
        """The segments with their part of x: its rows (rows, ..., I), or its tokens (tokens, I) if they lie end to end.

        Fails where rows are not what the segments announced.
        """
        rows = sum(s.rows for s in self.segments)
        if x.shape[0] == rows:  # padded, or one vector a row
            return list(zip(self.segments, x.split([s.rows for s in self.segments]), strict=True))
        x_TI = x.reshape(-1, x.shape[-1])
        tokens = sum(s.tokens for s in self.segments)
        if len(x_TI) != tokens or x.shape[0] not in (1, tokens):
            raise ValueError(
                f"the batch has {x.shape[0]} rows, its segments {rows} of {tokens} tokens: rows stay whole and in order"
            )
        return list(zip(self.segments, x_TI.split([s.tokens for s in self.segments]), strict=True))


class StackedLora(nn.Module):
    """A frozen linear layer plus, for each slot, ``scale * B A`` of its input and a frozen change of the base."""

    def __init__(self, base: nn.Module, batch: Batch, slots: int, rank: int, dropout: float) -> None:
        super().__init__()
        outer, inner = layer_shape(base)
        device = next(base.parameters()).device
        self.base, self.batch, self.dropout = base, batch, dropout
        self.A_KRI = nn.Parameter(torch.zeros(slots, rank, inner, device=device))
        self.B_KOR = nn.Parameter(torch.zeros(slots, outer, rank, device=device))
        self.R_KRR: nn.Parameter | None = None  # the core between B and A, where a method has one
        self.scales = [0.0] * slots
        self.frozen: list[LowRank | Tensor | None] = [None] * slots

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        pieces, inputs, start = [], [], 0
        for segment, rows in self.batch.split(x):
            k, stop = segment.slot, start + len(rows)
            pieces.append(Piece(k, start, stop, self.scales[k], self.frozen[k]))
            inputs.append(_dropped(rows, self.dropout, segment) if self._drops(segment) else rows)
            start = stop
        u = torch.cat(inputs) if any(map(self._drops, self.batch.segments)) else x
        B_KOR = self.B_KOR if self.R_KRR is None else self.B_KOR @ self.R_KRR
        return change(y, x, u, self.A_KRI, B_KOR, pieces)

    def _drops(self, segment: Segment) -> bool:
        return self.dropout > 0 and segment.rng is not None

    def fit(self, slots: int, rank: int, core: bool = False) -> None:
        """Room for exactly so many pairs of at most this rank, with a core or without; empty where that is new."""
        *held, inner = self.A_KRI.shape
        if [slots, rank] != held or core != (self.R_KRR is not None):
            self.R_KRR = nn.Parameter(self.A_KRI.new_zeros(slots, rank, rank)) if core else None
            self.A_KRI = nn.Parameter(self.A_KRI.new_zeros(slots, rank, inner))
            self.B_KOR = nn.Parameter(self.B_KOR.new_zeros(slots, self.B_KOR.shape[1], rank))
            self.scales = [0.0] * slots
            self.frozen = [None] * slots

    @torch.no_grad()
    def load(self, slot: int, pair: LowRank | None, frozen: LowRank | Tensor | None = None) -> None:
        """Puts a pair, and a frozen change of the base beneath it, into a slot; None: no change."""
        self.A_KRI[slot].zero_()
        self.B_KOR[slot].zero_()
        device = self.A_KRI.device
        if isinstance(frozen, LowRank):
            frozen = LowRank(frozen.B.to(device), frozen.A.to(device), frozen.scale)
        self.frozen[slot] = frozen.to(device) if isinstance(frozen, Tensor) else frozen
        if pair is None:
            self.scales[slot] = 0.0
            return
        if pair.rank > self.A_KRI.shape[1]:
            raise ValueError(f"rank {pair.rank} does not fit a stack of rank {self.A_KRI.shape[1]}")
        if self.R_KRR is not None:
            self.R_KRR[slot].zero_()
            if pair.R is not None:
                self.R_KRR[slot][: pair.rank, : pair.rank] = pair.R
        elif pair.R is not None:
            raise ValueError("a pair with a core does not fit a stack without one")
        self.A_KRI[slot][: pair.rank] = pair.A
        self.B_KOR[slot][:, : pair.rank] = pair.B
        self.scales[slot] = pair.scale


class StackedLinear(nn.Module):
    """A linear layer of the head that every slot trains in full."""

    def __init__(self, layer: nn.Linear, batch: Batch, slots: int) -> None:
        super().__init__()
        self.batch = batch
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight_KOI = nn.Parameter(layer.weight.detach().float().repeat(slots, 1, 1))
        bias = layer.bias
        self.bias_KO = nn.Parameter(bias.detach().float().repeat(slots, 1)) if bias is not None else None

    def fit(self, slots: int) -> None:
        """Room for exactly so many clients; empty where that is new."""
        if slots != len(self.weight_KOI):
            self.weight_KOI = nn.Parameter(self.weight_KOI.new_zeros(slots, *self.weight_KOI.shape[1:]))
            if self.bias_KO is not None:
                self.bias_KO = nn.Parameter(self.bias_KO.new_zeros(slots, *self.bias_KO.shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for segment, rows in self.batch.split(x):
            bias = self.bias_KO[segment.slot] if self.bias_KO is not None else None
            outputs.append(nn.functional.linear(rows.to(self.weight_KOI.dtype), self.weight_KOI[segment.slot], bias))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of an nn.Linear or a transformers Conv1D; TypeError for anything else."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if is_conv1d(layer):
        inner, outer = layer.weight.shape  # type: ignore[misc]
        return outer, inner
    raise TypeError(f"{type(layer).__name__} is neither nn.Linear nor Conv1D")


def is_conv1d(layer: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer whose weight is stored (in, out). Told by name: no transformers here."""
    return type(layer).__name__ == "Conv1D" and getattr(layer, "weight", torch.empty(0)).ndim == 2


def _dropped(rows: Tensor, rate: float, segment: Segment) -> Tensor:
    """Inverted dropout with the segment's own generator and shape, so that neighbours in the pack change nothing."""
    keep = torch.ones(rows.shape, dtype=torch.bool)
    own = keep[:, : segment.longest] if rows.ndim > 2 else keep  # (rows, tokens, I), or no padding: (_, I)
    own.copy_(torch.rand(own.shape, generator=segment.rng) >= rate)
    return rows * keep.to(rows.device) / (1 - rate)
