"""The cost of packs on this process's device: seconds and memory of a step, by the size of the pack.

Real clients of the run take two steps each, with the largest adapter, of which every entry trains. Every size is tried
once and then timed three times; the fastest time counts. Sizes grow until memory is short, or until a larger pack has
twice in a row hardly shortened a client's share of a step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rayfed.clients import device_memory
from rayfed.clients.local_training import PackMember, batches, train_pack
from rayfed.clients.messages import PackTiming

if TYPE_CHECKING:
    from rayfed.clients.trainer import Trainer

STEPS, TIMES = 2, 3
PAYS = 0.03  # a larger pack pays if it saves at least this share of the time


def measure(trainer: Trainer, clients: Sequence[int], sizes: Sequence[int], room: int) -> Iterator[PackTiming]:
    """Yields the timing of packs of the first clients, for each of the ascending ``sizes``, within ``room`` bytes.

    RunError where the first size does not fit.
    """
    plan, device, data = trainer.plan, trainer.device, trainer.context.data
    settings = plan.client.model_copy(update={"steps": STEPS})
    context = replace(trainer.context, settings=settings)
    start = plan.start()
    vector, everything = start.flatten(), torch.ones(start.layout.size, dtype=torch.bool)
    rows = {client: plan.federation_at(0).rows_of(client) for client in clients}

    def train(size: int) -> float:
        members = [PackMember(c, start.layout, vector, everything, rows[c]) for c in clients[:size]]
        begun = time.perf_counter()
        train_pack(context, members, lr=settings.lr, t=0)
        return time.perf_counter() - begun

    used, unhelpful, last = device_memory.forget_peak(device), 0, float("inf")
    for size in sizes:
        device_memory.forget_peak(device)
        try:
            train(size)
            seconds = min(train(size) for _ in range(TIMES)) / STEPS
        except (RuntimeError, MemoryError) as error:
            if not device_memory.ran_out(error):
                raise
            if size == sizes[0]:
                raise device_memory.too_little(f"client {clients[0]}: training it alone", device) from None
            return
        tokens = sum(
            int(data.lengths[batch].sum())
            for c in clients[:size]
            for batch in batches(rows[c], settings, plan.seed, 0, c)
        )
        taken = max(device_memory.peak(device) - used, 0)
        yield PackTiming(size, tokens / STEPS, seconds, taken)
        unhelpful = unhelpful + 1 if seconds / size > (1 - PAYS) * last else 0
        last = seconds / size
        if unhelpful == 2 or 2 * taken > room:
            return
