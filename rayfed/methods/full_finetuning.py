"""Full fine-tuning (Kuo et al., arXiv 2406.05233): the baseline without low rank.

The state is the whole change W (out, in) of every adapted layer, and the head. Every client trains all of it:

    W <- advance(W, sum_k p_k (W_k - W)),   the head likewise             out in entries a layer travel, both ways

A client trains W in the form of an adapter (`rayfed.methods._full_matrices`), so its packs, densities and number
formats are those of every other method. `lora.rank` is only the rank of the exported adapter, which is the best
approximation of W. `lora.alpha` is not used. No options.

Source: authors' code read; deviates: the code trains every parameter of the model; here those of layers without LoRA,
embeddings, norms and biases stay frozen (`lora.target_modules=all-linear` adapts the most). The weight decay of the
server's AdamW pulls towards the pretrained weights, in the code towards zero. tests/methods/test_flasc_variants.py has
a dense reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter
from rayfed.methods import ANY_OPTIMIZER, LayerMethod, LayerState
from rayfed.methods._full_matrices import matrix_of, with_identity
from rayfed.methods.base import Advance, Profile, Start, Trainable, Updates, fedavg, mean_change


class FullFinetuning(LayerMethod):
    """The mean of dense changes of the adapted weights. No options."""

    paper = "arXiv 2406.05233"
    summary = "dense changes of the adapted weights; no low rank"
    traffic_down = traffic_up = "in out"
    source = "authors' code read"
    weights = "uniform"
    optimizer = "adamw"
    optimizers = ANY_OPTIMIZER
    fixed_gauge = True
    sum_in_worker = True
    secure_aggregation = True
    summed = "changes"

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        layers = {name: pair.dense().float() for name, pair in adapter.layers.items()}
        return LayerState(layers=layers, head=dict(adapter.head))

    def broadcast(self, state: LayerState, client: Profile) -> Start:
        return Start.of(_adapter(state), known=~_in_W(state))

    def trainable(self, state: LayerState, client: Profile) -> Trainable:
        return Trainable(entries=_in_W(state))

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        layout = _adapter(state).layout
        change = layout.unflatten(mean_change(updates, layout.size))
        layers = {name: advance(f"W.{name}", W, matrix_of(change.layers[name])) for name, W in state.matrices.items()}
        return state.next_with_head(advance, change.head, layers=layers)


def _adapter(state: LayerState) -> Adapter:
    """The state in the form that clients train."""
    return Adapter({name: with_identity(W) for name, W in state.matrices.items()}, state.head)


def _in_W(state: LayerState) -> Tensor:
    """Boolean (n,): the entries of every W and of the head, which train and travel."""
    marks = {name: with_identity(torch.ones_like(W), 0.0) for name, W in state.matrices.items()}
    return Adapter(marks, {name: torch.ones_like(tensor) for name, tensor in state.head.items()}).flatten().bool()
