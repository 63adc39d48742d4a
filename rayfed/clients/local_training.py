"""Local training of a pack: K clients, each from its own start, on its own data, in shared forward and backward passes.

What holds for every client, whoever runs its pack: its batches are its own in its own order; its loss is the mean
over its own rows (losses are summed over clients, so no gradient is rescaled); its gradient is clipped by its own norm;
its dropout is keyed by itself and by its own tokens; and after its last step it is out of the batch and its result is
taken down at once, so moments and weight decay cannot move it any more. Entries that do not train keep the bits they
were decoded to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rayfed import seeding
from rayfed.config.training import Client
from rayfed.device import to_device
from rayfed.lora.adapter import Layout
from rayfed.lora.packed.segments import Segment
from rayfed.lora.packed.stack import Stack
from rayfed.methods.base import BaseChange
from rayfed.objectives import Objective, Plain


class Forward(Protocol):
    """The model: inputs of a batch in, logits out."""

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor: ...  # logits (rows, classes)


class Rows(Protocol):
    """Training rows as `Tokens` holds them: lengths (n,) and batches with `labels` among their tensors."""

    @property
    def lengths(self) -> np.ndarray: ...

    def batch(self, rows: np.ndarray, pad_id: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class PackMember:
    """One client of a pack: ``start`` (n,) as decoded, ``support`` (n,) which entries train, its training rows.

    ``base`` lies frozen under its adapter; ``rates`` are factors on the learning rate by part, equal in a pack.
    """

    client: int
    layout: Layout
    start: Tensor
    support: Tensor
    rows: np.ndarray
    base: BaseChange = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    objective: Objective = Plain()


@dataclass(frozen=True)
class TrainedClient:
    """One client's result: its entries (n,) after training, mean loss over steps, examples seen, steps done."""

    vector: Tensor
    loss: float
    examples: int
    steps: int


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device."""
    return {name: to_device(tensor, device) for name, tensor in batch.items()}


def train_pack(
    stack: Stack, forward: Forward, data: Rows, pad_id: int, members: Sequence[PackMember], settings: Client, *,
    lr: float, t: int, seed: int, device: torch.device,
) -> list[TrainedClient]:  # fmt: skip
    """Trains the members for one round ``t`` and returns their results in the order given.

    The stack gets as many slots as there are members. The result is a function of the arguments alone. On a GPU nothing
    here waits for it before the last step, and a step starts as many kernels for many members as for two.
    """
    plans = [batches(m.rows, settings, seed, t, m.client) for m in members]
    stack.load([m.layout.unflatten(m.start) for m in members], [m.base for m in members])
    parameters = _Parameters(stack, members)
    # A payload so sparse that nothing arrived can leave nothing to train: the clients then measure their loss only.
    optimizer = _optimizer(parameters.groups(lr), settings) if parameters.trained else None
    losses = torch.zeros(len(members), dtype=torch.float64, device=device)
    lengths = data.lengths
    for step in range(max(len(plan) for plan in plans)):
        active = [slot for slot, plan in enumerate(plans) if step < len(plan)]
        segments = [
            Segment(
                s,
                len(plans[s][step]),
                seeding.derive_seed(seed, "dropout", t, members[s].client, step) if stack.dropout else None,
                lengths[plans[s][step]].tolist(),
            )
            for s in active
        ]
        inputs = on_device(data.batch(np.concatenate([plans[s][step] for s in active]), pad_id), device)
        labels = inputs.pop("labels")
        with stack.batch.using(segments):
            each = row_losses(forward(inputs).float(), labels)
            runs = stack.batch.segments_of(each)
            means = runs.pad(each[:, None]).sum((1, 2)) / runs.counts(each)
            losses += runs.scatter(means.detach().double(), len(members))
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
                penalties = [members[s].objective.penalty(stack.factors(s)) for s in active]
                torch.stack([means.sum(), *(p for p in penalties if p is not None)]).sum().backward()
        if optimizer is not None:
            parameters.mask_gradients()
            if settings.clip_norm is not None:
                parameters.clip(settings.clip_norm)
            optimizer.step()
            parameters.restore()
        if ended := [slot for slot in active if step + 1 == len(plans[slot])]:
            stack.snapshot(ended)
    vectors = stack.read_snapshots([member.layout for member in members])
    return [
        TrainedClient(vector, loss / len(plan), sum(map(len, plan)), len(plan))
        for vector, loss, plan in zip(vectors, losses.tolist(), plans, strict=True)
    ]


def batches(rows: np.ndarray, settings: Client, seed: int, t: int, client: int) -> list[np.ndarray]:
    """A client's batches for round t: each epoch a fresh keyed order, the last batch of an epoch as small as it is."""
    plan: list[np.ndarray] = []
    wanted = settings.steps if settings.steps is not None else -(-len(rows) // settings.batch_size) * settings.epochs
    epoch = 0
    while len(plan) < wanted:
        order = rows[seeding.numpy_rng(seed, "batches", t, client, epoch).permutation(len(rows))]
        plan += [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
        epoch += 1
    return plan[:wanted]


def row_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Each row's loss (rows,): cross-entropy in nats for class ids, half the squared distance for target vectors."""
    if labels.dtype.is_floating_point:
        return 0.5 * (outputs - labels).square().flatten(1).sum(1)
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


def _optimizer(groups: list[dict[str, object]], settings: Client) -> torch.optim.Optimizer:
    """Element-wise optimizers, so that one over the stack is one per client."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)


class _Parameters:
    """The stack's parameters during one round: which entries train, and per-client views of their gradients."""

    def __init__(self, stack: Stack, members: Sequence[PackMember]) -> None:
        places = [{(e.name, e.part): e for e in member.layout.entries} for member in members]
        whole = [bool(member.support.all()) for member in members]
        self.rates = members[0].rates
        self.trained: list[nn.Parameter] = []
        self.parts: list[str] = []
        self.partial: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, mask, start: entries to hold still
        for name, part, parameter in stack.tensors():
            supports = {
                slot: member.support[entry.start : entry.start + entry.numel].view(entry.shape)
                for slot, member in enumerate(members)
                if (entry := places[slot].get((name, part))) is not None  # or a layer that only the frozen base changes
            }
            # Without this, a head-only client would still pay for the way back through the whole model.
            parameter.requires_grad_(any(whole[slot] or bool(held.any()) for slot, held in supports.items()))
            if parameter.requires_grad:
                self.trained.append(parameter)
                self.parts.append(part)
                if not all(whole[slot] or bool(held.all()) for slot, held in supports.items()):
                    mask = torch.ones(parameter.shape, dtype=torch.bool)  # padding and empty slots have no gradient
                    for slot, held in supports.items():
                        stack.crop(mask[slot], part, held.shape).copy_(held)
                    self.partial.append((parameter, to_device(mask, parameter.device), parameter.detach().clone()))

    def groups(self, lr: float) -> list[dict[str, object]]:
        """The optimizer's parameter groups: one, or one a part where parts have rates of their own."""
        if not self.rates:
            return [{"params": self.trained, "lr": lr}]
        by_part: dict[str, list[nn.Parameter]] = {}
        for part, parameter in zip(self.parts, self.trained):
            by_part.setdefault(part, []).append(parameter)
        return [{"params": found, "lr": lr * self.rates.get(part, 1.0)} for part, found in by_part.items()]

    @torch.no_grad()
    def mask_gradients(self) -> None:
        for parameter, mask, _ in self.partial:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, mask, start in self.partial:  # weight decay moves entries without gradient
            parameter.copy_(torch.where(mask, parameter, start))

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """Scales each slot's gradient to at most the L2 norm, as torch's clip_grad_norm_ does for one model."""
        gradients = [p.grad for p in self.trained if p.grad is not None]
        squares = sum((g.flatten(1).square().sum(1) for g in gradients), torch.zeros(()))
        factors = (norm / (torch.sqrt(squares) + 1e-6)).clamp(max=1.0)
        for g in gradients:
            g.mul_(factors.view(-1, *[1] * (g.ndim - 1)))
