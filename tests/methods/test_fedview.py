"""FedView against dense float64 sums, and its laws: exact views, nothing moves untrained, FLoRA."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from method_oracles import dense, relative

from rayfed.lora.adapter import Adapter, LowRank, fresh_adapter
from rayfed.methods import _views, fedview
from rayfed.methods._views import as_view
from rayfed.methods.base import Profile
from rayfed.methods.fedview import FedView

SHAPES = {"narrow": (7, 5), "wide": (4, 9)}
STARTS = ("correction", "half", "fresh")
SPLITS = ("floored", "balanced", "b")


def client(k: int, rank: int, alpha: float = 4.0, **more) -> Profile:
    return Profile(k, rank, alpha / rank, **more)


def noise(profile: Profile, start, adapter: Adapter) -> Adapter:
    """A random local change of every entry."""
    rng = torch.Generator().manual_seed(profile.client)
    vector = adapter.flatten()
    return adapter.layout.unflatten(vector + 0.3 * torch.randn(vector.shape, generator=rng))


def models(method: FedView, state, profile: Profile) -> dict[str, torch.Tensor]:
    """What the client's model changes by as it starts, if everything arrives: base plus adapter, float64."""
    start = method.broadcast(state, profile)
    pairs = start.layout.unflatten(start.vector).layers
    base = start.merged_base
    return {n: dense(p) + (dense(base[n]) if n in base else 0) for n, p in pairs.items()}


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.fixture(params=["matrices", "stacks"])
def form(request, monkeypatch):
    """Views of small layers as they are, and in the form of those of large layers."""
    if request.param == "stacks":
        monkeypatch.setattr(_views, "SMALL", 0)
    return request.param


