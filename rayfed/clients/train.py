"""Local training of a pack: K clients, each from its own start, on its own data, in shared forward and backward passes.

What holds for every client, whoever shares its pack: its batches are its own in its own order; its loss is the mean
over its own rows (losses are summed over clients, so no gradient is rescaled); its gradient is clipped by its own norm;
its dropout has its own generator and covers its own tokens; and after its last step it is out of the batch and its
result is taken at once, so moments and weight decay cannot move it any more. Entries that do not train keep the bits
they were decoded to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rayfed import keys
from rayfed.config.training import Client
from rayfed.lora.adapter import Layout
from rayfed.lora.inject import Stack
from rayfed.lora.stacked import Segment
from rayfed.methods.base import Base, Tail


class Forward(Protocol):
    """The model: inputs of a batch in, logits out."""

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor: ...  # logits (rows, classes)


class Rows(Protocol):
    """Training rows as `Tokens` holds them: lengths (n,) and batches with `labels` among their tensors."""

    @property
    def lengths(self) -> np.ndarray: ...

    def batch(self, rows: np.ndarray, pad_id: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Member:
    """One client of a pack: ``start`` (n,) as decoded, ``support`` (n,) which entries train, its training rows.

    ``base`` lies frozen under its adapter; ``rates`` are factors on the learning rate by part, equal in a pack.
    """

    client: int
    layout: Layout
    start: Tensor
    support: Tensor
    rows: np.ndarray
    base: Base = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    tail: Tail | None = None


@dataclass(frozen=True)
class Trained:
    """One client's result: its entries (n,) after training, mean loss over steps, examples seen, steps done."""

    vector: Tensor
    loss: float
    examples: int
    steps: int


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device. A GPU copies it by itself, from pinned memory, while this process goes on."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}


def train_pack(
    stack: Stack, forward: Forward, data: Rows, pad_id: int, members: Sequence[Member], settings: Client, *,
    lr: float, t: int, seed: int, device: torch.device,
) -> list[Trained]:  # fmt: skip
    """Trains the members for one round ``t`` and returns their results in the order given.

    The stack gets as many slots as there are members. The result is a function of the arguments alone.
    """
    plans = [batches(m.rows, settings, seed, t, m.client) for m in members]
    adapters = [member.layout.unflatten(member.start) for member in members]
    stack.fit(adapters)
    for slot, (member, adapter) in enumerate(zip(members, adapters)):
        stack.load(slot, adapter, member.base)
    parameters = _Parameters(stack, members)
    # A payload so sparse that nothing arrived can leave nothing to train: the clients then measure their loss only.
    optimizer = _optimizer(parameters.groups(lr), settings) if parameters.trained else None
    losses = [torch.zeros((), dtype=torch.float64, device=device) for _ in members]
    finished: dict[int, Tensor] = {}  # on the device until all are done: the host need not wait for any one client
    lengths = data.lengths
    for step in range(max(len(plan) for plan in plans)):
        active = [slot for slot, plan in enumerate(plans) if step < len(plan)]
        segments = [
            Segment(
                s,
                len(plans[s][step]),
                keys.torch_rng(seed, "dropout", t, members[s].client, step) if stack.dropout else None,
                lengths[plans[s][step]].tolist(),
            )
            for s in active
        ]
        inputs = on_device(data.batch(np.concatenate([plans[s][step] for s in active]), pad_id), device)
        labels = inputs.pop("labels")
        with stack.batch.of(segments):
            each = row_losses(forward(inputs).float(), labels)
            means = [rows.mean() for rows in each.split([s.rows for s in segments])]
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
                tails = [tail_loss(stack, s, tail) for s in active if (tail := members[s].tail) is not None]
                torch.stack([*means, *tails]).sum().backward()
        if optimizer is not None:
            parameters.mask_gradients()
            if settings.clip_norm is not None:
                parameters.clip(settings.clip_norm)
            optimizer.step()
            parameters.restore()
        for slot, mean in zip(active, means, strict=True):
            losses[slot] += mean.detach().double()
            if step + 1 == len(plans[slot]):
                finished[slot] = stack.read(slot, members[slot].layout)
    return [
        Trained(finished[slot].cpu(), float(losses[slot]) / len(plan), sum(map(len, plan)), len(plan))
        for slot, plan in enumerate(plans)
    ]


def batches(rows: np.ndarray, settings: Client, seed: int, t: int, client: int) -> list[np.ndarray]:
    """A client's batches for round t: each epoch a fresh keyed order, the last batch of an epoch as small as it is."""
    plan: list[np.ndarray] = []
    wanted = settings.steps if settings.steps is not None else -(-len(rows) // settings.batch_size) * settings.epochs
    epoch = 0
    while len(plan) < wanted:
        order = rows[keys.numpy_rng(seed, "batches", t, client, epoch).permutation(len(rows))]
        plan += [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
        epoch += 1
    return plan[:wanted]


def row_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Each row's loss (rows,): cross-entropy in nats for class ids, half the squared distance for target vectors."""
    if labels.dtype.is_floating_point:
        return 0.5 * (outputs - labels).square().flatten(1).sum(1)
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


def tail_loss(stack: Stack, slot: int, tail: Tail) -> Tensor:
    """HetLoRA's regulariser (arXiv 2401.06432): weight times the sum over layers of ||B's tail|| ||A's tail||."""
    norms = [
        torch.linalg.vector_norm(layer.B_KOR[slot, :, tail.keep :])
        * torch.linalg.vector_norm(layer.A_KRI[slot, tail.keep :])
        for layer in stack.lora.values()
    ]
    return tail.weight * torch.stack(norms).sum()


def _optimizer(groups: list[dict[str, object]], settings: Client) -> torch.optim.Optimizer:
    """Element-wise optimizers, so that one over the stack is one per client."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)


class _Parameters:
    """The stack's parameters during one round: which entries train, and per-client views of their gradients."""

    def __init__(self, stack: Stack, members: Sequence[Member]) -> None:
        places = [{(e.name, e.part): e for e in member.layout.entries} for member in members]
        self.rates = members[0].rates
        self.trained: list[nn.Parameter] = []
        self.parts: list[str] = []
        self.partial: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, mask, start: entries to hold still
        for name, part, parameter in stack.tensors():
            mask = torch.ones_like(parameter, dtype=torch.bool)  # padding and empty slots have no gradient anyway
            supports = []
            for slot, member in enumerate(members):
                if (name, part) not in places[slot]:
                    continue  # a layer that only the frozen base changes
                entry = places[slot][name, part]
                supports.append(member.support[entry.start : entry.start + entry.numel])
                stack.crop(mask[slot], part, entry.shape).copy_(supports[-1].view(entry.shape))
            # Without this, a head-only client would still pay for the way back through the whole model.
            parameter.requires_grad_(any(bool(support.any()) for support in supports))
            if parameter.requires_grad:
                self.trained.append(parameter)
                self.parts.append(part)
                if not all(bool(support.all()) for support in supports):
                    self.partial.append((parameter, mask, parameter.detach().clone()))

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
