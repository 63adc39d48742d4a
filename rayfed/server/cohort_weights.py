"""Weights that depend on the cohort: known once all uploads of a round are there, before the first is aggregated.

Until then uploads are stored as bytes. One is decoded at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rayfed import wire
from rayfed.clients.messages import ClientOrder, TrainResult
from rayfed.clients.plan import RunPlan
from rayfed.errors import RunError
from rayfed.lora.adapter import scale_of
from rayfed.methods import Update, change_norm
from rayfed.profiles.profile import Profile

Arrived = tuple[Sequence[tuple[Profile, ClientOrder]], TrainResult]
"""A pack's clients with their orders, and its result. A client whose upload is None does not count."""
Decode = Callable[[Arrived], Iterator[Update]]
"""The decoded updates of a pack's clients that sent something, in order, one at a time."""


def weighed(plan: RunPlan, cohort: Sequence[Arrived], decode: Decode) -> tuple[list[Arrived], dict[str, float | None]]:
    """(the results with the weights of `RunPlan.weighting` in their orders, its metrics). The weights sum to 1.

    RunError where a weighting of the user's own returns no weights.
    """
    own, clients = plan.weighting, [client for client, _, _ in senders(cohort)]
    report: dict[str, float | None] = {}
    if not clients:
        return [*cohort], {}
    if own.needs is None:
        weights = torch.tensor([order.weight for _, order, _ in senders(cohort)], dtype=torch.float64)
    else:
        statistics = _statistics(plan, cohort, decode)
        weights = torch.as_tensor(own.weights(clients, statistics), dtype=torch.float64)
        report = {f"weighting/{name}": value for name, value in own.report(statistics).items()}
    valid = weights.shape == (len(clients),) and bool((weights >= 0).all()) and 0 < float(weights.sum()) < torch.inf
    if not valid:
        what = "they must be finite numbers of at least 0, one a client, with a sum above 0"
        raise RunError(f"server.weights: {type(own).__name__}.weights returned {weights.tolist()[:5]}: {what}")
    shares = iter((weights / weights.sum()).tolist())
    return [
        ([(c, replace(o, weight=next(shares)) if sends else o) for (c, o), sends in zip(pack, _sends(result))], result)
        for pack, result in cohort
    ], report


def senders(cohort: Iterable[Arrived]) -> Iterator[tuple[Profile, ClientOrder, bytes]]:
    """(client, order, upload) of every client that sent something, in order."""
    for pack, result in cohort:
        for (client, order), upload in zip(pack, result.uploads, strict=True):
            if upload is not None:
                yield client, order, upload


def _sends(result: TrainResult) -> list[bool]:
    return [upload is not None for upload in result.uploads]


def _statistics(plan: RunPlan, cohort: Sequence[Arrived], decode: Decode) -> Tensor:
    """What the weighting needs of the clients that sent something, (K, s) float64."""
    if plan.weighting.needs == "change_norms":
        lora, averages = plan.lora, plan.method.averages
        scale = scale_of(lora.rank, lora.alpha, lora.rslora)
        norms = [change_norm(update, averages, scale) for arrived in cohort for update in decode(arrived)]
        return torch.tensor(norms, dtype=torch.float64)[:, None]
    sent = [
        wire.decode(own).dense()
        for _, result in cohort
        for own, sends in zip(result.statistics, _sends(result), strict=True)
        if sends and own is not None
    ]
    return torch.stack(sent).double()
