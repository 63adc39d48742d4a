"""User-level privacy over all methods: one client changes the sum by at most C, and the method gets nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_oracles import NON_SQUARE, training
from small_runs import lowrank

import rayfed
from rayfed.api.plans import build_components
from rayfed.config.privacy import Privacy as Settings
from rayfed.config.training import Client, Server
from rayfed.errors import UserError
from rayfed.lora.adapter import Layout
from rayfed.methods import METHODS, Profile, Sparse, build
from rayfed.privacy import UserLevel, private_methods
from rayfed.privacy import build as build_privacy
from rayfed.privacy.user import CLIP_NORM
from rayfed.wire import decode, encode

ON = ("privacy.kind=user", "client.on_divergence=drop")
FREE = (*ON, "privacy.noise_multiplier=0")
CASES = [(name, {}) for name in private_methods()] + [("fedhl", {"gamma": 0.0}), ("slora", {"rounds_sparse": 1})]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}{''.join(o)}" for n, o in CASES])


def mechanism(rank=4, scale=2.0, cohort=3, **own) -> UserLevel:
    """Noise multiplier 0 unless it is given; no accounting is asked for."""
    settings = Settings(kind="user", **{"noise_multiplier": 0.0, **own})
    server, profile = Server(cohort=cohort, sampling="poisson"), Profile(-1, rank, scale)
    made = build_privacy(settings, server, Client(), profile, 7, 1000, lambda t: [], [])
    assert isinstance(made, UserLevel)
    return made


def trained(play, method, state, clients, t=0):
    """The clients' updates with weight 1."""
    return play(method, state, clients, training(t), weights=[1.0] * len(clients))[1]


def summed(privacy, method, state, updates, t=0, moments=None):
    """The flat sum of the clipped updates, and the updates that the method gets: the last one is the mean."""
    release = privacy.release(method, state, t, {} if moments is None else moments)
    *others, released = release.mean([release.clipped(update) for update in updates])
    assert len(others) == (len(updates) if method.personal else 0)
    assert not any(update.weight or update.change.any() for update in others)
    return released.change.double() * privacy.cohort, [*others, released]


def cohort_of(method, count=4):
    ranks = (4, 1, 2, 4) if method.mixed_ranks else (4,) * 4
    return [Profile(k, r, 8.0 / r, density_up=(1.0, 0.3)[k % 2]) for k, r in enumerate(ranks[:count])]


@every_case
def test_one_client_changes_the_sum_by_at_most_the_clip_norm(play, random_adapter, name, options):
    method = build(name, **options)
    state = method.init(random_adapter(NON_SQUARE, 4, 2.0, seed=1), seed=7)
    for t, clip in enumerate((0.3, 2.0, 5.0)):
        privacy = mechanism(clip_norm=clip)
        updates = trained(play, method, state, cohort_of(method), t)
        whole, _ = summed(privacy, method, state, updates)
        for k in range(4):
            without, _ = summed(privacy, method, state, [*updates[:k], *updates[k + 1 :]])
            assert float((whole - without).norm()) <= clip * (1 + 1e-5)
        if clip < 1:  # all are clipped: then the difference is C, so that the bound is not met by chance
            assert float((whole - without).norm()) == pytest.approx(clip, rel=1e-4)
        state, _ = play(method, state, cohort_of(method), training(t), weights=[1.0] * 4)


@every_case
def test_the_method_needs_no_more_than_the_mean(play, random_adapter, name, options):
    """With no limit and no noise the one update leads to the state of all updates."""
    method = build(name, **options)
    state = method.init(random_adapter(NON_SQUARE, 4, 2.0, seed=1), seed=7)
    for t in range(3):
        updates = trained(play, method, state, cohort_of(method), t)
        after = method.aggregate(state, iter(updates))
        _, released = summed(mechanism(clip_norm=1e30, cohort=4), method, state, updates)
        same = method.aggregate(state, iter(released))
        for key, tensor in after.tensors().items():
            torch.testing.assert_close(same.tensors()[key], tensor, rtol=1e-4, atol=1e-5)
        state = after


@pytest.mark.parametrize("name", METHODS)
def test_all_other_methods_are_refused_by_name(name):
    if name in private_methods():
        build_components(lowrank(f"method.name={name}", *FREE))
        return
    with pytest.raises(
        UserError, match=rf"privacy\.kind: got 'user', .* but {name} cannot use it: .*; it is taken by fed"
    ):
        build_components(lowrank(f"method.name={name}", *FREE))
    if name == "fedhl":
        build_components(lowrank("method.name=fedhl", "method.gamma=0.0", *FREE))


@pytest.mark.parametrize("values", ["fp32", "bf16", "fp16", "int8", "qsgd2"])
@pytest.mark.parametrize("order", ["sparsify_first", "clip_first"])
def test_the_norm_is_bounded_after_the_wire(random_adapter, values, order):
    """Rounding may lengthen a vector; the server clips what it has decoded."""
    method = build("flasc")
    adapter = random_adapter(NON_SQUARE, 4, 2.0, seed=1)
    state, draw = method.init(adapter, seed=7), torch.Generator().manual_seed(3)
    privacy, layout = mechanism(clip_norm=0.7, order=order), adapter.layout
    release = privacy.release(method, state, 0, {})
    for _ in range(20):
        change = torch.randn(layout.size, generator=draw)
        change = privacy.client_change(change, torch.ones(layout.size, dtype=torch.bool), layout.size, 0, 1)
        assert order == "sparsify_first" or float(change.norm()) == pytest.approx(0.7)
        arrived = decode(encode(change, values=values, seed=3)).dense()
        update = release.clipped(rayfed.methods.Update(Profile(0, 4, 2.0), 1.0, adapter.flatten(), arrived, layout))
        assert float((update.weight * update.change.double()).norm()) <= 0.7 * (1 + 1e-12)


