"""The gradients of a pack: one forward and backward pass, and no step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayfed.clients.local_training import PackMember, PackTraining, TrainedClient, TrainingContext


def pack_gradients(
    context: TrainingContext, members: Sequence[PackMember], *, t: int, step: int
) -> list[TrainedClient]:
    """Each member's gradient at its start, as ``vector`` (n,); 0 where an entry does not train.

    The batch, the dropout and the clipping (`client.clip_norm`) are those of local step ``step`` (from 0) of round
    ``t``. The results are in the order given, and the same in any pack. A member without such a step has a gradient of
    0.
    """
    pack, stack = PackTraining(context, members, 0.0, t), context.stack
    slots = range(len(members))
    active = [slot for slot in slots if step < len(pack.plans[slot])]
    if active:
        with stack.using(pack.segments(active, step)):
            loss = pack.loss(active, pack.batch(active, step), step)
            if pack.parameters.trained:
                loss.backward()
    pack.parameters.mask_gradients()
    if context.settings.clip_norm is not None:
        pack.parameters.clip(context.settings.clip_norm)
    with torch.no_grad():
        for values in stack.parameters.values():
            values.copy_(torch.zeros_like(values) if values.grad is None else values.grad)
    stack.snapshot(slots)
    vectors = stack.read_snapshots([member.layout for member in members])
    losses = pack.losses.tolist()
    rows = [len(pack.plans[slot][step]) if slot in active else 0 for slot in slots]
    return [
        TrainedClient(vector, loss, examples, int(examples > 0))
        for vector, loss, examples in zip(vectors, losses, rows, strict=True)
    ]
