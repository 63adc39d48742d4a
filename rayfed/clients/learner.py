"""A learner: one process's copy of the frozen base, its stack, and the data; it does whatever job it is handed.

A learner keeps nothing between jobs: the result of a job is a function of the job, its payloads and the settings. So
any learner may do any job, and a job that is done twice gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rayfed import wire
from rayfed.clients.blueprint import Blueprint
from rayfed.clients.jobs import (
    EvalJob,
    EvalResult,
    FeatureJob,
    FeatureResult,
    Job,
    Result,
    SplitName,
    TrainJob,
    TrainResult,
)
from rayfed.clients.train import Member, Trained, train_pack
from rayfed.config import Experiment
from rayfed.errors import RunError
from rayfed.lora.inject import Stack
from rayfed.lora.stacked import Segment
from rayfed.methods.base import received
from rayfed.tasks.federation import Federation
from rayfed.tasks.models import load_base


class Learner:
    """Loads the base model of ``experiment`` once, then `execute`s jobs on it."""

    def __init__(self, experiment: Experiment, federation: Federation, blueprint: Blueprint) -> None:
        self.experiment, self.federation = experiment, federation
        self.device = torch.device(experiment.engine.device)
        base = load_base(experiment.model, len(federation.classes), experiment.seed)
        self.model = base.model.to(self.device)
        lora = experiment.lora
        shapes = blueprint.trained_shapes(experiment)
        self.stack = Stack(self.model, shapes, base.head, experiment.engine.pack, lora.rank, lora.dropout)
        self.by_length = {
            name: np.argsort(getattr(federation, name).lengths, kind="stable")
            for name in ("train", "validation", "test")
        }

    def execute(self, job: Job, payloads: Sequence[bytes]) -> Result:
        """Does one job. Its type decides the result's: train, evaluate, features."""
        if isinstance(job, TrainJob):
            return self._train(job, payloads)
        if isinstance(job, EvalJob):
            return self._evaluate(job, payloads[0])
        if isinstance(job, FeatureJob):
            return self._features(job)
        raise TypeError(f"no such job: {type(job).__name__}")

    def _train(self, job: TrainJob, payloads: Sequence[bytes]) -> TrainResult:
        begun = time.perf_counter()
        decoded = [wire.decode(payload) for payload in payloads]
        members = []
        for order in job.orders:
            payload = decoded[order.payload]
            layout = job.layouts[order.payload]
            support = order.trainable.support(layout, received(payload))
            rows = self.federation.rows_of(order.client)
            members.append(Member(order.client, layout, payload.dense(), support, rows))
        results = train_pack(
            self.stack, self._forward, self.federation.train, self.federation.pad_id, members,
            self.experiment.client, lr=job.lr, t=job.t, seed=self.experiment.seed, device=self.device,
        )  # fmt: skip
        uploads = [
            _upload(result, member, order.density_up, order.values)
            for result, member, order in zip(results, members, job.orders, strict=True)
        ]
        return TrainResult(
            tuple(uploads),
            tuple(r.loss for r in results),
            tuple(r.examples for r in results),
            tuple(r.steps for r in results),
            time.perf_counter() - begun,
        )

    @torch.no_grad()
    def _evaluate(self, job: EvalJob, payload: bytes) -> EvalResult:
        self.stack.load(0, job.layout.unflatten(wire.decode(payload).dense()))
        loss, correct, count = 0.0, 0, 0
        for inputs, labels in self._batches(job.split, job.start, job.stop):
            with self.stack.batch.of([Segment(0, len(labels))]):
                logits = self._forward(inputs).float()
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="none").double().sum())
            correct += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
        return EvalResult(loss, correct, count)

    @torch.no_grad()
    def _features(self, job: FeatureJob) -> FeatureResult:
        seen: list[Tensor] = []
        features, labels = [], []
        hooks = [
            layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].float().cpu()))
            for layer in self.stack.head.values()
        ]
        for lora in self.stack.lora.values():  # the base alone: no adapter
            lora.B_KOR.zero_()
        try:
            for inputs, batch_labels in self._batches(job.split, job.start, job.stop):
                with self.stack.batch.of([Segment(0, len(batch_labels))]):
                    self._forward(inputs)
                states = seen[0]  # what reaches the head first; deeper layers of the head are untrained
                seen.clear()
                if states.ndim == 3:  # GPT-2's head sees every token, and the last real one decides
                    states = states[torch.arange(len(states)), inputs["attention_mask"].sum(1).cpu() - 1]
                features.append(states)
                labels.append(batch_labels.cpu())
        finally:
            for hook in hooks:
                hook.remove()
        return FeatureResult(torch.cat(features), torch.cat(labels))

    def _batches(self, split: SplitName, start: int, stop: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        tokens, size = getattr(self.federation, split), self.experiment.eval.batch_size
        rows = self.by_length[split][start:stop]
        for i in range(0, len(rows), size):
            batch = tokens.batch(rows[i : i + size], self.federation.pad_id)
            inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
            yield inputs, inputs.pop("labels")

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs).logits


def _upload(result: Trained, member: Member, density: float, values: str) -> bytes:
    """What the client sends: the largest of its changes, among the entries that trained.

    The budget is a share of the whole adapter. Entries outside the support are known to both sides not to have
    changed: they take no index bits.
    """
    change = (result.vector - member.start)[member.support]
    if not bool(torch.isfinite(change).all()):
        raise RunError(
            f"client {member.client}: training gave values that are not finite; lower client.lr or set client.clip_norm"
        )
    budget = wire.keep_count(len(member.support), density)
    indices = None if budget >= len(change) else wire.top_k(change, budget)
    return wire.encode(change, indices=indices, values=values)
