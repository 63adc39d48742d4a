"""A pass over the clients' own rows without gradients: what a weighting needs of the losses (`Weighting.needs`), and
what an objective needs of features or outputs (`Stateful.measures`).

What is measured of a client is that of its rows alone, so it is the same in any pack to rounding. There is no dropout,
and no row is changed at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from rayfed import seeding, wire
from rayfed.clients import device_memory
from rayfed.clients.local_training import PackMember, TrainingContext, on_device
from rayfed.device import to_device
from rayfed.lora.packed.segments import Segment
from rayfed.objectives import ClassStatistics, Stateful
from rayfed.weighting import Needs, Weighting

T = TypeVar("T")


def encoded_statistics(
    context: TrainingContext, weighting: Weighting, needs: Needs, members: Sequence[PackMember],
    vectors: Sequence[Tensor], t: int,
) -> list[bytes]:  # fmt: skip
    """Each member's `Weighting.statistics` in round ``t`` (from 0), as it sends them: of the model ``vectors`` (n,).

    Empty where the weighting needs something else than ``needs``.
    """
    if weighting.needs != needs:
        return []
    rows = [_measured(member, weighting.rows, context.seed, t) for member in members]

    def measured(chosen: Sequence[int]) -> list[bytes]:
        own = [members[i] for i in chosen], [vectors[i] for i in chosen], [rows[i] for i in chosen]
        losses = row_losses(context, *own)
        return [wire.encode(torch.as_tensor(weighting.statistics(found), dtype=torch.float32)) for found in losses]

    return _in_parts(context, members, range(len(members)), measured, "losses")


def measured_statistics(
    context: TrainingContext, members: Sequence[PackMember], vectors: Sequence[Tensor | None], classes: int
) -> list[ClassStatistics | None]:
    """What the objective measures of each member by class: of the model ``vectors`` (n,); None for one without."""
    found: list[ClassStatistics | None] = [None] * len(members)
    objective, models = context.objective, {i: own for i, own in enumerate(vectors) if own is not None}
    if not isinstance(objective, Stateful) or (what := objective.measures) is None or not models:
        return found

    def measured(chosen: Sequence[int]) -> list[ClassStatistics]:
        return class_statistics(context, what, [members[i] for i in chosen], [models[i] for i in chosen], classes)

    for i, own in zip(models, _in_parts(context, members, [*models], measured, what), strict=True):
        found[i] = own
    return found


def _in_parts(
    context: TrainingContext, members: Sequence[PackMember], places: Sequence[int],
    work: Callable[[Sequence[int]], list[T]], what: str,
) -> list[T]:  # fmt: skip
    """``work`` of the members at these places; of fewer at once where memory runs out."""
    parts = device_memory.in_halves(
        places, work, context.device, lambda i: f"client {members[i].client}: measuring its {what}"
    )
    return [one for part in parts for one in part]


@torch.no_grad()
def row_losses(
    context: TrainingContext, members: Sequence[PackMember], vectors: Sequence[Tensor], rows: Sequence[np.ndarray]
) -> list[Tensor]:
    """The loss of each of a member's ``rows`` (m,), the mean over its terms: (m,) float64 on the CPU for each member.

    Each member's adapter has the entries of its vector (n,).
    """
    found: list[list[Tensor]] = [[] for _ in members]
    for slots, outputs, labels in _each_batch(context, members, vectors, rows):
        sums, counts = context.task.loss(outputs, labels)
        losses = sums.double() / counts.clamp(min=1)
        for slot, own in zip(slots, context.stack.batch.segments_of(losses).split(losses), strict=True):
            found[slot].append(own)
    return [torch.cat(own).cpu() for own in found]


@torch.no_grad()
def class_statistics(
    context: TrainingContext, what: Literal["features", "outputs"], members: Sequence[PackMember],
    vectors: Sequence[Tensor], classes: int,
) -> list[ClassStatistics]:  # fmt: skip
    """Each member's statistics of all its rows, by class: of the inputs of its head, or of its model's outputs.

    Each member's adapter has the entries of its vector (n,).
    """
    seen: list[Tensor] = []
    head = [*context.stack.head.values()]
    hooks = []
    if what == "features":
        hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in head]
    found: list[list[Tensor]] = [[] for _ in members]
    rows = [member.rows for member in members]
    try:
        for slots, outputs, _ in _each_batch(context, members, vectors, rows):
            measured = outputs
            if what == "features":
                measured = deciding(seen.pop().float(), context.stack.batch.segments)
            for slot, own in zip(slots, context.stack.batch.segments_of(measured).split(measured), strict=True):
                found[slot].append(own)
    finally:
        for hook in hooks:
            hook.remove()
    width = head[0].in_features if what == "features" else classes
    together = [torch.cat(own).cpu() if own else torch.zeros(0, width) for own in found]
    labels = [torch.from_numpy(context.data.labels[own]).long() for own in rows]
    return [ClassStatistics.of(own, own_labels, classes) for own, own_labels in zip(together, labels)]


def deciding(states: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The vector (rows, d) of each row that decides its class, from what enters the head of the ``segments``' rows.

    GPT-2's head sees every token (rows, tokens, d), and the last real one decides. Without padding it sees that alone.
    """
    if states.ndim < 3:
        return states
    lengths = [length for segment in segments for length in segment.lengths or ()]
    last = to_device((torch.tensor(lengths) - 1).clamp(max=states.shape[1] - 1), states.device)
    return states[torch.arange(len(states), device=states.device), last]


def _each_batch(
    context: TrainingContext, members: Sequence[PackMember], vectors: Sequence[Tensor], rows: Sequence[np.ndarray]
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(slots, outputs, labels) of each batch of the members' ``rows``, while the stack holds the batch's segments.

    Batches are as large as in training.
    """
    stack, data, size = context.stack, context.data, context.settings.batch_size
    stack.load([m.layout.unflatten(own) for m, own in zip(members, vectors, strict=True)], [m.base for m in members])
    for start in range(0, max(map(len, rows)), size):
        batches = {slot: own[start : start + size] for slot, own in enumerate(rows) if start < len(own)}
        segments = [Segment(slot, len(own), lengths=data.lengths[own].tolist()) for slot, own in batches.items()]
        with stack.using(segments):
            batch = on_device(data.batch(np.concatenate([*batches.values()]), context.padded), context.device)
            labels = batch.pop("labels")
            yield [*batches], context.forward(batch).float(), labels


def _measured(member: PackMember, most: int | None, seed: int, t: int) -> np.ndarray:
    """The rows of a member that are measured: all, or ``most`` random ones, in their order."""
    if most is None or len(member.rows) <= most:
        return member.rows
    draw = seeding.numpy_rng(seed, "weighting.rows", t, member.client)
    return member.rows[np.sort(draw.choice(len(member.rows), most, replace=False))]
