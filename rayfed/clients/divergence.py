"""Divergence: when a client's training counts as diverged, and what is left of its change then.

A training diverged if an entry of the client's change is not finite, or if the L2 norm of the change, over all entries
of its adapter and head, is over `client.max_change`. The check needs the client alone. It is made where the client
trained, before anything is selected, encoded or summed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from rayfed.clients.local_training import PackMember, TrainedClient
from rayfed.clients.messages import Divergence
from rayfed.config.training import Client


def checked(
    trained: TrainedClient, member: PackMember, settings: Client, always_sends: bool = False
) -> tuple[TrainedClient, Divergence | None]:
    """The client's result, with its change scaled to `client.max_change` if `client.on_divergence` is `clip`.

    With ``always_sends`` a client that would be dropped has changed nothing, and is not dropped.
    The divergence is None if the training did not diverge; then the result keeps its bits.
    """
    change, limit = trained.vector - member.start, settings.max_change
    # A sum of squares of float32 fits into float64. So the norm is finite exactly where the change is.
    norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    stays = replace(trained, vector=member.start) if always_sends else trained
    if not math.isfinite(norm):
        return stays, Divergence("training gave values that are not finite", dropped=not always_sends)
    if limit is None or norm <= limit:
        return trained, None
    reason = f"training gave a change of L2 norm {norm:.3g}, over client.max_change={limit:g}"
    if settings.on_divergence != "clip":
        return stays, Divergence(reason, dropped=not always_sends)
    return replace(trained, vector=member.start + change * (limit / norm)), Divergence(reason, dropped=False)