COHORTS = {
    "one": [[client(0, 2)]] * 3,
    "changing": [[client(0, 1, examples=3), client(1, 4)], [client(1, 4), client(2, 2)], [client(0, 1), client(3, 4)]],
    "sparse up": [[client(0, 4, density_up=0.3), client(1, 2)]] * 3,
    "sparse down": [[client(0, 4, density_down=0.5), client(1, 2)]] * 3,
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("cohorts", COHORTS.values(), ids=COHORTS)
@pytest.mark.parametrize("zero", [False, True], ids=["random B", "B = 0"])
def test_w_and_views_are_the_dense_sums(play, random_adapter, form, start, cohorts, zero) -> None:
    method = FedView(start=start)
    adapter = fresh_adapter(SHAPES, {"head.weight": torch.ones(3, 5)}, 4, 1.0, 0)
    adapter = adapter if zero else random_adapter(SHAPES, 4, 1.0, 0)
    state = method.init(adapter, seed=3)
    W = {name: dense(pair) for name, pair in adapter.layers.items()}
    head = adapter.head["head.weight"].double()
    V: dict[int, dict] = {}
    for cohort in cohorts:
        before = state
        state, updates = play(method, before, cohort, noise)
        p = [u.weight / sum(u.weight for u in updates) for u in updates]
        for u in updates:
            view = V.setdefault(u.client.client, dict.fromkeys(SHAPES, torch.zeros(1)))
            for name in SHAPES:
                correction = best(W[name] - view[name], u.client.rank)
                if u.client.density_down < 1:  # the merged part arrives whole, of the factors what was decoded
                    base = method.broadcast(before, u.client).merged_base.get(name, view[name])
                    view[name] = dense(base) + dense(u.sent.layers[name])
                else:
                    view[name] = view[name] + correction
                scale = 1e-5 * (W[name].norm() + 1e-9)  # an SVD in float32
                stored = as_view(state.clients[u.client.client])[name]
                assert (dense(stored) - view[name]).norm() <= scale
                view[name] = dense(stored)
                assert form == "stacks" or isinstance(stored, torch.Tensor)
        for name in SHAPES:
            gained = sum(w * (dense(u.trained.layers[name]) - dense(u.sent.layers[name])) for w, u in zip(p, updates))
            W[name] = W[name] + gained
            assert relative(method.delta(state, name), W[name]) < 1e-6
        moved = [u.layout.unflatten(u.change).head["head.weight"].double() for u in updates]
        head = head + sum(w * m for w, m in zip(p, moved))
        assert relative(method.head(state)["head.weight"], head) < 1e-6
    assert state.rounds == len(cohorts)


def test_a_view_is_a_stack_while_that_is_smaller(play, random_adapter, monkeypatch) -> None:
    monkeypatch.setattr(_views, "SMALL", 0)
    method = FedView()
    state = method.init(random_adapter(SHAPES, 4, 1.0, 0), seed=0)
    ranks = []
    for _ in range(4):
        state, _ = play(method, state, [client(0, 1), client(1, 2)], noise)
        view = as_view(state.clients[0])
        ranks.append({name: V.rank if isinstance(V, LowRank) else None for name, V in view.items()})
    # rank R has R (out + in) entries, the matrix out x in: 12 R against 35, and 13 R against 36
    assert ranks == [dict.fromkeys(SHAPES, R) for R in (1, 2, None, None)]


def test_a_view_of_nothing_is_empty(play, monkeypatch) -> None:
    """While W is 0, clients get fresh rows of A of their own, and B = 0: their views stay equal."""
    monkeypatch.setattr(_views, "SMALL", 0)
    method = FedView()
    state = method.init(fresh_adapter(SHAPES, {}, 2, 1.0, 0), seed=0)
    state, _ = play(method, state, [client(0, 2), client(1, 2)], noise)
    for k in range(2):
        assert {name: V.rank for name, V in as_view(state.clients[k]).items()} == dict.fromkeys(SHAPES, 0)
    state, _ = play(method, state, [client(0, 2)], noise)
    assert {name: V.rank for name, V in as_view(state.clients[0]).items()} == dict.fromkeys(SHAPES, 2)


def test_clients_of_equal_views_and_ranks_share_a_decomposition(play, random_adapter, monkeypatch) -> None:
    decomposed, top_svd = [], fedview.top_svd

    def spy(W, rank, **more):
        decomposed.append(rank)
        return top_svd(W, rank, **more)

    method = FedView()
    monkeypatch.setattr(fedview, "top_svd", spy)
    state = method.init(random_adapter(SHAPES, 4, 1.0, 0), seed=0)
    starts = [method.broadcast(state, client(k, rank)).vector for k, rank in enumerate((2, 4, 2, 2))]
    assert decomposed == [2] * len(SHAPES) + [4] * len(SHAPES)  # all are new
    assert torch.equal(starts[0], starts[2])
    state, _ = play(method, state, [client(k, 2) for k in range(3)], noise)
    decomposed.clear()
    apart = [method.broadcast(state, client(k, 2)).vector for k in (0, 3, 0, 1)]
    assert len(decomposed) == 3 * len(SHAPES)  # views in memory are compared by identity
    assert torch.equal(apart[0], apart[2])
    assert not torch.equal(apart[0], apart[1])
    decomposed.clear()
    for k in range(2 * fedview.RECENT):
        method.broadcast(replace(state, clients={}), client(k, 2 + k % 3))
    many = replace(state, clients={k: dict(state.clients[0]) for k in range(2 * fedview.RECENT)})
    for k in many.clients:
        method.broadcast(many, client(k, 2))
    assert len(many.triples) == fedview.RECENT  # memory does not grow with the cohort


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_view_is_exact_once_the_rank_covers_what_it_lacks(play, random_adapter, start, split) -> None:
    method = FedView(start=start, split=split)
    state = method.init(random_adapter(SHAPES, 4, 1.0, 0), seed=0)
    for name, model in models(method, state, client(0, 4)).items():
        assert relative(method.delta(state, name), model) < 1e-6
    state, _ = play(method, state, [client(0, 4), client(1, 1)], noise)  # W - V of client 0 now has rank 4 + 1
    for name, model in models(method, state, client(0, 5)).items():
        assert relative(method.delta(state, name), model) < 1e-6


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("split", SPLITS)
def test_untrained_w_keeps_its_bits_and_views_reach_it(play, random_adapter, start, split) -> None:
    method = FedView(start=start, split=split)
    first = state = method.init(random_adapter(SHAPES, 4, 1.0, 0), seed=0)
    errors = []
    for _ in range(4):
        state, _ = play(method, state, [client(0, 1), client(1, 2), client(2, 4)])
        errors.append(state.report["view_error"])
    for name in SHAPES:
        assert torch.equal(method.delta(state, name), method.delta(first, name))
        for k in range(3):
            assert relative(state.clients[k][name], method.delta(first, name).double()) < 1e-6
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-6


def test_what_a_sparse_download_drops_is_sent_later(play, random_adapter) -> None:
    method = FedView()
    state = method.init(random_adapter(SHAPES, 4, 1.0, 0), seed=0)
    sparse = client(0, 2, density_down=0.5)
    errors = []
    for _ in range(30):
        state, (update,) = play(method, state, [sparse])
        assert (update.start == 0).float().mean() > 0.4
        errors.append(state.report["view_error"])
    assert errors[0] > 0.3  # rank 2 of 4, and half of the entries
    assert errors[-1] < 0.02


def test_fresh_starts_of_enough_rank_are_flora(play) -> None:
    """Every client merges W <- W + sum_k p_k s_k B_k A_k and starts anew at B = 0."""
    method = FedView(start="fresh")
    state = method.init(fresh_adapter(SHAPES, {}, 5, 1.0, 0), seed=0)
    cohort = [client(0, 5, examples=3), client(1, 5)]
    base = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    for _ in range(3):
        for k in cohort:
            for name, model in models(method, state, k).items():
                assert (model - base[name]).norm() <= 1e-6 * base[name].norm()
        state, (one, two) = play(method, state, cohort, noise)
        assert all(not pair.B.any() for pair in one.sent.layers.values())
        for name in SHAPES:
            base[name] += 0.75 * dense(one.trained.layers[name]) + 0.25 * dense(two.trained.layers[name])
            assert relative(method.delta(state, name), base[name]) < 1e-6


@pytest.mark.parametrize("start", STARTS)
def test_only_what_a_client_cannot_know_travels(play, random_adapter, start) -> None:
    method = FedView(start=start)
    state = method.init(random_adapter(SHAPES, 4, 1.0, 0), seed=0)
    state, _ = play(method, state, [client(0, 4)], noise)
    sent = method.broadcast(state, client(0, 4))
    travels = sent.layout.size if sent.known is None else int((~sent.known).sum())
    merged = None if sent.merge is None else sent.merge.flatten()
    travels += 0 if merged is None else len(merged)
    assert travels == 15 + 4 * sum(out + inner for out, inner in SHAPES.values())
    if start != "correction":  # V_k and what travelled give the base
        rank = {"half": 2, "fresh": 4}[start]
        rest = iter(
            merged.split([n for name in sorted(SHAPES) for n in (rank * SHAPES[name][1], rank * SHAPES[name][0])])
        )
        for name in sorted(SHAPES):
            A, B = next(rest).view(rank, -1), next(rest).view(-1, rank)
            assert torch.equal(sent.base[name], state.clients[0][name])
            assert relative(sent.merged_base[name], (state.clients[0][name] + B @ A).double()) < 1e-6
    again = method.broadcast(replace(state, rounds=state.rounds + 1), client(0, 4))
    known = torch.zeros(sent.layout.size, dtype=torch.bool) if sent.known is None else sent.known & (sent.vector != 0)
    assert not torch.equal(again.vector[known], sent.vector[known]) or not known.any()  # drawn anew each round


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_rank_can_train(play, random_adapter, start, split) -> None:
    method = FedView(start=start, split=split)
    zero = method.init(fresh_adapter({**SHAPES, "thin": (3, 8)}, {}, 4, 1.0, 0), seed=0)
    full = method.init(random_adapter({**SHAPES, "thin": (3, 8)}, 2, 1.0, 0), seed=0)
    done, _ = play(method, full, [client(0, 4)])  # a view up to date
    for state in (zero, full, done):
        start_ = method.broadcast(state, client(0, 4))
        for pair in start_.layout.unflatten(start_.vector).layers.values():
            assert (pair.A.norm(dim=1) > 0.01).all()
            assert pair.rank == 4


@pytest.mark.parametrize("split", SPLITS)
def test_splits_differ_in_norms_alone(random_adapter, split) -> None:
    adapter = random_adapter(SHAPES, 4, 0.05, 0)
    state = FedView().init(adapter, seed=0)
    sent = FedView(split=split).broadcast(state, client(0, 3))
    row = 1 / math.sqrt(3)
    for name, pair in sent.layout.unflatten(sent.vector).layers.items():
        S = torch.linalg.svdvals(dense(adapter.layers[name]))[:3] / pair.scale
        norms = {"floored": S.sqrt().clamp(min=0.6 * row), "balanced": S.sqrt(), "b": torch.full((3,), row)}[split]
        torch.testing.assert_close(pair.A.norm(dim=1).double(), norms.double(), rtol=1e-5, atol=0)
        assert relative(pair, best(dense(adapter.layers[name]), 3)) < 1e-5


def test_the_server_optimizer_gets_matrices_by_name(play, random_adapter) -> None:
    method, seen = FedView(), {}

    def advance(name, value, change):
        seen[name] = change
        return value + 2 * change

    state = method.init(random_adapter(SHAPES, 4, 1.0, 0), seed=0)
    after, _ = play(method, state, [client(0, 2), client(1, 4)], noise, advance=advance)
    plain, _ = play(method, state, [client(0, 2), client(1, 4)], noise)
    assert set(seen) == {"W.narrow", "W.wide", "head.head.weight"}
    for name in SHAPES:
        twice = method.delta(state, name) + 2 * (method.delta(plain, name) - method.delta(state, name))
        torch.testing.assert_close(method.delta(after, name), twice)