def test_sparse_and_dense_forms_of_a_change_have_one_norm(random_adapter):
    method, adapter = build("flasc"), random_adapter(NON_SQUARE, 4, 2.0, seed=1)
    state, n = method.init(adapter, seed=7), adapter.layout.size
    sparse = Sparse(n, torch.tensor([1, 5]), torch.tensor([3.0, 4.0]))
    for change in (sparse, sparse.dense()):
        update = rayfed.methods.Update(Profile(0, 4, 2.0), 1.0, adapter.flatten(), change, adapter.layout)
        assert mechanism(clip_norm=1.0).release(method, state, 0, {}).clipped(update).weight == pytest.approx(0.2)


def noised(name, options, random_adapter, t=0, count=40, **own):
    """The noise in the sums of ``count`` empty rounds, and of how many clients the noise is made for."""
    method = build(name, **options)
    state = method.init(random_adapter({"layer": (40, 30)}, 4, 2.0, seed=1), seed=7)
    privacy = replace(mechanism(clip_norm=0.5, **own), noise_multiplier=2.0)
    sums = [summed(privacy, method, state, [], t)[0] for t in range(count)]
    return torch.stack(sums), method, state


@pytest.mark.parametrize(
    ("name", "options"), [("flasc", {}), ("ffa_lora", {}), ("rolora", {}), ("fedhl", {"gamma": 0.0})]
)
def test_the_noise_is_on_every_entry_that_can_be_sent_and_on_no_other(random_adapter, name, options):
    """sigma = z C = 1: with over 5,000 draws it is off by 1 % in the mean, so 3 % are three standard errors."""
    sums, method, state = noised(name, options, random_adapter, count=60)
    if name != "fedhl":
        start, own = method.broadcast(state, Profile(-1, 4, 2.0)), method.trainable(state, Profile(-1, 4, 2.0))
        trains = own.support(start.layout, None)
        assert bool(sums[:, trains].all())
        assert not sums[:, ~trains].any()
        sums = sums[:, trains]
    else:
        assert int((sums != 0).any(0).sum()) == 40 * 30 + 15  # the product and the head
        sums = sums[:, (sums != 0).any(0)]
    assert float(sums.std()) == pytest.approx(1.0, rel=0.02)


def test_a_larger_deployment_has_less_noise_in_the_mean(random_adapter):
    """noise_cohort 300 where 3 take part: the sum's noise is a hundredth."""
    sums, _, _ = noised("fedit", {}, random_adapter, noise_cohort=300, noise_population=30_000)
    assert float(sums.std()) == pytest.approx(0.01, rel=0.02)


def test_the_accounting_is_that_of_the_deployment():
    own = mechanism(noise_cohort=300, noise_population=30_000).uses(7)
    assert [(u.count, u.sampling, u.sample, u.population) for u in own] == [(7, "poisson", 300, 30_000)]
    (own,) = mechanism().uses(7)
    assert (own.count, own.sample, own.population) == (7, 3, 1000)


def test_the_clip_norm_follows_the_quantile(random_adapter):
    """Norms 1 to 100, the 0.3 quantile: the norm settles near 30, from above and from below."""
    method, adapter = build("fedit"), random_adapter({}, 4, 2.0, seed=1)
    state, layout = method.init(adapter, seed=7), adapter.layout
    unit = torch.zeros(layout.size).index_fill_(0, torch.tensor([0]), 1.0)
    updates = [
        rayfed.methods.Update(Profile(k, 4, 2.0), 1.0, adapter.flatten(), unit * (k + 1), layout) for k in range(100)
    ]
    for first in (1.0, 500.0):
        privacy, moments = mechanism(cohort=100, clip_norm=first, quantile=0.3, quantile_lr=1.0), {}
        for t in range(60):
            summed(privacy, method, state, updates, t, moments)
        assert 28 <= float(moments[CLIP_NORM]) <= 32


def test_the_count_has_noise_of_its_own_that_the_updates_pay_for():
    """Two Gaussian sums over one sample: their precisions add up to that of z."""
    privacy = replace(mechanism(cohort=100, quantile=0.5), noise_multiplier=2.0)
    assert privacy.count_noise == 5.0
    assert privacy.sum_noise**-2 + (2 * privacy.count_noise) ** -2 == pytest.approx(2.0**-2)
    assert replace(privacy, settings=privacy.settings.model_copy(update={"quantile": None})).sum_noise == 2.0
    with pytest.raises(UserError, match=r"privacy\.quantile_noise: got 0\.5, but with noise of 2 .* above 1"):
        replace(privacy, settings=privacy.settings.model_copy(update={"quantile_noise": 0.5})).check()


def test_layouts_are_compared_by_their_entries(random_adapter):
    layout = random_adapter(NON_SQUARE, 4, 2.0, seed=1).layout
    assert layout == Layout.from_json(layout.to_json())
