"""Stacked layers: the adapters and heads of K clients over one frozen model, in one forward pass.

The rows of a batch belong to clients in consecutive runs (`rayfed.lora.packed.segments`), and each run passes through its own
client's factors. K = 1 is a pack of one: there is no second path. Ranks may differ; shorter pairs are padded with zeros
on both sides, where gradients are zero, so it stays zero.

Shape suffixes: K slots of the pack, R largest rank, I layer input, O layer output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rayfed.device import to_device
from rayfed.lora.adapter import LowRank
from rayfed.lora.packed.dropout import dropped, feature_keys
from rayfed.lora.packed.kernel import Fixed, change
from rayfed.lora.packed.segments import Batch


class StackedLora(nn.Module):
    """A frozen linear layer plus, for each slot, ``scale * B A`` of its input and a frozen change of the base.

    Its slots are those last loaded; there are none before. ``name`` keys its dropout.
    """

    def __init__(self, base: nn.Module, batch: Batch, dropout: float = 0.0, name: str = "") -> None:
        super().__init__()
        outer, inner = layer_shape(base)
        self.device = next(base.parameters()).device
        self.base, self.batch, self.dropout = base, batch, dropout
        self.A_KRI = nn.Parameter(torch.zeros(0, 1, inner))
        self.B_KOR = nn.Parameter(torch.zeros(0, outer, 1))
        self.R_KRR: nn.Parameter | None = None  # the core between B and A, where a method has one
        self.fixed = Fixed([], [])
        self.features_I = to_device(feature_keys(name, inner), self.device) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        runs = self.batch.segments_of(x)
        keys = runs.keys(x.shape[:-1]) if self.features_I is not None else None
        u = x if keys is None or self.features_I is None else dropped(x, self.dropout, keys, self.features_I)
        B_KOR = self.B_KOR if self.R_KRR is None else self.B_KOR @ self.R_KRR
        return change(y, x, u, self.A_KRI, B_KOR, runs, self.fixed)

    @torch.no_grad()
    def load(self, pairs: Sequence[LowRank | None], frozen: Sequence[LowRank | Tensor | None] = ()) -> None:
        """Makes a slot for every pair (None: no change), as wide as the widest of them; what was there before is gone.

        ``frozen`` holds the frozen change of the base beneath each pair, or nothing. Bits and memory follow what is
        loaded alone.
        """
        slots, rank = len(pairs), max((pair.rank for pair in pairs if pair is not None), default=1)
        A_KRI = torch.zeros(slots, rank, self.A_KRI.shape[2], dtype=self.A_KRI.dtype)
        B_KOR = torch.zeros(slots, self.B_KOR.shape[1], rank, dtype=self.B_KOR.dtype)
        R_KRR = torch.zeros(slots, rank, rank, dtype=self.A_KRI.dtype)
        for k, pair in enumerate(pairs):
            if pair is not None:
                A_KRI[k, : pair.rank], B_KOR[k, :, : pair.rank] = pair.A, pair.B
                if pair.R is not None:
                    R_KRR[k, : pair.rank, : pair.rank] = pair.R
        cores = {pair.R is not None for pair in pairs if pair is not None}
        if len(cores) > 1:
            raise ValueError("pairs with a core and pairs without one do not fit into one stack")
        self.A_KRI, self.B_KOR = (nn.Parameter(to_device(t, self.device)) for t in (A_KRI, B_KOR))
        self.R_KRR = nn.Parameter(to_device(R_KRR, self.device)) if True in cores else None
        there: dict[int, LowRank | Tensor | None] = {}  # clients that share a change share it on the device, too
        for below in frozen:
            if id(below) not in there:
                there[id(below)] = self._there(below)
        beneath = [there[id(below)] for below in frozen] or [None] * slots
        self.fixed = Fixed([0.0 if pair is None else pair.scale for pair in pairs], beneath)

    def _there(self, frozen: LowRank | Tensor | None) -> LowRank | Tensor | None:
        if isinstance(frozen, LowRank):
            return LowRank(to_device(frozen.B, self.device), to_device(frozen.A, self.device), frozen.scale)
        return None if frozen is None else to_device(frozen, self.device)


class StackedLinear(nn.Module):
    """A linear layer of the head that every slot trains in full. Its slots are those last loaded."""

    def __init__(self, layer: nn.Linear, batch: Batch) -> None:
        super().__init__()
        self.batch = batch
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.device = layer.weight.device
        self.weight_KOI = nn.Parameter(layer.weight.detach().float()[None])
        self.bias_KO = nn.Parameter(layer.bias.detach().float()[None]) if layer.bias is not None else None

    @torch.no_grad()
    def load(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> None:
        """Makes a slot for every weight (out, in), with its bias (out,) where the layer has one."""
        self.weight_KOI = nn.Parameter(to_device(torch.stack(list(weights)).to(self.weight_KOI.dtype), self.device))
        if self.bias_KO is not None:
            self.bias_KO = nn.Parameter(to_device(torch.stack(list(biases)).to(self.bias_KO.dtype), self.device))

    def forward(self, x: Tensor) -> Tensor:
        runs, x = self.batch.segments_of(x), x.to(self.weight_KOI.dtype)
        if runs.batched:
            y_KCO = torch.bmm(runs.grid(x.reshape(-1, x.shape[-1])), runs.of(self.weight_KOI).mT)
            if self.bias_KO is not None:
                y_KCO = y_KCO + runs.of(self.bias_KO)[:, None]
            y = runs.row(y_KCO)
        else:
            biases = [None] * len(self.weight_KOI) if self.bias_KO is None else list(self.bias_KO)
            parts = zip(runs.slots, runs.each(x))
            y = torch.cat([nn.functional.linear(part, self.weight_KOI[k], biases[k]) for k, part in parts])
        return y.view(*x.shape[:-1], self.out_features)


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
