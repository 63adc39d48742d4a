"""raFLoRA against its equations on dense float64 matrices, and its laws."""

from __future__ import annotations

import pytest
import torch
from method_oracles import close, dense, training

from rayfed.lora.adapter import fresh_adapter
from rayfed.methods.base import Profile
from rayfed.methods.flexlora import FlexLoRA
from rayfed.methods.raflora import RaFLoRA

SHAPES = {"tall": (7, 5), "a.wide": (4, 9)}
RANKS = (1, 4, 2, 3, 1)
ROUNDS = ([0, 1, 2], [4, 2], [3], [1, 2, 0, 4], [0])


def profile(k, **more):
    return Profile(k, RANKS[k], 6 / RANKS[k], examples=3 + 2 * k, **more)


def ranks_of(update, name):
    """The client's product in float64, as one matrix a rank: (after training, as sent)."""
    both = []
    for vector in (update.start.double() + update.change.double(), update.start.double()):
        pair = update.layout.unflatten(vector).layers[name]
        both.append([pair.scale * torch.outer(pair.B[:, j], pair.A[j]) for j in range(pair.rank)])
    return both


def band(W, first, last):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, first:last] * S[first:last]) @ Vh[first:last]


def begin(random_adapter, kind):
    if kind == "random":
        return random_adapter(SHAPES, 4, 1.5, 0)
    return fresh_adapter(SHAPES, {"head.weight": torch.ones(3, 5)}, 4, 1.5, 0)


@pytest.mark.parametrize("kind", ["fresh", "random"])
@pytest.mark.parametrize("orphans", ["keep", "zero"])
@pytest.mark.parametrize("density", [{}, {"density_up": 0.3}, {"density_down": 0.5, "density_up": 0.3}])
def test_averages_each_rank_over_its_owners(play, random_adapter, kind, orphans, density):
    method, train = RaFLoRA(orphans=orphans), training(1)
    state = method.init(begin(random_adapter, kind), 0)
    D = {name: dense(state.layers[name]) for name in SHAPES}
    head = state.head["head.weight"].double()
    for members in ROUNDS:
        state, updates = play(method, state, [profile(k, **density) for k in members], train)
        n = [u.client.examples for u in updates]
        for name in SHAPES:
            now = torch.zeros(SHAPES[name], dtype=torch.float64)
            for j in range(4):
                owners = [u for u in updates if u.client.rank > j]
                for u in owners:
                    trained, sent = ranks_of(u, name)
                    whole = band(D[name], j, j + 1) + trained[j] - sent[j] if density else trained[j]
                    now += u.client.examples / sum(v.client.examples for v in owners) * whole
                if not owners and orphans == "keep":
                    now += band(D[name], j, j + 1)
            D[name] = now
            close(method.delta(state, name), now)
        head = head + sum(
            k / sum(n) * u.layout.unflatten(u.change).head["head.weight"].double() for k, u in zip(n, updates)
        )
        close(method.head(state)["head.weight"], head)


@pytest.mark.parametrize("down", [1.0, 0.5])
def test_without_training_nothing_decays(play, random_adapter, down):
    method = RaFLoRA()
    first = state = method.init(begin(random_adapter, "random"), 0)
    for members in ROUNDS:
        state, _ = play(method, state, [profile(k, density_down=down) for k in members])
    for name in SHAPES:
        close(state.layers[name], dense(first.layers[name]))


def test_equal_ranks_are_flexlora(play, random_adapter):
    clients = [Profile(k, 4, 1.5, examples=k + 1) for k in range(3)]
    ends = []
    for method in (RaFLoRA(), FlexLoRA()):
        state = method.init(begin(random_adapter, "random"), 0)
        for seed in (2, 3):
            state, _ = play(method, state, clients, training(seed))
        ends.append(state)
    for name in SHAPES:
        close(ends[0].layers[name], dense(ends[1].layers[name]))


def test_no_rank_is_ever_dead(play, random_adapter):
    method, fresh = RaFLoRA(orphans="zero"), begin(random_adapter, "fresh")
    state = method.init(fresh, 0)
    for alive in (0, 2):
        start = method.broadcast(state, profile(1))
        for name, pair in start.layout.unflatten(start.vector).layers.items():
            assert torch.equal(pair.A[alive:], fresh.layers[name].A[alive:])
            assert not pair.B[:, alive:].any()
        state, _ = play(method, state, [profile(2)], training(4))


def test_an_update_without_weight_counts_for_nothing(play, random_adapter):
    method = RaFLoRA()
    first = method.init(begin(random_adapter, "random"), 0)
    both, _ = play(method, first, [profile(0), profile(1)], training(8), weights=[1.0, 0.0])
    alone, _ = play(method, first, [profile(0)], training(8))
    assert both.report == alone.report
    assert all(torch.equal(both.tensors()[key], tensor) for key, tensor in alone.tensors().items())
    with pytest.raises(ValueError, match="no update with a positive weight"):
        play(method, first, [profile(0)], weights=[0.0])
