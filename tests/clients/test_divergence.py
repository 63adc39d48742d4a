"""What counts as a divergence, and what is left of a change then."""

from __future__ import annotations

import pytest
import torch

from rayfed.clients.divergence import checked
from rayfed.clients.local_training import PackMember, TrainedClient
from rayfed.clients.messages import Divergence, uploads_by_part
from rayfed.config.training import Client
from rayfed.lora.adapter import Layout

START = torch.tensor([1.0, -2.0, 0.0, 1e-3])
MEMBER = PackMember(3, Layout((), {}), START, torch.ones(4, dtype=torch.bool), torch.arange(2).numpy())


def after(change: list[float], settings: Client) -> tuple[TrainedClient, TrainedClient, Divergence | None]:
    trained = TrainedClient(START + torch.tensor(change), 0.5, 2, 1)
    return trained, *checked(trained, MEMBER, settings)


def test_a_change_within_the_limit_keeps_its_bits():
    trained, result, divergence = after([3.0, 4.0, 0.0, 0.0], Client(max_change=5.0, on_divergence="clip"))
    assert result is trained
    assert divergence is None


@pytest.mark.parametrize("policy", ["fail", "drop", "clip"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_dropped_whatever_the_limit(policy, value):
    for limit in (1.0, None) if policy != "clip" else (1.0,):
        *_, divergence = after([0.0, 0.0, value, 0.0], Client(max_change=limit, on_divergence=policy))
        assert divergence == Divergence("training gave values that are not finite", dropped=True)


def test_a_change_over_the_limit_is_dropped_or_scaled_to_it():
    *_, divergence = after([30.0, 40.0, 0.0, 0.0], Client(max_change=5.0, on_divergence="drop"))
    reason = "training gave a change of L2 norm 50, over client.max_change=5"
    assert divergence == Divergence(reason, dropped=True)
    trained, result, divergence = after([30.0, 40.0, 0.0, 0.0], Client(max_change=5.0, on_divergence="clip"))
    assert divergence == Divergence(reason, dropped=False)
    torch.testing.assert_close(result.vector - START, torch.tensor([3.0, 4.0, 0.0, 0.0]))
    assert (result.loss, result.examples, result.steps) == (trained.loss, trained.examples, trained.steps)


def test_a_norm_that_float32_could_not_hold_is_finite():
    """Its square is over float32's largest number; so is the norm's square of many such entries in float64's range."""
    trained, _, divergence = after([3e38, -3e38, 3e38, 0.0], Client(max_change=None))
    assert bool(torch.isfinite(trained.vector).all())
    assert divergence is None
    _, clipped, _ = after([3e38, -3e38, 3e38, 0.0], Client(max_change=3.0, on_divergence="clip"))
    assert float((clipped.vector - START).norm()) == pytest.approx(3.0)


def test_parts_count_the_uploads_that_are_there():
    assert uploads_by_part([b"a", None, b"b", None, None, b"c"], (3, 2, 1)) == (2, 1)
    assert uploads_by_part([None], (1,)) == ()
