"""Local privacy: what a client's change becomes before anything of it is chosen or sent."""

from __future__ import annotations

import pytest
import torch

from rayfed.clients.divergence import checked
from rayfed.clients.local_training import PackMember, TrainedClient
from rayfed.config.privacy import Privacy as Settings
from rayfed.config.training import Client
from rayfed.lora.adapter import Layout
from rayfed.privacy.accounting import Guarantee
from rayfed.privacy.local import Local, most_participations

N = 30_000
UPLOADED = torch.arange(N) % 3 > 0


def local(z=0.0, clip=1.0, **own):
    settings = Settings(kind="local", noise_multiplier=z, clip_norm=clip, **own)
    return Local(settings, 7, Guarantee(1e-5, "pld"), z, 9, (1, 1, 2))


def change(size, seed=0):
    drawn = torch.randn(N, generator=torch.Generator().manual_seed(seed)) * UPLOADED
    return drawn * (size / drawn.norm())


def sent(privacy, size, budget=N, t=0, client=1):
    return privacy.client_change(change(size), UPLOADED, budget, t, client)


def test_a_change_is_clipped_and_gets_noise_where_it_may_be_sent():
    """z C = 1, in 20,000 entries: sigma is off by 0.5 %."""
    assert torch.allclose(sent(local(clip=2.0), 1.0), change(1.0))
    assert torch.allclose(sent(local(clip=2.0), 8.0), change(2.0))
    noise = sent(local(z=0.5, clip=2.0), 8.0) - change(2.0)
    assert not noise[~UPLOADED].any()
    assert bool(noise[UPLOADED].all())
    assert float(noise[UPLOADED].std()) == pytest.approx(1.0, rel=0.02)


def test_each_client_and_round_has_noise_of_its_own():
    base = sent(local(z=1.0), 1.0)
    assert torch.equal(base, sent(local(z=1.0), 1.0))
    assert not torch.allclose(base, sent(local(z=1.0), 1.0, t=1))
    assert not torch.allclose(base, sent(local(z=1.0), 1.0, client=2))


def test_a_random_mask_does_not_depend_on_the_change():
    """Its entries are drawn before; clipping and noise are of these entries alone."""
    privacy = local(z=1.0, mask="random")
    masks = [privacy.client_change(change(1.0, seed), UPLOADED, 500, 0, 1) != 0 for seed in (0, 1)]
    assert torch.equal(*masks)
    assert int(masks[0].sum()) == 500
    assert not masks[0][~UPLOADED].any()
    assert not torch.equal(masks[0], privacy.client_change(change(1.0), UPLOADED, 500, 1, 1) != 0)
    clipped = local(mask="random", clip=0.01).client_change(change(1.0), UPLOADED, 500, 0, 1)
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-4)


def test_the_client_that_took_part_most_often_counts():
    cohorts = [[1, 2], [2], [3, 1], [2]]
    assert most_participations(lambda t: cohorts[t], 4) == (1, 2, 2, 3)
    assert [own.count for rounds in range(4) for own in local().uses(rounds)] == [0, 1, 1, 2]


@pytest.mark.parametrize("value", [float("nan"), 1e9])
def test_a_client_that_diverged_sends_a_change_of_zero(value):
    layout = Layout.of([("w", "head", (2,))], {})
    member = PackMember(0, layout, torch.ones(2), torch.ones(2, dtype=torch.bool), torch.zeros(0).numpy())
    trained = TrainedClient(torch.tensor([1.0, value]), 0.0, 1, 1)
    result, found = checked(trained, member, Client(on_divergence="drop"), always_sends=True)
    assert found is not None
    assert not found.dropped
    assert torch.equal(result.vector, member.start)
