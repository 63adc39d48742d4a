"""RoLoRA: one factor moves a round, B first, and the mean of factors is the mean of products."""

import pytest
import torch

from rayfed.methods.base import Profile
from rayfed.methods.rolora import RoLoRA

SHAPES = {"tall": (7, 5), "wide": (4, 9)}
COHORTS = [
    [Profile(0, 2, 4.0, examples=3), Profile(1, 2, 4.0, density_up=0.3, examples=5)],
    [Profile(2, 2, 4.0, examples=1)],
    [Profile(1, 2, 4.0, examples=5), Profile(2, 2, 4.0, examples=1), Profile(0, 2, 4.0, density_up=0.3, examples=3)],
    [Profile(3, 2, 4.0, examples=2), Profile(0, 2, 4.0, examples=3)],
]


def noise(round_):
    """Moves every entry of the adapter, also those that must not train."""

    def train(client, start, adapter):
        rng = torch.Generator().manual_seed(100 * round_ + client.client)
        return start.layout.unflatten(adapter.flatten() + 0.3 * torch.randn(start.layout.size, generator=rng))

    return train


def start_state(method, random_adapter, zero_B):
    adapter = random_adapter(SHAPES, 2, 4.0, seed=1)
    if zero_B:
        for pair in adapter.layers.values():
            pair.B.zero_()
    return method.init(adapter, seed=0)


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("zero_B", [True, False])
def test_every_round_is_the_mean_of_products(play, random_adapter, zero_B):
    method = RoLoRA()
    state = start_state(method, random_adapter, zero_B)
    for t, cohort in enumerate(COHORTS):
        state, updates = play(method, state, cohort, noise(t))
        total = sum(u.weight for u in updates)
        for name in SHAPES:
            wanted = torch.zeros(SHAPES[name], dtype=torch.float64)
            for u in updates:
                pair = u.trained.layers[name]
                wanted += u.weight / total * 4.0 * (pair.B.double() @ pair.A.double())
            assert error(method.delta(state, name).dense(), wanted) < 1e-6
        head = sum(u.weight / total * u.trained.head["head.weight"].double() for u in updates)
        assert error(method.head(state)["head.weight"], head) < 1e-6


def test_b_first_and_the_frozen_factor_keeps_its_bits(play, random_adapter):
    method = RoLoRA()
    state = start_state(method, random_adapter, zero_B=True)
    # A server step with a mind of its own, as weight decay and momentum have: it must not reach the frozen factor.
    restless = lambda name, value, change: 0.9 * value + change + 0.01  # noqa: E731
    for t, cohort in enumerate(COHORTS):
        before, after = state, play(method, state, cohort, noise(t), advance=restless)[0]
        moved = before.vector != after.vector
        trained, frozen = ("B", "A") if t % 2 == 0 else ("A", "B")
        assert not moved[state.layout.mask(frozen)].any()
        assert moved[state.layout.mask(trained, "head")].all()
        state = after


def test_only_the_factor_that_trains_goes_up(play, random_adapter):
    method = RoLoRA()
    state = start_state(method, random_adapter, zero_B=False)
    for t, part in enumerate("BABA"):
        allowed = state.layout.mask(part, "head")
        trainable = method.trainable(state, COHORTS[0][0])
        assert torch.equal(trainable.uploaded(state.layout, trainable.whole(state.layout)), allowed)
        state, updates = play(method, state, COHORTS[t], noise(t))
        assert all(not u.change[~allowed].any() for u in updates)


def test_what_does_not_travel_is_what_the_client_has(play, random_adapter):
    method, everybody = RoLoRA(down="changed"), COHORTS[2]
    state = start_state(method, random_adapter, zero_B=True)
    assert method.broadcast(state, everybody[0]).known is None
    for t in range(4):
        has = state.vector
        state, _ = play(method, state, everybody, noise(t))
        start = method.broadcast(state, everybody[0])
        assert torch.equal(start.vector[start.known], has[start.known])
        assert torch.equal(~start.known, state.layout.mask("BA"[t % 2], "head"))
    assert RoLoRA().broadcast(state, everybody[0]).known is None
