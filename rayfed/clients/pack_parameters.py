"""The parameters of a pack in one round: what trains, each client's gradient norm, and what an objective adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rayfed.config.training import Client
from rayfed.device import to_device
from rayfed.lora.packed.stack import Stack
from rayfed.objectives import Objective, Stateful

if TYPE_CHECKING:
    from rayfed.clients.local_training import PackMember


def make_optimizer(groups: list[dict[str, object]], settings: Client, device: torch.device) -> torch.optim.Optimizer:
    """Element-wise optimizers, so that one over the stack is one per client. On a GPU a step is one kernel."""
    options: dict[str, Any] = {"lr": 0.0, "weight_decay": settings.weight_decay}
    options["fused"] = True if device.type != "cpu" else None
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, **options)
    return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, **options)


class Parameters:
    """The stack's parameters during one round: which entries train, and each client's norm of their gradients."""

    def __init__(self, stack: Stack, members: Sequence[PackMember]) -> None:
        self.stack, self.rates = stack, members[0].rates
        # Padding, and tensors that only some adapters have, count as trained: they have no gradient.
        masks = {part: torch.ones(values.shape, dtype=torch.bool) for part, values in stack.parameters.items()}
        views, trains = stack.views(masks), set()
        for slot, member in enumerate(members):
            complete = bool(member.support.all())
            for entry in member.layout.entries:
                support = member.support[entry.start : entry.start + entry.numel].view(entry.shape)
                if complete or bool(support.any()):
                    trains.add((entry.name, entry.part))
                if not complete:
                    stack.crop(views[entry.name, entry.part][slot], entry.part, entry.shape).copy_(support)
        # Otherwise a head-only client would pay for a backward pass through the whole model.
        stack.train(trains)
        self.trained = {part: values for part, values in stack.parameters.items() if values.requires_grad}
        # Parameter, mask, start: the parameters of which some entries do not train.
        self.partial = [
            (values, to_device(masks[part], values.device), values.detach().clone())
            for part, values in self.trained.items()
            if not masks[part].all()
        ]

    def groups(self, lr: float) -> list[dict[str, object]]:
        """The optimizer's parameter groups: one for each part."""
        return [{"params": [values], "lr": lr * self.rates.get(part, 1.0)} for part, values in self.trained.items()]

    @torch.no_grad()
    def add_gradients(
        self, objective: Objective, starts: Mapping[str, Tensor], terms: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Adds what the objective adds, given the values (K, n) of each part at the start of the round.

        ``terms`` is `pack_terms` of a stateful objective.
        """
        for part, start in starts.items():
            values = self.trained[part]
            if values.grad is None:
                continue
            if objective.changes_gradient:
                values.grad.add_(objective.gradient(values.detach(), start))
            if terms and isinstance(objective, Stateful):
                values.grad.add_(objective.correction(values.detach(), start, terms[part]))

    @torch.no_grad()
    def mask_gradients(self) -> None:
        for values, mask, _ in self.partial:
            if values.grad is not None:
                values.grad.mul_(mask)

    @torch.no_grad()
    def restore(self) -> None:
        for values, mask, start in self.partial:  # weight decay moves entries without gradient
            values.copy_(torch.where(mask, values, start))

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """Scales each slot's gradient to at most the L2 norm, as torch's clip_grad_norm_ does for one model."""
        gradients = {part: values.grad for part, values in self.trained.items() if values.grad is not None}
        on_cpu = self.stack.device.type == "cpu"  # there each tensor is summed by itself, elsewhere each part
        squares = sum(
            (g.flatten(1).square().sum(1) for g in (self.stack.views(gradients) if on_cpu else gradients).values()),
            torch.zeros(()),
        )
        factors = (norm / (torch.sqrt(squares) + 1e-6)).clamp(max=1.0)
        for g in gradients.values():
            g.mul_(factors[:, None])


def pack_terms(stack: Stack, members: Sequence[PackMember], objective: Stateful) -> dict[str, dict[str, Tensor]]:
    """`Stateful.terms` of the members by part and name: vectors (K, n), scalars (K, 1). Empty if there are none."""
    own = [objective.terms(member.context) for member in members if member.context is not None]
    terms: dict[str, dict[str, Tensor]] = {part: {} for part in stack.parameters} if own[0] else {}
    for name in own[0]:
        values = [found[name] for found in own]
        if values[0].ndim == 0:
            column = to_device(torch.stack(values)[:, None].float(), stack.device)
            by_part = dict.fromkeys(terms, column)
        else:
            by_part = _by_part(stack, members, values)
        for part, tensor in by_part.items():
            terms[part][name] = tensor
    return terms


def _by_part(stack: Stack, members: Sequence[PackMember], vectors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The members' vectors (n,) in the places of the stack's parameters, (K, n) by part; 0 in the padding."""
    flat = {part: torch.zeros(values.shape) for part, values in stack.parameters.items()}
    views = stack.views(flat)
    for slot, (member, vector) in enumerate(zip(members, vectors, strict=True)):
        for entry in member.layout.entries:
            values = vector[entry.start : entry.start + entry.numel].view(entry.shape)
            stack.crop(views[entry.name, entry.part][slot], entry.part, entry.shape).copy_(values)
    return {part: to_device(values, stack.device) for part, values in flat.items()}


def pack_targets(members: Sequence[PackMember], objective: Stateful, device: torch.device) -> Tensor | None:
    """`Stateful.targets` of the members, (K, C, m); None if there are none."""
    own = [objective.targets(member.context) for member in members if member.context is not None]
    return None if own[0] is None else to_device(torch.stack([found for found in own if found is not None]), device)


class Estimates:
    """Gradient estimates of a stateful objective: each trajectory has a second slot, with the values before its last
    step. The second slots are the second half."""

    def __init__(self, objective: Stateful, trained: Mapping[str, Tensor], trajectories: int) -> None:
        self.objective, self.trained, self.half = objective, trained, trajectories
        self.last: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}

    @torch.no_grad()
    def replace_gradients(self) -> None:
        """Puts the estimate in the place of each trajectory's gradient.

        The second slots take a step too, which `follow` undoes.
        """
        for part, values in self.trained.items():
            self.before[part] = values[: self.half].detach().clone()
            if values.grad is None:
                continue
            now, before = values.grad[: self.half], values.grad[self.half :]
            last = self.last.get(part)
            self.last[part] = now.clone() if last is None else self.objective.estimate(now, before, last)
            now.copy_(self.last[part])

    @torch.no_grad()
    def follow(self) -> None:
        """After the optimizer's step: the second slots get the values before it."""
        for part, values in self.before.items():
            self.trained[part][self.half :] = values
