"""The equations of the channel: an exact sum without noise, the variance with it, and the power limit."""

from __future__ import annotations

import math

import pytest
import torch

from rayfed.channels import OverTheAir, build
from rayfed.config.channel import Channel

K, D = 5, 4000


def changes(seed: int = 0) -> torch.Tensor:
    draw = torch.randn(K, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw * torch.tensor([[0.1], [1.0], [3.0], [0.5], [2.0]]) + torch.arange(K)[:, None]


def transmitted(channel: OverTheAir, g: torch.Tensor, p: torch.Tensor, t: int = 0):
    """(estimate (d,), sent signals (K, d), eta) of one round."""
    means, stds = g.mean(1), g.std(1, correction=0)
    h = [channel.fading(t, k) for k in range(len(g))]
    eta = channel.scaling(torch.tensor(h, dtype=torch.complex128), p, stds)
    sent = [channel.signal(own, *of, eta) for own, *of in zip(g, h, p.tolist(), means.tolist(), stds.tolist())]
    received = channel.received(sum(a * b for a, b in zip(h, sent)), t)
    return received / math.sqrt(eta) + p @ means, torch.stack(sent), eta


def test_the_sum_is_exact_without_noise_and_the_bottleneck_sends_with_full_power():
    channel = OverTheAir(power=2.0, noise=0.0, truncation=0.0, seed=3)
    g, p = changes(), torch.tensor([0.1, 0.2, 0.3, 0.3, 0.1], dtype=torch.float64)
    estimate, sent, _ = transmitted(channel, g, p)
    assert (estimate - p @ g).abs().max() < 1e-12
    power = (sent.abs() ** 2).mean(1)
    assert float(power.max()) == pytest.approx(2.0, rel=1e-12)
    assert bool((power <= 2.0 * (1 + 1e-12)).all())


def test_noise_has_the_variance_that_follows_from_eta():
    channel = OverTheAir(power=1.0, noise=0.3, truncation=0.0, seed=3)
    g, p = changes(), torch.full((K,), 1 / K, dtype=torch.float64)
    errors, rounds = [], 10
    for t in range(rounds):
        estimate, _, eta = transmitted(channel, g, p, t)
        errors.append((estimate - p @ g) * math.sqrt(2 * eta / 0.3))  # of variance 1
    error = torch.cat(errors)
    assert abs(float(error.mean())) < 5 / math.sqrt(rounds * D)
    assert abs(float(error.square().mean()) - 1) < 5 * math.sqrt(2 / (rounds * D))


def test_fading_is_rayleigh_and_keyed():
    channel = OverTheAir(1.0, 0.0, 0.0, seed=1)
    h = torch.tensor([channel.fading(t, k) for t in range(40) for k in range(50)])
    gains = h.abs() ** 2  # exponential, of mean and standard deviation 1
    assert abs(float(gains.mean()) - 1) < 5 / math.sqrt(len(h))
    assert abs(float((gains > 1).double().mean()) - math.exp(-1)) < 5 * 0.5 / math.sqrt(len(h))
    assert channel.fading(3, 4) == channel.fading(3, 4) != channel.fading(4, 3)
    assert channel.fading(3, 4) != OverTheAir(1.0, 0.0, 0.0, seed=2).fading(3, 4)


def test_a_client_without_weight_or_without_movement_sends_nothing():
    channel = OverTheAir(1.0, 0.0, 0.0, seed=1)
    g = changes()
    g[1] = 7.0  # all entries equal: its mean says all
    p = torch.tensor([0.4, 0.3, 0.0, 0.2, 0.1], dtype=torch.float64)
    estimate, sent, _ = transmitted(channel, g, p)
    assert not sent[1].any()
    assert not sent[2].any()
    assert (estimate - p @ g).abs().max() < 1e-12
    assert channel.scaling(torch.ones(2), torch.ones(2), torch.zeros(2)) is None


def test_the_settings_give_the_noise():
    own = build(Channel(kind="over_the_air", snr=20.0, power=4.0), seed=0)
    assert isinstance(own, OverTheAir)
    assert own.noise == pytest.approx(0.04)
    assert build(Channel(kind="over_the_air", noise=0.5), seed=0).noise == 0.5
