"""Fed-TaLoRA (Yu, Hu and Min, arXiv 2505.12318): FedEx's residual, for clients that meet new classes task after task.

Its abstract names one shared adapter for all tasks, a residual that corrects the mean, and a choice of adapted layers.
Nothing that is known of its rounds differs from `FedExLoRA`:

    B <- sum_k p_k B_k,   A <- sum_k p_k A_k,   W <- W + (mean of products - product of means)

so the class is FedEx's, and a run the same bit for bit. Nothing names a task, or is reset or grown where one ends. What
makes a run class-incremental is the order in which clients meet their data, which no method decides; which layers are
adapted is a setting of the model. The paper's own text was not at hand: how it sends the residual may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayfed.methods.fedex_lora import FedExLoRA


@dataclass(frozen=True)
class FedTaLoRA(FedExLoRA):
    """One adapter for all tasks: average the factors and merge the residual into the base. FedEx's option."""
