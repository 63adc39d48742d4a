"""What dense references share: a PEFT model that trains from flat vectors, masks in plain Python, and the runs.

A reference shares with rayfed only what a paper's equations leave open: who is drawn, in which order a client sees its
rows, and the start values. It trains a PEFT model with torch's own optimizers, one client at a time, and keeps the
global model as a plain vector.
"""

from __future__ import annotations

import torch
from peft import get_peft_model

import rayfed
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.peft import lora_config
from rayfed.server.checkpoint import restore
from rayfed.tasks.models.base import load_base

ROUNDS = 5


def top(values: torch.Tensor, k: int) -> torch.Tensor:
    """1 where an entry is among the k largest magnitudes, the lower index winning ties; sorted in plain Python."""
    order = sorted(range(len(values)), key=lambda i: (-abs(float(values[i])), i))
    mask = torch.zeros(len(values), dtype=values.dtype)
    mask[order[:k]] = 1.0
    return mask


def sgd(model, parameters, start, steps, federation, settings, trained=None) -> torch.Tensor:
    """The flat vector after local SGD from ``start`` (n,); where ``trained`` (n,) is 0, gradients are set to 0."""
    sizes = [parameter.numel() for parameter in parameters]
    with torch.no_grad():
        for parameter, values in zip(parameters, start.split(sizes), strict=True):
            parameter.copy_(values.view_as(parameter))
    optimizer = torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum)
    for rows in steps:
        batch = federation.train.batch(rows, padded=True)
        labels = batch.pop("labels")
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
        for parameter, mask in zip(parameters, trained.split(sizes) if trained is not None else ()):
            parameter.grad *= mask.view_as(parameter)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in parameters])


class PeftClient:
    """A PEFT model whose trainable parameters can be set from, and read as, the flat vector."""

    def __init__(self, experiment, plan, start, dtype=torch.float32):
        base = load_base(experiment.model, len(plan.federation.classes), experiment.seed)
        self.model = get_peft_model(
            base.model, lora_config(**experiment.lora.model_dump(exclude={"train", "compute"}), head=base.head)
        ).eval()
        self.model.to(dtype)
        named = dict(self.model.named_parameters())
        self.parameters = []
        for entry in start.layout.entries:
            prefix = f"base_model.model.{entry.name}"
            if entry.part == "head":
                module, _, kind = prefix.rpartition(".")
                self.parameters.append(named[f"{module}.modules_to_save.default.{kind}"])
            else:
                self.parameters.append(named[f"{prefix}.lora_{entry.part}.default.weight"])

    def train(self, start, steps, federation, settings, trained=None):
        return sgd(self.model, self.parameters, start, steps, federation, settings, trained)


def random_start(adapter: Adapter) -> Adapter:
    """B = 0 would leave A's first changes at rounding level, and a comparison of them would say nothing."""
    draw = torch.Generator().manual_seed(7)
    layers = {
        name: LowRank(0.1 * torch.randn(pair.B.shape, generator=draw), pair.A, pair.scale)
        for name, pair in sorted(adapter.layers.items())
    }
    return Adapter(layers, adapter.head)


def run(experiment, out) -> dict[str, torch.Tensor]:
    """The tensors of the method's state after the run."""
    rayfed.run(experiment, out=out)
    found, _ = restore(out, experiment.digest())
    assert found is not None
    assert found.checkpoint.round == ROUNDS
    return found.method
