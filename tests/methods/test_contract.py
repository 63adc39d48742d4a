"""What every method promises, on small made adapters: a file in rayfed/methods/ is tested by being there."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_oracles import NON_SQUARE, dense, training
from safetensors.torch import load, save

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import METHODS, Profile, build

RANK = 4
OUTPUTS = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text(encoding="utf-8")
OBJECTIVES = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
VARIANTS = [
    ("fedex_lora", {"rank_cap": 3}),
    ("fedhl", {"gamma": 1.0, "data": "examples", "split": "b"}),
    ("ffa_lora", {"missing": "zero"}),
    ("fedview", {"start": "half", "split": "b"}),
    ("fedview", {"start": "fresh", "split": "balanced"}),
    ("flasc", {"mask": "fixed", "train": "masked"}),
    ("flasc", {"sparsity": "structured"}),
    ("florist", {"tau": 0.9}),
    ("hetlora", {"gamma": 0.5, "weighting": "given", "regularizer": 0.0}),
    ("hetlora", {"gamma": 0.5}),
    ("hetlora", {"weighting": "given", "prune": False}),
    ("lora_a2", {"head_budget": "whole"}),
    ("rac_lora", {"block_rounds": 2}),
    ("rac_lora", {"block_rounds": 2, "train": "A"}),
    ("rac_lora", {"train": "A", "sketch": "orthonormal"}),
    ("raflora", {"orphans": "zero"}),
    ("rolora", {"down": "changed"}),
    ("slora", {"rounds_sparse": 2, "rho": 0.4}),
    ("slora", {"rounds_sparse": 1, "split": "sqrt"}),
]
CASES = [(name, {}) for name in METHODS] + VARIANTS
DECAYS = ("flexlora", "hetlora", "fedsrd")  # with mixed ranks, or with a pruned change, the paper's equation loses some
every_method = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES]
)


def cohorts(method):
    """Three rounds: all clients, two with sparse messages where the method allows them, one small client."""
    ranks = (4, 1, 2) if method.mixed_ranks else (RANK,) * 3
    whole = [Profile(k, r, 8.0 / r, examples=(3, 1, 5)[k]) for k, r in enumerate(ranks)]
    down, up = (0.5 if method.sparse_down else 1.0), (0.3 if method.sparse_up else 1.0)
    sparse = [replace(whole[0], density_up=up), replace(whole[2], density_down=down)]
    return [whole, sparse, [whole[1]]]


def started(method, random_adapter, zero=False):
    adapter = random_adapter(NON_SQUARE, RANK, 2.0, seed=1)
    if zero:
        layers = {name: LowRank(torch.zeros_like(p.B), p.A, p.scale) for name, p in adapter.layers.items()}
        adapter = Adapter(layers, adapter.head)
    return method.init(adapter, seed=7)


def restored(method, state):
    """The state as a checkpoint gives it back: tensors through safetensors, facts through JSON."""
    tensors = load(save({name: tensor.clone().contiguous() for name, tensor in state.tensors().items()}))
    clients = {k: load(save({n: t.clone().contiguous() for n, t in kept.items()})) for k, kept in state.clients.items()}
    return method.restore(tensors, json.loads(json.dumps(state.facts())), clients)


def assert_equal_states(one, two):
    for first, second in ((one.tensors(), two.tensors()), *((one.clients[k], two.clients[k]) for k in one.clients)):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert one.clients.keys() == two.clients.keys()
    assert one.facts() == two.facts()


@every_method
@pytest.mark.parametrize("zero", [True, False], ids=["B = 0", "random B"])
def test_a_restored_state_goes_on_to_the_same_bits(play, random_adapter, name, options, zero):
    method = build(name, **options)
    state = started(method, random_adapter, zero)
    for t, cohort in enumerate(cohorts(method)):
        again = restored(method, state)
        assert_equal_states(state, again)
        before = {key: tensor.clone() for key, tensor in state.tensors().items()}
        after, _ = play(method, state, cohort, training(t))
        twin, _ = play(method, again, cohort, training(t))
        assert_equal_states(after, twin)
        assert all(torch.equal(before[key], tensor) for key, tensor in state.tensors().items())  # it was not changed
        assert after.rounds == t + 1
        assert all(bool(torch.isfinite(tensor).all()) for tensor in after.tensors().values())
        assert all(isinstance(value, float) for value in after.report.values())
        state = after
    assert method.layers(state) == tuple(sorted(NON_SQUARE))


@every_method
@pytest.mark.parametrize("zero", [True, False], ids=["B = 0", "random B"])
def test_a_client_is_sent_all_that_the_first_state_changes(random_adapter, name, options, zero):
    """Of a given adapter a client has nothing. What it knows of its start is the same for every adapter; what lies
    below its start is its base update, which the server counts.
    """
    method = build(name, **options)
    state = started(method, random_adapter, zero)
    assert bool(method.refuses_adapter) == (name in ("fed_sb", "fedsa", "ffa_lora", "local", "slora"))
    if zero or method.refuses_adapter:
        assert zero is False or method.base_update(state) is None
        return
    given = random_adapter(NON_SQUARE, RANK, 2.0, seed=1)
    another = method.init(random_adapter(NON_SQUARE, RANK, 2.0, seed=2), seed=7)
    start, other = (method.broadcast(first, Profile(0, RANK, 2.0)) for first in (state, another))
    if start.known is not None:
        assert torch.equal(start.known, other.known)
        assert torch.equal(start.vector[start.known], other.vector[start.known])
        assert not (start.known & start.layout.mask("head")).any()
    received, update = start.layout.unflatten(start.vector), method.base_update(state)
    assert update is None or update.numel() >= sum(RANK * (out + inner) for out, inner in NON_SQUARE.values())
    for layer, pair in given.layers.items():
        torch.testing.assert_close(dense(method.delta(state, layer)), dense(pair), rtol=1e-5, atol=1e-5)
        below = 0.0 if update is None else dense(pair)
        merged = dense(start.merge.layers[layer]) if start.merge is not None else 0.0
        torch.testing.assert_close(below + merged + dense(received.layers[layer]), dense(pair), rtol=1e-4, atol=1e-4)
    assert torch.equal(received.head["head.weight"], given.head["head.weight"])


@every_method
def test_without_local_training_the_model_stays(play, random_adapter, name, options):
    method = build(name, **options)
    first = state = started(method, random_adapter)
    for cohort in cohorts(method):
        # Equal full ranks and dense messages for the papers whose equations lose something otherwise.
        rank = {"rank": RANK, "scale": 2.0} if name in DECAYS or "zero" in options.values() else {}
        cohort = [replace(client, density_down=1.0, density_up=1.0, **rank) for client in cohort]
        state, updates = play(method, state, cohort)
        assert not any(update.change.any() for update in updates)
        for layer in method.layers(first):
            W = dense(method.delta(first, layer))
            assert (dense(method.delta(state, layer)) - W).norm() <= 1e-5 * W.norm()
    for key, tensor in method.head(first).items():
        torch.testing.assert_close(method.head(state)[key], tensor)


@every_method
def test_a_start_fits_its_layout_and_no_rank_is_dead(play, random_adapter, name, options):
    """A rank with zeros in both factors gets no gradient. The rank that a client asked for is the rank it gets."""
    method = build(name, **options)
    for zero in (True, False):
        state = started(method, random_adapter, zero)
        for t, cohort in enumerate([*cohorts(method), cohorts(method)[0]]):
            for client in cohorts(method)[0]:
                start, trainable = method.broadcast(state, client), method.trainable(state, client)
                assert start.vector.dtype == torch.float32
                assert start.vector.shape == (start.layout.size,)
                for mask in (start.mask, start.known, trainable.entries):
                    assert mask is None or (mask.dtype == torch.bool and mask.shape == start.vector.shape)
                adapter = start.layout.unflatten(start.vector)
                assert adapter.head.keys() == {"head.weight"}
                assert sorted(adapter.layers) == sorted(NON_SQUARE)
                for layer, pair in adapter.layers.items():
                    assert (pair.B.shape[0], pair.A.shape[1]) == NON_SQUARE[layer]
                    assert bool(((pair.A != 0).any(1) | (pair.B != 0).any(0)).all())
                    pruned = client.client in state.clients and name == "hetlora"
                    assert (
                        trainable.entries is not None
                        or pruned
                        or (pair.rank, pair.scale)
                        == ((client.rank, client.scale) if method.mixed_ranks else (RANK, 2.0))
                    )
                if getattr(state, "base", None):
                    assert start.base is state.base  # the server encodes one base once
                if start.merge is not None:
                    assert not start.merge.head
                    assert start.merged_base.keys() == NON_SQUARE.keys()
            state, _ = play(method, state, cohort, training(t) if t else None)


@every_method
def test_a_round_without_weight_is_refused(play, random_adapter, name, options):
    method = build(name, **options)
    state = started(method, random_adapter)
    with pytest.raises(ValueError, match="no update with a positive weight"):
        play(method, state, cohorts(method)[0], training(0), weights=[0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="no update with a positive weight"):
        method.aggregate(state, iter([]))


@every_method
def test_the_server_optimizer_sees_each_name_with_one_shape(play, random_adapter, name, options):
    """Moments are stored by name. Where a server optimizer has moments, a name stands for the same entries for ever."""
    method, shapes = build(name, **options), {}
    state = started(method, random_adapter)
    for t, cohort in enumerate(cohorts(method)):
        seen = []

        def advance(key, value, change, seen=seen):
            assert value.shape == change.shape
            assert value.shape == shapes.setdefault(key, value.shape) or method.optimizers == ("fedavg",)
            seen.append(key)
            return value + change

        state, _ = play(method, state, cohort, training(t), advance=advance)
        assert len(set(seen)) == len(seen)
        assert bool(seen) == (name != "local")


def moved_by(update, amount, like, ranks, scaled="B"):
    """The upload (n,) plus ``amount`` of the first ``ranks`` of ``like``, an adapter, under the client's own scale.

    ``scaled``: the factor that has the ratio of the scales.
    """
    change = update.change.clone()
    adapter = update.layout.unflatten(change)  # views: what is added there is in the change
    for name, pair in adapter.layers.items():
        other = like.layers[name]
        ratio = other.scale / pair.scale
        pair.B[:, :ranks] += amount * (ratio if scaled == "B" else 1) * other.B[:, :ranks]
        pair.A[:ranks] += amount * (ratio if scaled == "A" else 1) * other.A[:ranks]
        if pair.R is not None:
            pair.R.add_(amount * other.R)
    for name, tensor in adapter.head.items():
        tensor.add_(amount * like.head[name])
    return change


@every_method
def test_secure_aggregation_is_for_those_that_need_a_sum_alone(play, random_adapter, name, options):
    """Two cohorts whose dense uploads differ, in the ranks that all clients have, but have one weighted sum."""
    method = build(name, **options)
    state, same = started(method, random_adapter), True
    ranks = (4, 2, 2) if method.mixed_ranks else (RANK,) * 3
    clients = [Profile(k, r, 8.0 / r, examples=(3, 1, 5)[k]) for k, r in enumerate(ranks)]
    for t in range(3):
        after, updates = play(method, state, clients, training(t))
        others = []
        for update, sign in zip(updates, (1, -1, 0)):  # the second client's own values shrink: hetlora may prune it
            start, trainable = method.broadcast(state, update.client), method.trainable(state, update.client)
            up = trainable.uploaded(start.layout, trainable.support(start.layout, None))
            same_ranks, scaled = min(a.rank for a in clients), getattr(method, "factor", "B")
            moved = moved_by(update, sign / update.weight / 2, updates[1].sent, same_ranks, scaled)
            others.append(replace(update, sparse_change=torch.where(up, moved, update.change)))
        assert torch.equal(others[0].change, updates[0].change) == (name == "local")  # which sends nothing
        again = method.aggregate(state, iter(others))
        same &= after.clients.keys() == again.clients.keys()
        pairs = [(after.tensors(), again.tensors()), *((after.clients[k], again.clients.get(k)) for k in after.clients)]
        same = same and all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-5) for a, b in pairs for k in a)
        state = after
    assert same == method.secure_aggregation
    assert method.secure_aggregation or not method.sum_in_worker


@every_method
def test_an_entry_means_the_same_in_every_round_where_the_gauge_is_fixed(play, random_adapter, name, options):
    """The next start is the start plus the mean change, and the same entries train for all clients."""
    method = build(name, **options)
    listed = OBJECTIVES.split("They go with the methods")[1].split("with\none rank")[0]
    assert method.fixed_gauge == (f"`{name}`" in listed)
    if not method.fixed_gauge:
        return
    assert not method.personal
    state, cohort = started(method, random_adapter), [Profile(k, RANK, 2.0, examples=k + 1) for k in range(3)]
    trains = None
    for t in range(3):
        starts = [method.broadcast(state, client) for client in cohort]
        supports = [method.trainable(state, client).support(starts[0].layout, None) for client in cohort]
        trains = supports[0] if trains is None else trains
        assert all(torch.equal(support, trains) for support in supports)
        assert all(torch.equal(start.vector, starts[0].vector) and start.merge is None for start in starts)
        state, updates = play(method, state, cohort, training(t))
        mean = sum(update.change * update.weight for update in updates) / sum(update.weight for update in updates)
        after = method.broadcast(state, cohort[0])
        assert after.layout == starts[0].layout
        torch.testing.assert_close(after.vector, starts[0].vector + mean, rtol=1e-5, atol=1e-6)


@every_method
def test_its_figures_are_documented(play, random_adapter, name, options):
    method = build(name, **options)
    state, _ = play(method, started(method, random_adapter), cohorts(method)[0], training(0))
    assert [key for key in state.report if f"`method/{key}`" not in OUTPUTS] == []


@every_method
def test_it_runs_where_only_the_head_trains(play, random_adapter, name, options):
    method = build(name, **options)
    state = method.init(random_adapter({}, RANK, 2.0, seed=1), seed=7)
    for t, cohort in enumerate(cohorts(method)):
        assert method.layers(state) == ()
        before = {key: tensor.clone() for key, tensor in method.head(state).items()}
        state, _ = play(method, restored(method, state), cohort, training(t))
        assert not torch.equal(method.head(state)["head.weight"], before["head.weight"])
        assert all(value == value for value in state.report.values())  # no NaN


@every_method
def test_it_pickles(name, options):
    method = build(name, **options)
    again = pickle.loads(pickle.dumps(method))
    assert (type(again), vars(again)) == (type(method), vars(method))
