"""Local training of a pack: K clients, each from its own start, on its own data, in shared forward and backward passes.

For every client, whatever pack it is in: its batches are its own, in its own order. Its loss is the mean over its own
rows (losses are summed over clients, so no gradient is rescaled). Its gradient is clipped by its own norm. Its dropout
is keyed by the client and its tokens. After its last step it leaves the batch, and its values are saved at once:
moments and weight decay cannot move them any more. Entries that do not train keep the bits they were decoded to.

A step runs in this order, and each part is one function: batch, losses, backward, gradients, step. docs/architecture.md
says which further hooks of objectives belong to which part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from rayfed import seeding
from rayfed.clients.head_samples import samples_loss
from rayfed.clients.pack_parameters import Estimates, Parameters, make_optimizer, pack_targets, pack_terms
from rayfed.clients.row_clipping import add_noise, clipped_backward
from rayfed.clients.row_context import class_counts, row_context
from rayfed.config.training import Client
from rayfed.device import to_device
from rayfed.lora.adapter import Layout
from rayfed.lora.packed.row_norms import RowNorms
from rayfed.lora.packed.segments import Segment
from rayfed.lora.packed.stack import Stack
from rayfed.methods import BaseChange
from rayfed.objectives import ClientRound, Objective, Plain, Stateful
from rayfed.privacy.example import ExampleLevel, expected_batch
from rayfed.tasks.base import Task
from rayfed.tasks.data.federation import Rows
from rayfed.tasks.metrics import single_label

Forward = Callable[[dict[str, Tensor]], Tensor]
"""The model: the inputs of a batch in, outputs (rows, ...) out."""


@dataclass(frozen=True)
class PackMember:
    """One client of a pack.

    ``start`` (n,) are its decoded start values, ``support`` (n,) marks the entries that train, ``rows`` are its
    training rows. ``base`` is the frozen change of the base under its adapter. ``rates`` are factors on the learning
    rate by part, equal in a pack. The penalty of ``objective`` is its own: that of the run's objective comes on top.
    ``context`` is what a stateful objective of the run knows of the client; None: it leaves the client alone.
    """

    client: int
    layout: Layout
    start: Tensor
    support: Tensor
    rows: np.ndarray
    base: BaseChange = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    objective: Objective = field(default_factory=Plain)
    context: ClientRound | None = None


@dataclass(frozen=True)
class TrainedClient:
    """One client's result: its entries (n,) after training, mean loss over steps, examples seen, steps done."""

    vector: Tensor
    loss: float  # 0 without steps
    examples: int
    steps: int
    twin: Tensor | None = None  # (n,), the end of its second trajectory


@dataclass(frozen=True)
class TrainingContext:
    """What all packs of a process share: the model with its stack, the task and its rows, settings, objective."""

    stack: Stack
    forward: Forward
    task: Task
    data: Rows
    padded: bool  # how batches are made
    settings: Client
    seed: int
    device: torch.device
    privacy: ExampleLevel | None = None
    objective: Objective = field(default_factory=Plain)
    normalized: bool = False  # whether the model scales what enters the head to a mean square of 1


def train_pack(context: TrainingContext, members: Sequence[PackMember], *, lr: float, t: int) -> list[TrainedClient]:
    """Trains the members for one round ``t`` (from 0) at the learning rate ``lr``; results in the order given.

    The stack gets as many slots as there are members, and one more for each second trajectory of a stateful objective.
    The result is a function of the arguments alone. On a GPU nothing waits for the device before the last step, and a
    step starts as many kernels for many members as for two.
    """
    objective, contexts = context.objective, [member.context for member in members if member.context is not None]
    if not isinstance(objective, Stateful) or len(contexts) < len(members):
        return PackTraining(context, members, lr, t).run()
    starts = [objective.twin(known) for known in contexts]
    twins = [replace(member, start=start) for member, start in zip(members, starts, strict=True) if start is not None]
    results = PackTraining(context, [*members, *twins], lr, t, objective).run()
    ends = iter(results[len(members) :])
    return [
        result if start is None else _with_twin(objective, known, result, next(ends).vector)
        for result, known, start in zip(results, contexts, starts)
    ]


