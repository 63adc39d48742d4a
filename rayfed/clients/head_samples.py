"""The loss of the samples on which heads train under an objective that draws some, see `Stateful.samples`.

The samples are inputs of the head, which is one linear layer. They are no rows of the batch and pass through no other
layer. A client's samples are keyed by the client and the step, and drawn on the CPU: the same in any pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from rayfed import seeding
from rayfed.device import to_device
from rayfed.lora.packed.segments import Segment, Segments
from rayfed.objectives import Stateful

if TYPE_CHECKING:
    from rayfed.clients.local_training import PackMember, TrainingContext


def samples_loss(
    context: TrainingContext, objective: Stateful, members: Sequence[PackMember], sizes: Mapping[int, int], t: int,
    step: int,
) -> Tensor | None:  # fmt: skip
    """The sum over clients of their samples' mean losses, with the objective's weight; None without samples.

    ``sizes`` has the rows of each active slot's batch. Called while the stack holds the values of the step.
    """
    segments, features, labels = [], [], []
    for slot, rows in sizes.items():
        known = members[slot].context
        draw = seeding.torch_rng(context.seed, "objective.samples", t, members[slot].client, step)
        drawn = None if known is None else objective.samples(known, rows, draw)
        if drawn is None:
            return None
        segments.append(Segment(slot, len(drawn[1])))
        features.append(drawn[0])
        labels.append(drawn[1])
    (head,) = context.stack.head.values()
    x, runs = torch.cat(features), Segments(segments, False, context.device)
    if context.normalized:
        x = normalize(x, dim=-1) * x.shape[-1] ** 0.5
    outputs = head.outputs(to_device(x, context.device), runs).float()
    losses = cross_entropy(outputs, to_device(torch.cat(labels), context.device), reduction="none")
    ones = torch.ones_like(losses)
    means = runs.pad(losses[:, None]).sum((1, 2)) / runs.pad(ones[:, None]).sum((1, 2))
    return objective.sample_weight * means.sum()
