"""A trainer: one process's copy of the frozen base, its stack, and the data; it does whatever job it is handed.

A trainer keeps nothing between jobs: the result of a job is a function of the job, its payloads and the settings. So
any trainer may do any job, and a job that is done twice gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayfed import wire
from rayfed.clients import device_memory
from rayfed.clients.local_training import PackMember, TrainedClient, on_device, train_pack
from rayfed.clients.messages import (
    ClientOrder,
    EvalJob,
    EvalResult,
    FeatureJob,
    FeatureResult,
    Job,
    MeasureJob,
    MeasureResult,
    Result,
    SplitName,
    TrainJob,
    TrainResult,
)
from rayfed.clients.pack_timing import measure
from rayfed.clients.transfer import assemble, kept, sums, upload
from rayfed.config import Experiment
from rayfed.device import to_device
from rayfed.errors import RunError
from rayfed.lora.packed.segments import Segment
from rayfed.lora.packed.stack import Stack, head_layers
from rayfed.methods import build
from rayfed.methods.base import BaseChange
from rayfed.objectives import Plain
from rayfed.tasks.data.tokens import Tokens
from rayfed.tasks.federation import Federation
from rayfed.tasks.models.base import in_dtype
from rayfed.tasks.models.cache import shared_base
from rayfed.tasks.models.checkpointing import enable_gradient_checkpointing
from rayfed.tasks.models.spec import ModelSpec
from rayfed.tasks.models.unpadded import Unpadded, UnpaddedModel, UnpaddedTokens


class Trainer:
    """Loads the base model of ``experiment`` once, then `execute`s jobs on it."""

    def __init__(self, experiment: Experiment, federation: Federation, model_spec: ModelSpec) -> None:
        self.experiment, self.federation, self.model_spec = experiment, federation, model_spec
        self.method = build(experiment.method.name, **experiment.method.options)
        self.device = torch.device(experiment.engine.device)
        base = shared_base(experiment, len(federation.classes))
        self.model = in_dtype(base, experiment.model.dtype).to(self.device)
        shapes = model_spec.trained_shapes(experiment)
        self.stack = Stack(self.model, shapes, base.head, experiment.lora.dropout)
        if experiment.engine.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        self.head = list((self.stack.head or head_layers(self.model, base.frozen_head)).values())
        how = model_spec.padding
        self.unpadded_model = UnpaddedModel(self.model, how) if isinstance(how, Unpadded) else None
        splits: dict[SplitName, Any] = {
            "train": federation.train, "validation": federation.validation, "test": federation.test,
        }  # fmt: skip
        self.data: dict[SplitName, Any] = {name: self._token_places(split) for name, split in splits.items()}
        self.by_length = {name: np.argsort(split.lengths, kind="stable") for name, split in splits.items()}

    def execute(self, job: Job, payloads: Sequence[Any]) -> Result:
        """Does one job. Its type decides the result's: train, evaluate, features, measure.

        RunError where the memory does not do, or no algorithm that always gives the same bits.
        """
        try:
            return self._execute(job, payloads)
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            raise RunError(
                f"engine.deterministic: got true, but {str(error).splitlines()[0]}; false goes on without equal bits"
            ) from None

    def _execute(self, job: Job, payloads: Sequence[Any]) -> Result:
        if isinstance(job, TrainJob):
            return self._train(job, payloads)
        if isinstance(job, EvalJob):
            return self._evaluate(job, payloads)
        if isinstance(job, FeatureJob):
            return self._features(job)
        if isinstance(job, MeasureJob):
            room = device_memory.free(self.experiment.engine)
            return MeasureResult(tuple(measure(self, job.clients, job.sizes, room)), room)
        raise TypeError(f"no such job: {type(job).__name__}")

    def _train(self, job: TrainJob, payloads: Sequence[Any]) -> TrainResult:
        begun = time.perf_counter()
        decoded = [wire.decode(payload) for payload in payloads]  # a tier's clients share theirs
        bases: dict[int, BaseChange] = {}
        members = [self._member(order, decoded, bases) for order in job.orders]
        data = self.data["train"]

        def train(pack: Sequence[PackMember]) -> list[TrainedClient]:
            return train_pack(
                self.stack, self.forward, data, self.federation.pad_id, pack,
                self.experiment.client, lr=job.lr, t=job.t, seed=self.experiment.seed, device=self.device,
            )  # fmt: skip

        trained = device_memory.in_halves(
            members, train, self.device, lambda m: f"client {m.client}: training it alone"
        )
        results, parts = [result for part in trained for result in part], tuple(map(len, trained))
        clients = list(zip(results, members, job.orders, strict=True))
        uploads = tuple(upload(self.method, *client) for client in clients)
        return TrainResult(
            () if job.summed else uploads,
            tuple(kept(*client) for client in clients),
            tuple(r.loss for r in results),
            tuple(r.examples for r in results),
            tuple(r.steps for r in results),
            tuple(_trained_rank(member) for member in members),
            time.perf_counter() - begun,
            parts,
            tuple(map(wire.inspect, uploads)),
            sums(uploads, members, job.orders, parts) if job.summed else (),
        )

    def _member(self, order: ClientOrder, decoded: Sequence[wire.Payload], bases: dict[int, BaseChange]) -> PackMember:
        payload = decoded[order.payload]
        start, has = assemble(order.layout, payload, None if order.known is None else decoded[order.known])
        if order.base is not None and order.base not in bases:
            assert order.base_layout is not None
            vector = decoded[order.base].dense()
            bases[order.base] = {
                **order.base_layout.unflatten(vector).layers,
                **order.base_layout.matrices(vector),
            }
        return PackMember(
            order.client,
            order.layout,
            start,
            order.trainable.support(order.layout, has),
            self.federation.rows_of(order.client),
            bases[order.base] if order.base is not None else {},
            order.trainable.rates,
            order.trainable.objective or Plain(),
        )

    @torch.no_grad()
    def _evaluate(self, job: EvalJob, payloads: Sequence[Any]) -> EvalResult:
        vector = wire.decode(payloads[0]).dense()
        adapter = job.layout.unflatten(vector)
        self.stack.load([adapter], [job.layout.matrices(vector)])
        classes = len(self.federation.classes)

        def logits_of(inputs: dict[str, Tensor], segment: Segment) -> Tensor:
            return self.forward(inputs).float()

        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        seen, right = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.bool, device=self.device)]
        for logits, labels in self._each_batch(job, self.data[job.split], logits_of, job.classes):
            there = to_device(labels, self.device)
            loss += nn.functional.cross_entropy(logits, there, reduction="none").double().sum()
            seen.append(labels)
            right.append(logits.argmax(-1) == there)
        labels, hits = torch.cat(seen), torch.cat(right).cpu()  # the device is waited for once
        count = torch.bincount(labels, minlength=classes)
        return EvalResult(float(loss), torch.bincount(labels[hits], minlength=classes), count)

    @torch.no_grad()
    def _features(self, job: FeatureJob) -> FeatureResult:
        seen: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].float().cpu()))
            for layer in self.head
        ]
        for lora in self.stack.lora.values():  # the base alone: no adapter
            lora.load([None])

        def features_of(inputs: dict[str, Tensor], segment: Segment) -> Tensor:
            seen.clear()
            self.forward(inputs)
            states = seen[0]  # what reaches the head first; deeper layers of the head are untrained
            if states.ndim == 3:  # GPT-2's head sees every token, and the last real one decides
                assert segment.lengths is not None
                last = (torch.tensor(segment.lengths) - 1).clamp(max=states.shape[1] - 1)  # flat: it sees one only
                states = states[torch.arange(len(states)), last]
            return states

        try:
            found = list(self._each_batch(job, self.data[job.split], features_of))
        finally:
            for hook in hooks:
                hook.remove()
        states, labels = zip(*found)
        return FeatureResult(torch.cat(states), torch.cat(labels))

    def _each_batch(
        self, job: EvalJob | FeatureJob, tokens: Any, work: Callable[[dict[str, Tensor], Segment], Tensor],
        classes: Sequence[int] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """What ``work`` makes of each batch of the job's rows, and its labels; a batch that does not fit is halved."""
        size = self.experiment.eval.batch_size
        rows = self.by_length[job.split][job.start : job.stop]
        if classes is not None:
            rows = rows[np.isin(getattr(self.federation, job.split).labels[rows], classes)]

        def done(chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
            batch = tokens.batch(np.asarray(chosen), self.federation.pad_id)
            labels = batch.pop("labels")
            inputs = on_device(batch, self.device)
            segment = Segment(0, len(chosen), lengths=tokens.lengths[chosen].tolist())
            with self.stack.batch.using([segment]):
                return work(inputs, segment), labels

        for i in range(0, len(rows), size):
            chosen = rows[i : i + size].tolist()
            yield from device_memory.in_halves(
                chosen, done, self.device, lambda row: f"{job.split} row {row}: evaluating it"
            )

    def _token_places(self, split: Any) -> Any:
        return UnpaddedTokens(split) if self.unpadded_model is not None and isinstance(split, Tokens) else split

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (rows, classes) of a batch, while the stack holds its segments; with padding or without."""
        if self.unpadded_model is not None:
            return self.unpadded_model(inputs, self.stack.batch.segments)
        logits: Tensor = self.model(**inputs).logits
        return logits


def _trained_rank(member: PackMember) -> int:
    """The largest number of ranks, over the layers, in which this client had anything to train."""
    if bool(member.support.all()):
        return max((entry.shape[0] for entry in member.layout.entries if entry.part == "A"), default=0)
    alive: dict[str, Tensor] = {}
    for entry in member.layout.entries:
        if entry.part in ("A", "B", "R"):
            support = member.support[entry.start : entry.start + entry.numel].view(entry.shape)
            ranks = support.any(0 if entry.part == "B" else 1)
            alive[entry.name] = alive.get(entry.name, torch.zeros_like(ranks)) | ranks
    return max((int(ranks.sum()) for ranks in alive.values()), default=0)
