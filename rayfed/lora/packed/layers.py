"""Stacked layers: the adapters and heads of K clients over one frozen model, in one forward pass.

Each client has a slot. Each segment of the batch (`rayfed.lora.packed.segments`) passes through the factors of its own
slot. One client alone is a stack of one slot, so there is one code path. Ranks may differ: shorter pairs are padded
with zeros in both factors. The gradients of this padding are zero, so it stays zero.

Shape suffixes: K slots, C entries of the longest segment, R largest rank, I layer input, O layer output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rayfed.device import to_device
from rayfed.lora.adapter import LowRank
from rayfed.lora.packed.dropout import feature_keys, hash_dropout
from rayfed.lora.packed.kernel import SlotConstants, add_lora_
from rayfed.lora.packed.segments import Batch
from rayfed.lora.peft import layer_shape


class StackedLora(nn.Module):
    """A frozen linear layer plus, for each slot, ``scale * B A`` and a frozen base change.

    Input (rows, ..., I), output (rows, ..., O), or tokens in place of rows. There are no slots before the first `load`.
    ``name`` is the layer's name, from which dropout derives its feature keys. ``compute`` is the format of the operands
    in products with the factors, which stay float32 themselves; None: that of the factors.
    """

    def __init__(
        self, base: nn.Module, batch: Batch, dropout: float = 0.0, name: str = "", compute: torch.dtype | None = None
    ) -> None:
        super().__init__()
        outer, inner = layer_shape(base)
        self.device = next(base.parameters()).device
        self.base, self.batch, self.dropout, self.compute = base, batch, dropout, compute
        self.A_KRI = nn.Parameter(torch.zeros(0, 1, inner))
        self.B_KOR = nn.Parameter(torch.zeros(0, outer, 1))
        self.R_KRR: nn.Parameter | None = None  # the core between B and A, where a method has one
        self.constants = SlotConstants([], [])
        self.features_I = to_device(feature_keys(name, inner), self.device) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        segments = self.batch.segments_of(x, self.compute)
        keys = segments.dropout_keys(x.shape[:-1]) if self.features_I is not None else None
        u = x if keys is None or self.features_I is None else hash_dropout(x, self.dropout, keys, self.features_I)
        B_KOR = self.B_KOR if self.R_KRR is None else self.B_KOR @ self.R_KRR
        return add_lora_(y, x, u, self.A_KRI, B_KOR, segments, self.constants)

    @torch.no_grad()
    def load(self, pairs: Sequence[LowRank | None], base_changes: Sequence[LowRank | Tensor | None] = ()) -> None:
        """Replaces all slots: one for every pair, B (O, r) and A (r, I), at the largest of their ranks.

        None as a pair is a slot without a LoRA term. ``base_changes`` has the frozen base change (O, I) of every slot,
        or is empty. Either all pairs have a core or none has. Memory and bits depend on these arguments alone.
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
        cores = any(pair is not None and pair.R is not None for pair in pairs)
        self.A_KRI, self.B_KOR = (nn.Parameter(to_device(t, self.device)) for t in (A_KRI, B_KOR))
        self.R_KRR = nn.Parameter(to_device(R_KRR, self.device)) if cores else None
        # By identity: slots that share a base change share its copy on the device.
        copies = {id(change): self._on_device(change) for change in {id(c): c for c in base_changes}.values()}
        on_device = [copies[id(change)] for change in base_changes] or [None] * slots
        self.constants = SlotConstants([0.0 if pair is None else pair.scale for pair in pairs], on_device, self.compute)

    def _on_device(self, change: LowRank | Tensor | None) -> LowRank | Tensor | None:
        def move(tensor: Tensor) -> Tensor:
            return to_device(tensor.to(self.compute or tensor.dtype), self.device)

        if isinstance(change, LowRank):
            return LowRank(move(change.B), move(change.A), change.scale)
        return None if change is None else move(change)


class StackedLinear(nn.Module):
    """A linear layer of the head that every slot trains in full.

    Input (rows, ..., I), output (rows, ..., O), or tokens in place of rows. Before the first `load` there is one slot
    with the layer's own values.
    """

    def __init__(self, layer: nn.Linear, batch: Batch) -> None:
        super().__init__()
        self.batch = batch
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.device = layer.weight.device
        self.weight_KOI = nn.Parameter(layer.weight.detach().float()[None])
        self.bias_KO = nn.Parameter(layer.bias.detach().float()[None]) if layer.bias is not None else None

    @torch.no_grad()
    def load(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> None:
        """Replaces all slots: one for every weight (O, I), with its bias (O,) where the layer has one."""
        self.weight_KOI = nn.Parameter(to_device(torch.stack(list(weights)).to(self.weight_KOI.dtype), self.device))
        if self.bias_KO is not None:
            self.bias_KO = nn.Parameter(to_device(torch.stack(list(biases)).to(self.bias_KO.dtype), self.device))

    def forward(self, x: Tensor) -> Tensor:
        segments, x = self.batch.segments_of(x), x.to(self.weight_KOI.dtype)
        if segments.batched:
            y_KCO = torch.bmm(segments.pad(x.reshape(-1, x.shape[-1])), segments.select(self.weight_KOI).mT)
            if self.bias_KO is not None:
                y_KCO = y_KCO + segments.select(self.bias_KO)[:, None]
            y = segments.unpad(y_KCO)
        else:
            biases = [None] * len(self.weight_KOI) if self.bias_KO is None else list(self.bias_KO)
            parts = zip(segments.slots, segments.split(x))
            y = torch.cat([nn.functional.linear(part, self.weight_KOI[k], biases[k]) for k, part in parts])
        return y.view(*x.shape[:-1], self.out_features)
