"""A trainer: one process's copy of the frozen base, its stack and the data. It executes the jobs it is given.

A trainer stores nothing between jobs: the result of a job is a function of the job, its payloads and the plan. So any
trainer may execute any job, and a job that is executed twice gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from rayfed import wire
from rayfed.clients import device_memory, messages
from rayfed.clients.divergence import checked
from rayfed.clients.gradients import pack_gradients
from rayfed.clients.local_training import PackMember, TrainingContext, on_device, train_pack
from rayfed.clients.objective_messages import client_round, replies
from rayfed.clients.own_rows import deciding, encoded_statistics, measured_statistics
from rayfed.clients.pack_timing import measure
from rayfed.clients.plan import RunPlan
from rayfed.clients.transfer import assemble, personal_values, sums, upload
from rayfed.errors import RunError
from rayfed.lora.packed.segments import Segment
from rayfed.lora.packed.stack import Stack, head_layers
from rayfed.methods import BaseChange, merged
from rayfed.objectives import Plain, Stateful
from rayfed.own_code import own_failures
from rayfed.privacy.example import ExampleLevel
from rayfed.tasks.data.class_subset import ClassSubset
from rayfed.tasks.data.federation import Prompts
from rayfed.tasks.models.base import MeanPooledClassifier, in_dtype
from rayfed.tasks.models.checkpointing import enable_gradient_checkpointing
from rayfed.tasks.models.four_bit import to_4_bits
from rayfed.tasks.models.padded_attention import use_float32_attention
from rayfed.tasks.models.unpadded import Padded

SPLITS: tuple[messages.SplitName, ...] = ("train", "validation", "test")


class Trainer:
    """Loads the plan's base model once, then `execute`s jobs on it."""

    @own_failures()
    def __init__(self, plan: RunPlan) -> None:
        self.plan, self.device = plan, torch.device(plan.engine.device)
        base = in_dtype(plan.task.load_base(plan.federation), plan.model.dtype)
        if plan.model.load_in_4bit:
            to_4_bits(base)
        self.model = base.model.to(self.device)
        self.stack = Stack(
            self.model, plan.trained_shapes, base.head, plan.lora.dropout, getattr(torch, plan.lora_compute)
        )
        if plan.engine.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        self.head = list((self.stack.head or head_layers(self.model, base.frozen_head)).values())
        batching = plan.model.batching
        padded = isinstance(batching, Padded)
        if padded and self.device.type == "cpu" and plan.model.dtype != "float32":
            use_float32_attention(self.model)
        self.outputs = plan.task.make_forward(self.model, batching)
        # Row indices in order of length: batches of evaluation hold little padding.
        self.by_length = {name: np.argsort(plan.federation.split(name).lengths, kind="stable") for name in SPLITS}
        rows = plan.privacy if isinstance(plan.privacy, ExampleLevel) else None
        self.context = TrainingContext(
            self.stack, self.forward, plan.task, plan.federation.train, padded, plan.client, plan.seed, self.device,
            rows, plan.objective, isinstance(self.model, MeanPooledClassifier) and self.model.normalize,
        )  # fmt: skip

    @own_failures()
    def execute(self, job: messages.Job, payloads: Sequence[bytes]) -> messages.Result:
        """Executes one job: train, evaluate, generate, features or measure, by its type.

        RunError where the memory does not suffice, no algorithm gives the same bits every time, or the user's own code
        fails.
        """
        try:
            match job:
                case messages.TrainJob():
                    return self._train(job, payloads)
                case messages.EvalJob():
                    return self._evaluate(job, payloads)
                case messages.GenerateJob():
                    return self._generate(job, payloads)
                case messages.FeatureJob():
                    return self._features(job)
                case messages.MeasureJob():
                    room = device_memory.free(self.plan.engine)
                    return messages.MeasureResult(tuple(measure(self, job.clients, job.sizes, room)), room)
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            raise RunError(
                f"engine.deterministic: got true, but {str(error).splitlines()[0]}; false goes on without equal bits"
            ) from None

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """The model's outputs (rows, ...) for a batch, while the stack holds its segments."""
        return self.outputs(inputs, self.stack.batch.segments)

    def _train(self, job: messages.TrainJob, payloads: Sequence[bytes]) -> messages.TrainResult:
        begun = time.perf_counter()
        decoded = [wire.decode(payload) for payload in payloads]  # clients of a tier share theirs
        bases: dict[int, BaseChange] = {}
        members = [self._member(order, decoded, bases, job.lr, job.t) for order in job.orders]
        context = self._context_at(job.t)
        statistics_of, starts = partial(encoded_statistics, context, self.plan.weighting), [m.start for m in members]
        sent = statistics_of("sent_losses", members, starts, job.t)
        if job.step is None:
            train = partial(train_pack, context, lr=job.lr, t=job.t)
        else:
            train = partial(pack_gradients, context, t=job.t, step=job.step)
        trained = device_memory.in_halves(
            members, train, self.device, lambda m: f"client {m.client}: training it alone"
        )
        parts, settings = tuple(map(len, trained)), self.context.settings
        flat = (result for part in trained for result in part)
        if job.step is not None:  # what a client sends is its gradient itself
            members = [replace(member, start=torch.zeros_like(member.start)) for member in members]
        privacy = self.plan.privacy
        must = privacy is not None and privacy.always_sends
        pairs = zip(flat, members, strict=True)
        results, found = zip(*(checked(result, member, settings, must) for result, member in pairs))
        diverged = {i: divergence for i, divergence in enumerate(found) if divergence}
        dropped = {i for i, divergence in diverged.items() if divergence.dropped}
        clients = enumerate(zip(results, members, job.orders, strict=True))
        kept = [None if i in dropped else client for i, client in clients]
        uploads = tuple(client and upload(self.plan.method, *client, privacy, job.t, self.plan.seed) for client in kept)
        personal = tuple(client and personal_values(*client) for client in kept)
        vectors, classes = [client and client[0].vector for client in kept], len(self.plan.federation.classes)
        measured = measured_statistics(context, members, vectors, classes)
        messages_up, stored = replies(self.plan.objective, kept, measured, job.t, self.plan.seed)
        summed = sums(self.plan.channel, uploads, members, job.orders, parts) if job.summed else ()
        losses, examples, steps = zip(*((r.loss, r.examples, r.steps) for r in results))
        ranks = tuple(map(_trained_rank, members))
        sizes = tuple(None if payload is None else wire.inspect(payload) for payload in uploads)
        uploads = () if job.summed else uploads
        own = sent or statistics_of("trained_losses", members, [result.vector for result in results], job.t)
        statistics = tuple(None if i in dropped else payload for i, payload in enumerate(own))
        seconds = time.perf_counter() - begun
        return messages.TrainResult(
            uploads, personal, losses, examples, steps, ranks, seconds, parts, sizes, summed, diverged,
            messages_up, stored, statistics,
        )  # fmt: skip

    def _context_at(self, t: int) -> TrainingContext:
        """The context of round ``t``, whose loss compares only `RunPlan.compared_classes`."""
        subset = self._subset(self.plan.compared_classes(t))
        if subset is None:
            return self.context
        forward, data = lambda inputs: subset.outputs(self.forward(inputs)), subset.rows(self.context.data)
        return replace(self.context, forward=forward, data=data)

    def _subset(self, classes: tuple[int, ...] | None) -> ClassSubset | None:
        """The classification among these classes; None: among all."""
        return None if classes is None else ClassSubset(classes, len(self.plan.federation.classes), self.device)

    def _member(
        self,
        order: messages.ClientOrder,
        decoded: Sequence[wire.Payload],
        bases: dict[int, BaseChange],
        lr: float,
        t: int,
    ) -> PackMember:
        known = None if order.known is None else decoded[order.known]
        start, has = assemble(order.layout, decoded[order.payload], known)
        base: BaseChange = {}
        if order.base is not None:
            at, layout = order.base
            if at not in bases:
                vector = decoded[at].dense()
                bases[at] = {**layout.unflatten(vector).layers, **layout.matrices(vector)}
            base = bases[at]
        if order.merge is not None:
            at, layout = order.merge
            base = merged(base, layout.unflatten(decoded[at].dense()))
        trainable, rows = order.trainable, self.plan.federation_at(t).rows_of(order.client)
        support, objective = trainable.support(order.layout, has), trainable.objective or Plain()
        context = None
        if order.objective is not None and isinstance(self.plan.objective, Stateful):
            products = tuple(self.stack.lora) if self.plan.method.averages == "products" else ()
            context = client_round(order, decoded, start, support, lr, products)
            objective = self.plan.objective.own_penalty(context) or objective
        return PackMember(order.client, order.layout, start, support, rows, base, trainable.rates, objective, context)

    @torch.no_grad()
    def _evaluate(self, job: messages.EvalJob, payloads: Sequence[bytes]) -> messages.EvalResult:
        vector = wire.decode(payloads[0]).dense()
        self.stack.load([job.layout.unflatten(vector)], [job.layout.matrices(vector)])
        task, subset = self.plan.task, self._subset(job.seen)
        loss, count = (torch.zeros((), dtype=torch.float64, device=self.device) for _ in range(2))
        found: list[tuple[np.ndarray, Tensor, Tensor]] = []

        def outputs_of(inputs: dict[str, Tensor], segment: Segment) -> Tensor:
            return self.forward(inputs).float()

        for chosen, outputs, labels in self._each_batch(job, outputs_of, job.classes, job.rows):
            if subset is None:
                sums, counts = task.loss(outputs, labels)
                predictions = task.predictions(outputs)
            else:
                outputs = subset.outputs(outputs)
                sums, counts = task.loss(outputs, subset.labels(labels))
                predictions = subset.original(task.predictions(outputs))
            loss += sums.double().sum()
            count += counts.double().sum()
            found.append((chosen, predictions, labels))
        if not found:
            return messages.EvalResult(0.0, 0.0, np.zeros(0, np.int64), torch.zeros(0), torch.zeros(0))
        rows, predictions, truth = zip(*found)
        # Only here does the process wait for the device.
        return messages.EvalResult(
            float(loss), float(count), np.concatenate(rows), torch.cat(predictions).cpu(), torch.cat(truth).cpu()
        )

    def _generate(self, job: messages.GenerateJob, payloads: Sequence[bytes]) -> messages.GenerateResult:
        vector = wire.decode(payloads[0]).dense()
        self.stack.load([job.layout.unflatten(vector)], [job.layout.matrices(vector)])
        task, data = self.plan.task, cast(Prompts, self.plan.federation.split(job.split))

        def done(chosen: Sequence[int]) -> list[np.ndarray]:
            prompts = on_device(data.prompt_batch(np.asarray(chosen)), self.device)
            with self.stack.using([Segment(0, len(chosen))]):
                return list(task.generate(self.model, self.outputs, prompts, job.most).cpu().numpy())

        parts = device_memory.in_halves(
            job.rows.tolist(), done, self.device, lambda row: f"{job.split} row {row}: its response"
        )
        return messages.GenerateResult(tuple(tokens for part in parts for tokens in part))

    @torch.no_grad()
    def _features(self, job: messages.FeatureJob) -> messages.FeatureResult:
        seen: list[Tensor] = []

        def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].float().cpu())

        hooks = [layer.register_forward_pre_hook(see) for layer in self.head]
        self.stack.clear()  # the base alone: no adapter

        def features_of(inputs: dict[str, Tensor], segment: Segment) -> Tensor:
            seen.clear()
            self.forward(inputs)
            return deciding(seen[0], [segment])  # what reaches the head first; deeper layers of the head are untrained

        try:
            found = list(self._each_batch(job, features_of))
        finally:
            for hook in hooks:
                hook.remove()
        _, states, labels = zip(*found)
        return messages.FeatureResult(torch.cat(states), torch.cat(labels).cpu())

    def _each_batch(
        self, job: messages.EvalJob | messages.FeatureJob, work: Callable[[dict[str, Tensor], Segment], Tensor],
        classes: Sequence[int] | None = None, only: np.ndarray | None = None,
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:  # fmt: skip
        """(rows, result of ``work``, labels) of each batch of the job's rows; a batch that does not fit is halved."""
        data, size = self.plan.federation.split(job.split), self.plan.eval.batch_size
        rows = self.by_length[job.split]
        rows = (rows if only is None else rows[np.isin(rows, only)])[job.start : job.stop]
        if classes is not None:
            rows = rows[np.isin(data.labels[rows], classes)]

        def done(chosen: Sequence[int]) -> tuple[np.ndarray, Tensor, Tensor]:
            batch = on_device(data.batch(np.asarray(chosen), self.context.padded), self.device)
            labels = batch.pop("labels")
            segment = Segment(0, len(chosen), lengths=data.lengths[chosen].tolist())
            with self.stack.using([segment]):
                return np.asarray(chosen), work(batch, segment), labels

        for i in range(0, len(rows), size):
            chosen = rows[i : i + size].tolist()
            yield from device_memory.in_halves(
                chosen, done, self.device, lambda row: f"{job.split} row {row}: evaluating it"
            )


def _trained_rank(member: PackMember) -> int:
    """The largest number of ranks, over the layers, in which this client had anything to train."""
    alive: dict[str, Tensor] = {}
    for entry in member.layout.entries:
        if entry.part in ("A", "B", "R"):
            support = member.support[entry.start : entry.start + entry.numel].view(entry.shape)
            ranks = support.any(0 if entry.part == "B" else 1)
            alive[entry.name] = alive.get(entry.name, torch.zeros_like(ranks)) | ranks
    return max((int(ranks.sum()) for ranks in alive.values()), default=0)
