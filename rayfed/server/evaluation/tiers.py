"""What each tier of clients would receive of the global model: which accuracy a device of that rank or density gets.

FLASC evaluates under every tier's mask; with mixed ranks it is the truncation that counts. A tier's model is its start
adapter as it would decode it, over the base that its clients have by then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from rayfed.config import Experiment
from rayfed.lora.adapter import Layout, LowRank, flatten_changes
from rayfed.methods import Method, Profile
from rayfed.profiles.client_profiles import Tier, client_scale, tier_mix
from rayfed.server.downlink import Downlink, Download
from rayfed.server.executor import Crew


def tier_models(
    method: Method, state: Any, experiment: Experiment, sizes: np.ndarray, t: int, crew: Crew
) -> dict[str, tuple[Tensor, Layout]]:
    """Each tier's model, by a suffix for its metrics: `_rank_4`, with `_density_0.25` where downloads are sparse.

    Nothing for methods whose clients all have models of their own. At most one model a tier is in memory beside the
    state; ``sizes`` (clients,) are the training rows per client.
    """
    if method.personal:
        return {}
    downlink = Downlink(method, state, experiment.wire.down.values, crew)
    models = {}
    for tier in tier_mix(experiment, sizes):
        density = experiment.wire.down.density_at(t, tier.density_down)
        scale = client_scale(tier.rank, experiment)
        received = downlink.of(Profile(client=-1, rank=tier.rank, scale=scale, density_down=density))
        models[suffix(tier, density)] = received_model(received)
    return models


def received_model(received: Download) -> tuple[Tensor, Layout]:
    """What a client that was sent this has: its start adapter over its base, as one vector (n,) with its layout."""
    adapter = received.start.layout.unflatten(received.vector)
    changes: dict[str, LowRank | Tensor] = {name: pair.folded() for name, pair in adapter.layers.items()}
    for name, below in received.start.base.items():
        under = below.dense() if isinstance(below, LowRank) else below
        above = changes.get(name)
        changes[name] = under + above.dense() if isinstance(above, LowRank) else under
    return flatten_changes(changes, adapter.head)


def suffix(tier: Tier, density: float) -> str:
    """How a tier is named in the metrics."""
    return f"_rank_{tier.rank}" + (f"_density_{density:g}" if density < 1 else "")