def _with_twin(objective: Stateful, client: ClientRound, result: TrainedClient, twin: Tensor) -> TrainedClient:
    return replace(result, vector=objective.combined(client, result.vector, twin), twin=twin)


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device."""
    return {name: to_device(tensor, device) for name, tensor in batch.items()}


def batches(rows: np.ndarray, settings: Client, seed: int, t: int, client: int) -> list[np.ndarray]:
    """A client's batches for round t: each epoch a fresh keyed order, the last batch of an epoch as small as it is.

    A client without rows has no batches.
    """
    plan: list[np.ndarray] = []
    if not len(rows):
        return plan
    steps = settings.steps if settings.steps is not None else -(-len(rows) // settings.batch_size) * settings.epochs
    epoch = 0
    while len(plan) < steps:
        order = rows[seeding.numpy_rng(seed, "batches", t, client, epoch).permutation(len(rows))]
        plan += [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
        epoch += 1
    return plan[:steps]


class PackTraining:
    """One round of one pack. With estimates of the gradient, the second half of the slots follows the first half: it
    has the values before the last step."""

    def __init__(
        self, context: TrainingContext, members: Sequence[PackMember], lr: float, t: int,
        objective: Stateful | None = None,
    ) -> None:  # fmt: skip
        self.trajectories = len(members)
        members = [*members, *members] if objective is not None and objective.estimates else members
        self.context, self.members, self.t, self.objective = context, members, t, objective
        self.plans = [_plan(context, member, t) for member in members]
        context.stack.load([m.layout.unflatten(m.start) for m in members], [m.base for m in members])
        self.parameters = Parameters(context.stack, members)
        # Where nothing arrived and only arrived entries train, the clients just measure their loss.
        self.optimizer: torch.optim.Optimizer | None = None
        if self.parameters.trained:
            self.optimizer = make_optimizer(self.parameters.groups(lr), context.settings, context.device)
        # Where the objective pulls towards the start of the round.
        self.terms = pack_terms(context.stack, members, objective) if objective is not None else {}
        moves = context.objective.changes_gradient or self.terms
        trained = self.parameters.trained if moves else {}
        self.starts = {part: values.detach().clone() for part, values in trained.items()}
        self.estimates: Estimates | None = None
        if objective is not None and objective.estimates:
            self.estimates = Estimates(objective, self.parameters.trained, self.trajectories)
        self.class_counts: Tensor | None = None  # of the members, see `_row_losses`
        self.targets = pack_targets(members, objective, context.device) if objective is not None else None
        self.losses = torch.zeros(len(members), dtype=torch.float64, device=context.device)

    def run(self) -> list[TrainedClient]:
        stack = self.context.stack
        if without := [slot for slot, plan in enumerate(self.plans) if not plan]:
            stack.snapshot(without)
        for step in range(max(len(plan) for plan in self.plans)):
            # Before the first step there is no point before it.
            slots = len(self.plans) if step else self.trajectories
            active = [slot for slot, plan in enumerate(self.plans[:slots]) if step < len(plan)]
            if self.context.privacy is not None:
                self._private_gradients(self.context.privacy, active, step)
            else:
                with stack.using(self.segments(active, step)):
                    loss = self.loss(active, self.batch(active, step), step)
                    if self.optimizer is not None:
                        self.optimizer.zero_grad(set_to_none=True)
                        loss.backward()
            if self.optimizer is not None:
                self._update(self.optimizer)
            if ended := [slot for slot in active if step + 1 == len(self.plans[slot])]:
                stack.snapshot(ended)
        vectors = stack.read_snapshots([member.layout for member in self.members])
        return [
            TrainedClient(vector, loss / max(sum(len(rows) > 0 for rows in plan), 1), sum(map(len, plan)), len(plan))
            for vector, loss, plan in zip(vectors, self.losses.tolist(), self.plans, strict=True)
        ][: self.trajectories]

    def segments(self, active: Sequence[int], step: int) -> list[Segment]:
        """Which rows of the batch belong to which slot."""
        c, lengths = self.context, self.context.data.lengths
        segments = []
        for slot in active:
            rows, key = self.plans[slot][step], ("dropout", self.t, self.members[slot].client, step)
            seed = seeding.derive_seed(c.seed, *key) if c.stack.dropout else None
            segments.append(Segment(slot, len(rows), seed, lengths[rows].tolist()))
        return segments

    def batch(self, active: Sequence[int], step: int) -> dict[str, Tensor]:
        """The rows of the active clients in this step, one client after the other, on the device."""
        c = self.context
        rows = np.concatenate([self.plans[slot][step] for slot in active])
        keys = [
            (
                seeding.derive_seed(c.seed, "augment", self.t, self.members[slot].client, step),
                len(self.plans[slot][step]),
            )
            for slot in active
        ]
        return on_device(c.task.augment(c.data.batch(rows, c.padded), keys), c.device)

    def loss(self, active: Sequence[int], batch: dict[str, Tensor], step: int) -> Tensor:
        """The sum of the active clients' mean losses, penalties and samples' losses; adds the first to ``losses``."""
        c = self.context
        labels = batch.pop("labels")
        sums, counts = self._row_losses(c.forward(batch).float(), labels)
        runs = c.stack.batch.segments_of(sums)
        means = runs.pad(sums[:, None]).sum((1, 2)) / runs.pad(counts[:, None]).sum((1, 2))
        self.losses += runs.scatter(means.detach().double(), len(self.members))
        penalties = (
            objective.penalty(c.stack.factors(slot))
            for slot in active
            for objective in (c.objective, self.members[slot].objective)
        )
        terms = [means.sum(), *(penalty for penalty in penalties if penalty is not None)]
        if self.objective is not None and self.objective.draws_samples:
            sizes = {slot: len(self.plans[slot][step]) for slot in active}
            samples = samples_loss(c, self.objective, self.members, sizes, self.t, step)
            terms += [] if samples is None else [samples]
        return torch.stack(terms).sum()

    def _row_losses(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`Task.loss` of the batch, or in its place the objective's loss, or the cross-entropy that settings change."""
        c = self.context
        if not c.objective.replaces_loss and not c.settings.changes_loss:
            return c.task.loss(outputs, labels)
        if self.class_counts is None:
            own = [c.data.labels[member.rows] for member in self.members]
            self.class_counts = class_counts(own, outputs.shape[1], c.device)
        runs = c.stack.batch.segments_of(outputs)
        slots, context = row_context(runs, labels, self.class_counts, self.targets)
        if not c.objective.replaces_loss:
            weights = None if c.settings.class_weights is None else single_label.balanced(context.class_counts)[slots]
            return single_label.weighted_loss(outputs, labels, weights, c.settings.label_smoothing)
        losses = c.objective.rows(outputs, labels, slots, context)
        return losses, torch.ones_like(losses)

    def _private_gradients(self, privacy: ExampleLevel, active: Sequence[int], step: int) -> None:
        """The gradients of the step, from clipped rows and noise. Batches may be empty."""
        c, present = self.context, [slot for slot in active if len(self.plans[slot][step])]
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        if present:
            with c.stack.using(self.segments(present, step)), RowNorms(c.stack) as norms:
                batch = self.batch(present, step)
                labels = batch.pop("labels")
                sums, counts = c.task.loss(c.forward(batch).float(), labels)
                losses, runs = sums / counts.clamp(min=1), c.stack.batch.segments_of(sums)
                means = torch.stack([own.mean() for own in runs.split(losses.detach())])
                self.losses += runs.scatter(means.double(), len(self.members))
                if self.optimizer is not None:
                    sizes = [expected_batch(len(self.members[slot].rows), c.settings) for slot in present]
                    each = torch.tensor(sizes).repeat_interleave(torch.tensor(runs.sizes))
                    clipped_backward(norms, losses, to_device(each, c.device), privacy.settings.clip_norm)
        if self.optimizer is not None:
            members = {slot: self.members[slot] for slot in active}
            clients = {slot: (m.client, m.layout, len(m.rows)) for slot, m in members.items()}
            add_noise(privacy, c.settings, c.stack, clients, self.t, step)

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        """The step: the objective's gradient, mask, estimate, clip, optimizer.

        What does not train gets its start values back.
        """
        self.parameters.add_gradients(self.context.objective, self.starts, self.terms)
        self.parameters.mask_gradients()
        if self.estimates is not None:
            self.estimates.replace_gradients()
        if self.context.settings.clip_norm is not None:
            self.parameters.clip(self.context.settings.clip_norm)
        optimizer.step()
        self.parameters.restore()
        if self.estimates is not None:
            self.estimates.follow()


def _plan(context: TrainingContext, member: PackMember, t: int) -> list[np.ndarray]:
    """The member's batches for round ``t``."""
    if context.privacy is not None:
        return context.privacy.batches(member.rows, context.settings, t, member.client)
    return batches(member.rows, context.settings, context.seed, t, member.client)
