"""A pass over the clients' own rows without gradients: what a weighting needs of the losses (`Weighting.needs`).

A client's losses are those of its rows alone, so they are the same in any pack to rounding. There is no dropout, and no
row is changed at random.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rayfed import seeding, wire
from rayfed.clients.local_training import PackMember, TrainingContext, on_device
from rayfed.lora.packed.segments import Segment
from rayfed.weighting import Weighting


def encoded_statistics(
    context: TrainingContext, weighting: Weighting, members: Sequence[PackMember], vectors: Sequence[Tensor], t: int
) -> list[bytes]:
    """Each member's `Weighting.statistics` in round ``t`` (from 0), as it sends them: of the model ``vectors`` (n,)."""
    rows = [_measured(member, weighting.rows, context.seed, t) for member in members]
    losses = row_losses(context, members, vectors, rows)
    return [wire.encode(torch.as_tensor(weighting.statistics(own), dtype=torch.float32)) for own in losses]


@torch.no_grad()
def row_losses(
    context: TrainingContext, members: Sequence[PackMember], vectors: Sequence[Tensor], rows: Sequence[np.ndarray]
) -> list[Tensor]:
    """The loss of each of a member's ``rows`` (m,), the mean over its terms: (m,) float64 on the CPU for each member.

    Each member's adapter has the entries of its vector (n,). Batches are as large as in training.
    """
    stack, data, size = context.stack, context.data, context.settings.batch_size
    stack.load([m.layout.unflatten(own) for m, own in zip(members, vectors, strict=True)], [m.base for m in members])
    found: list[list[Tensor]] = [[] for _ in members]
    for start in range(0, max(map(len, rows)), size):
        batches = {slot: own[start : start + size] for slot, own in enumerate(rows) if start < len(own)}
        segments = [Segment(slot, len(own), lengths=data.lengths[own].tolist()) for slot, own in batches.items()]
        with stack.using(segments):
            batch = on_device(data.batch(np.concatenate([*batches.values()]), context.padded), context.device)
            labels = batch.pop("labels")
            sums, counts = context.task.loss(context.forward(batch).float(), labels)
            losses = sums.double() / counts.clamp(min=1)
            for slot, own in zip(batches, stack.batch.segments_of(losses).split(losses), strict=True):
                found[slot].append(own)
    return [torch.cat(own).cpu() for own in found]


def _measured(member: PackMember, most: int | None, seed: int, t: int) -> np.ndarray:
    """The rows of a member that are measured: all, or ``most`` random ones, in their order."""
    if most is None or len(member.rows) <= most:
        return member.rows
    draw = seeding.numpy_rng(seed, "weighting.rows", t, member.client)
    return member.rows[np.sort(draw.choice(len(member.rows), most, replace=False))]
