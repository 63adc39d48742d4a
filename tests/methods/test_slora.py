"""SLoRA: sparse rounds on one mask, the best approximation of rank r as LoRA's start, then FedIT."""

import pytest
import torch

from rayfed.methods.base import Profile
from rayfed.methods.slora import SLoRA

SHAPES = {"tall": (7, 5), "wide": (4, 9)}
COHORTS = [
    [Profile(0, 2, 4.0, examples=3), Profile(1, 2, 4.0, density_up=0.3, examples=5)],
    [Profile(2, 2, 4.0, density_down=0.5, examples=1), Profile(0, 2, 4.0, examples=3)],
    [Profile(1, 2, 4.0, density_up=0.3, examples=5), Profile(2, 2, 4.0, examples=1)],
    [Profile(3, 2, 4.0, examples=2)],
]


def noise(round_):
    """Moves every entry, also the identities and those outside the mask."""

    def train(client, start, adapter):
        rng = torch.Generator().manual_seed(100 * round_ + client.client)
        return start.layout.unflatten(adapter.flatten() + 0.3 * torch.randn(start.layout.size, generator=rng))

    return train


def begin(method, random_adapter, zero_B=True):
    adapter = random_adapter(SHAPES, 2, 4.0, seed=1)
    for pair in adapter.layers.values():
        pair.B.mul_(0.0 if zero_B else 1.0)
    return method.init(adapter, seed=0)


def dense(change):
    return change.double() if isinstance(change, torch.Tensor) else change.scale * change.B.double() @ change.A.double()


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("split", ["b", "sqrt"])
@pytest.mark.parametrize("zero_B", [True, False])
def test_against_a_dense_oracle(play, random_adapter, zero_B, split):
    method = SLoRA(rounds_sparse=2, rho=0.4, split=split)
    state = begin(method, random_adapter, zero_B)
    W = {name: dense(method.delta(state, name)) for name in SHAPES}
    head = method.head(state)["head.weight"].double()
    for t, cohort in enumerate(COHORTS):
        if t >= 2:
            pairs = {name: method.delta(state, name) for name in SHAPES}
            B, A = ({n: getattr(p, f).double() for n, p in pairs.items()} for f in "BA")
        state, updates = play(method, state, cohort, noise(t))
        p = [u.weight / sum(v.weight for v in updates) for u in updates]
        changes = [u.layout.unflatten(u.change) for u in updates]
        head = head + sum(q * c.head["head.weight"].double() for q, c in zip(p, changes))
        assert error(method.head(state)["head.weight"].double(), head) < 1e-6
        for name, (out, inner) in SHAPES.items():
            if t < 2:
                sparse = [c.layers[name].B if inner <= out else c.layers[name].A for c in changes]
                W[name] = W[name] + sum(q * s.double() for q, s in zip(p, sparse))
                wanted = W[name]
            else:
                B_new = B[name] + sum(q * c.layers[name].B.double() for q, c in zip(p, changes))
                A_new = A[name] + sum(q * c.layers[name].A.double() for q, c in zip(p, changes))
                wanted = 4.0 * B_new @ A_new
            if t == 1:
                U, S, Vh = torch.linalg.svd(W[name])
                wanted = U[:, :2] @ torch.diag(S[:2]) @ Vh[:2]
            assert error(dense(method.delta(state, name)), wanted) < 1e-6
        if t == 1:
            energy = [torch.linalg.svdvals(W[name]).square() for name in SHAPES]
            lost = sum(float(e[2:].sum()) for e in energy) / sum(float(e.sum()) for e in energy)
            assert state.report["lost_energy"] == pytest.approx(lost, rel=1e-5)


def test_stage_one_moves_the_mask_only_and_only_the_mask_travels(play, random_adapter):
    method = SLoRA(rounds_sparse=3, rho=0.4)
    state = begin(method, random_adapter)
    start = method.broadcast(state, COHORTS[0][0])
    trains = method.trainable(state, COHORTS[0][0]).whole(start.layout)
    assert torch.equal(trains, ~start.known)
    assert int(trains.sum()) == int(0.4 * 35) + int(0.4 * 36) + 15
    adapter = start.layout.unflatten(start.vector)
    assert [adapter.layers[name].rank for name in SHAPES] == [5, 4]
    for t in range(2):
        state, updates = play(method, state, [Profile(k, 2, 4.0) for k in range(3)], noise(t))
        assert all(torch.equal(u.change != 0, trains) for u in updates)
        for name in SHAPES:
            assert torch.equal(method.delta(state, name) != 0, state.extras[f"mask.{name}"])
    other = SLoRA(rounds_sparse=3, rho=0.4).init(random_adapter(SHAPES, 2, 4.0, seed=1), seed=1)
    assert not torch.equal(other.extras["mask.tall"], state.extras["mask.tall"])


@pytest.mark.parametrize("split", ["b", "sqrt"])
@pytest.mark.parametrize("rank", [1, 2, 6])
@pytest.mark.parametrize("alive", [0, 1, 6])
def test_nobody_learns_nothing_moves_and_no_rank_is_dead(play, random_adapter, alive, rank, split):
    """Also at a rank beyond the layer's sides, or beyond that of the change, which the truncation then leaves whole."""
    method, cohort = SLoRA(rounds_sparse=1, split=split), [Profile(k, rank, 4.0) for k in range(2)]
    adapter = random_adapter(SHAPES, rank, 4.0, seed=1)
    for pair in adapter.layers.values():
        pair.B[:, alive:] = 0
    state = method.init(adapter, seed=0)
    before = {name: dense(method.delta(state, name)) for name in SHAPES}
    for _ in range(3):
        state, _ = play(method, state, cohort)
        for name in SHAPES:
            assert error(dense(method.delta(state, name)), before[name]) < 1e-6
            pair = method.delta(state, name)
            assert pair.rank == rank
            assert (pair.B.norm(dim=0) + pair.A.norm(dim=1) > 1e-3).all()
            assert int((pair.B != 0).any(dim=0).sum()) == min(alive, rank, *SHAPES[name])
            assert pair.B.is_contiguous()
            assert pair.A.is_contiguous()
        assert state.report.get("lost_energy", 0.0) < 1e-9
