"""A run that diverges ends with rayfed's own error, however large the numbers were on the way there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rayfed.errors import RunError
from rayfed.methods import METHODS, build
from rayfed.methods.base import Profile

SHAPES = {"q": (6, 5), "v": (4, 7)}
COHORT = [Profile(0, 2, examples=3), Profile(1, 2, examples=5, density_up=0.5)]


def exploding(size: float):
    def train(client, start, adapter):
        rng = torch.Generator().manual_seed(client.client)
        return start.layout.unflatten(adapter.flatten() + size * torch.randn(start.layout.size, generator=rng))

    return train


def test_a_fixed_mask_of_a_state_that_is_not_finite_is_left_to_the_downlink(random_adapter):
    method = build("flasc", mask="fixed")
    state = method.init(random_adapter(SHAPES, 2, 2.0, seed=1), seed=0)
    anchor = state.vector.clone()
    anchor[3], anchor[5] = float("nan"), float("inf")
    start = method.broadcast(
        replace(state, vector=anchor, extras={"anchor": anchor}), replace(COHORT[0], density_down=0.1)
    )
    assert not bool(torch.isfinite(start.vector).all())


@pytest.mark.parametrize("size", [1e12, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("name", METHODS)
def test_huge_updates_give_a_state_or_a_run_error(play, random_adapter, name, size):
    """The engine refuses a state or an upload that is not finite; what happens before that must not be a raw error."""
    method = build(name)
    state = method.init(random_adapter(SHAPES, 2, 2.0, seed=1), seed=0)
    refusal = None
    try:
        for _ in range(4):
            state, updates = play(method, state, COHORT, exploding(size))
            finite = all(bool(torch.isfinite(tensor).all()) for tensor in state.tensors().values())
            if not finite or not all(bool(torch.isfinite(update.change).all()) for update in updates):
                break
    except RunError as error:
        refusal = str(error)
    assert refusal is None or "not finite" in refusal
