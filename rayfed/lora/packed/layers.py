"""Stacked layers: the adapters and heads of K clients over one frozen model, in one forward pass.

Each client has a slot. Each segment of the batch (`rayfed.lora.packed.segments`) passes through the factors of its own
slot. One client alone is a stack of one slot, so there is one code path. Ranks may differ: shorter pairs are padded
with zeros in both factors. The gradients of this padding are zero, so it stays zero.

Shape suffixes: K slots, C entries of the longest segment, R largest rank, I layer input, O layer output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayfed.device import to_device
from rayfed.lora.packed.dropout import feature_keys, hash_dropout
from rayfed.lora.packed.kernel import SlotConstants, add_lora_, add_projected_, project
from rayfed.lora.packed.segments import Batch, Segments
from rayfed.lora.peft import layer_shape


class StackedLora(nn.Module):
    """A frozen linear layer plus, for each slot, ``scale * B A`` and a frozen base change.

    Input (rows, ..., I), output (rows, ..., O), or tokens in place of rows. The stack sets the factors: ``A_KRI``,
    ``B_KOR`` and, where a method has a core between them, ``R_KRR``. Products are computed in A's format. ``name`` is
    the layer's name, from which dropout derives its feature keys.
    """

    A_KRI: Tensor
    B_KOR: Tensor
    R_KRR: Tensor | None = None
    same_input: SameInput | None = None

    def __init__(self, base: nn.Module, batch: Batch, dropout: float = 0.0, name: str = "") -> None:
        super().__init__()
        self.shape = layer_shape(base)
        self.base, self.batch, self.dropout = base, batch, dropout
        self.constants = SlotConstants([], [])
        device = next(base.parameters()).device
        self.features_I = to_device(feature_keys(name, self.shape[1]), device) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        segments = self.batch.segments_of(x, self.A_KRI.dtype)
        keys = segments.dropout_keys(x.shape[:-1]) if self.features_I is not None else None
        u = x if keys is None or self.features_I is None else hash_dropout(x, self.dropout, keys, self.features_I)
        B_KOR = (self.B_KOR if self.R_KRR is None else self.B_KOR @ self.R_KRR).to(self.A_KRI.dtype)
        if self.same_input is not None:
            return add_projected_(y, self.same_input.project(self, x, segments), B_KOR, segments)
        return add_lora_(y, x, u, self.A_KRI, B_KOR, segments, self.constants)


@dataclass(frozen=True)
class SameInput:
    """Layers that read one input, such as query, key and value: their products with A are one.

    Layers that turn out to read other inputs compute the right values, but those of the others, too.
    """

    layers: Sequence[StackedLora]

    def project(self, layer: StackedLora, x: Tensor, segments: Segments) -> Tensor:
        """The part of ``layer`` of the product, which is computed once for ``x``."""
        known = segments.projections.get(id(self))
        if known is None or known[0] is not x or known[1] != x._version:
            known = x, x._version, project(x, [other.A_KRI for other in self.layers], segments)
            segments.projections[id(self)] = known
        return known[2][self.layers.index(layer)]


class StackedLinear(nn.Module):
    """A linear layer of the head that every slot trains in full.

    Input (rows, ..., I), output (rows, ..., O), or tokens in place of rows. The stack sets the weights ``weight_KOI``
    and, where the layer has a bias, ``bias_KO``.
    """

    weight_KOI: Tensor
    bias_KO: Tensor | None = None

    def __init__(self, layer: nn.Linear, batch: Batch) -> None:
        super().__init__()
        self.batch, self.has_bias = batch, layer.bias is not None
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x, self.batch.segments_of(x))

    def outputs(self, x: Tensor, segments: Segments) -> Tensor:
        """The outputs for ``x``, whose segments need not be those of the batch."""
        x = x.to(self.weight_KOI.dtype)
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
