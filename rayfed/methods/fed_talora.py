"""Fed-TaLoRA (Yu, Hu and Min, arXiv 2505.12318): FedEx-LoRA's residual, for clients that meet new classes over time.

    B <- sum_k p_k B_k,   A <- sum_k p_k A_k,   W <- W + (mean of products - product of means)

The abstract names one shared adapter for all tasks, a residual that corrects the mean, and a choice of adapted layers.
No part of a round is known to differ from `FedExLoRA`. So the class is FedEx-LoRA's, and a run is the same bit for bit.
The sequence of tasks is the order in which clients meet their data, and no method decides that. The adapted layers are
a setting of the model.

Source: abstract only; deviates: how the paper sends the residual and treats the head at a new task is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayfed.methods.fedex_lora import FedExLoRA


@dataclass(frozen=True)
class FedTaLoRA(FedExLoRA):
    """One adapter for all tasks: average the factors and merge the residual into the base."""

    paper = "arXiv 2505.12318"
    summary = "FedEx-LoRA's residual, for sequences of tasks"
    source = "abstract only"
