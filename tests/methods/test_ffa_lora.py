"""FFA-LoRA against dense float64 sums: with A frozen, averaging B is averaging products, whatever the ranks."""

from __future__ import annotations

import pytest
import torch
from method_oracles import begun, dense, relative, training

from rayfed.lora.adapter import LowRank
from rayfed.methods import Profile
from rayfed.methods.ffa_lora import FFALoRA

SHAPES = {"wide": (4, 9), "tall": (7, 5)}
COHORTS = [
    [Profile(0, 4, 2.0, examples=3), Profile(1, 1, 8.0, examples=1), Profile(2, 2, 4.0, examples=5)],
    [Profile(3, 2, 4.0, density_up=0.3, examples=2), Profile(4, 4, 2.0, density_down=0.5, examples=1)],
    [Profile(5, 1, 3.0, examples=7)],
]


@pytest.mark.parametrize("zero", [True, False])
def test_model_moves_by_the_mean_of_what_clients_changed(play, random_adapter, zero):
    method, start, train = FFALoRA(), begun(random_adapter, zero), training(2)
    state = method.init(start, seed=7)
    W = {name: dense(pair) for name, pair in start.layers.items()}
    head = start.head["head.weight"].double()
    for cohort in COHORTS:
        state, updates = play(method, state, cohort, train)
        total = sum(u.weight for u in updates)
        head += sum(u.weight / total * u.layout.unflatten(u.change).head["head.weight"].double() for u in updates)
        for name, pair in start.layers.items():
            W[name] += sum(
                u.weight / total * (dense(u.trained.layers[name]) - dense(u.sent.layers[name])) for u in updates
            )
            assert relative(method.delta(state, name).dense(), W[name]) < 1e-6
            assert torch.equal(state.layers[name].A, pair.A)
        assert relative(method.head(state)["head.weight"], head) < 1e-6


def test_with_equal_ranks_it_is_the_paper(play, random_adapter):
    """B <- sum_k p_k B_k, by values."""
    method = FFALoRA()
    cohort = [Profile(k, 4, 2.0, examples=k + 1) for k in range(3)]
    state, updates = play(method, method.init(begun(random_adapter, False), seed=7), cohort, training(3))
    for name in SHAPES:
        Bbar = sum(u.weight / 6 * u.trained.layers[name].B.double() for u in updates)
        assert relative(state.layers[name].B, Bbar) < 1e-6


def test_ranks_are_nested_and_alive(random_adapter):
    method = FFALoRA()
    start = begun(random_adapter, False)
    state = method.init(start, seed=7)
    for rank, scale in ((1, 8.0), (2, 4.0), (4, 2.0), (2, 0.3)):
        sent = method.broadcast(state, Profile(0, rank, scale))
        assert torch.equal(sent.known, sent.layout.mask("A"))
        for name, pair in sent.layout.unflatten(sent.vector).layers.items():
            whole = start.layers[name]
            assert pair.scale == scale
            assert torch.equal(pair.A, whole.A[:rank])
            assert bool((pair.A.norm(dim=1) > 0).all())
            first = LowRank(whole.B[:, :rank], whole.A[:rank], whole.scale)
            torch.testing.assert_close(dense(pair), dense(first), rtol=1e-6, atol=1e-6)


def test_columns_nobody_owns_keep_their_value(play, random_adapter):
    method = FFALoRA()
    first = method.init(begun(random_adapter, False), seed=7)
    state, _ = play(method, first, COHORTS[2], training(4))
    for name in SHAPES:
        assert torch.equal(state.layers[name].B[:, 1:], first.layers[name].B[:, 1:])
        assert not torch.equal(state.layers[name].B[:, :1], first.layers[name].B[:, :1])


def test_without_local_training_nothing_moves(play, random_adapter):
    method = FFALoRA()
    state = first = method.init(begun(random_adapter, False), seed=7)
    for cohort in COHORTS:
        state, _ = play(method, state, cohort)
    assert all(torch.equal(tensor, first.tensors()[name]) for name, tensor in state.tensors().items())


def test_a_server_optimizer_gets_each_B_and_head_by_name(play, random_adapter):
    method, seen = FFALoRA(), {}

    def half(name, value, change):
        seen[name] = value.shape
        return value + 0.5 * change

    first = method.init(begun(random_adapter, False), seed=7)
    whole, _ = play(method, first, COHORTS[0], training(5))
    state, _ = play(method, first, COHORTS[0], training(5), advance=half)
    assert seen == {"B.wide": (4, 4), "B.tall": (7, 4), "head.head.weight": (3, 5)}
    for name in SHAPES:
        halfway = (whole.layers[name].B + first.layers[name].B) / 2
        torch.testing.assert_close(state.layers[name].B, halfway)


def test_zero_padded_values_shrink_what_clients_lack(play, random_adapter):
    """B <- sum_k p_k (s_k / s) [B_k | 0], by values; with equal ranks it is the mean of changes."""
    method, start = FFALoRA(missing="zero"), begun(random_adapter, False)
    state, updates = play(method, method.init(start, seed=7), COHORTS[0], training(3))
    for name, (out, _) in SHAPES.items():
        mean = torch.zeros(out, 4, dtype=torch.float64)
        for u in updates:
            pair = u.trained.layers[name]
            mean[:, : pair.rank] += u.weight / 9 * pair.scale / 2.0 * pair.B.double()
        assert relative(state.layers[name].B, mean) < 1e-6
    equal = [Profile(k, 4, 2.0, examples=k + 1) for k in range(3)]
    runs = [play(own, own.init(start, seed=7), equal, training(3))[0] for own in (FFALoRA(), FFALoRA(missing="zero"))]
    assert all(torch.equal(runs[0].layers[name].B, runs[1].layers[name].B) for name in SHAPES)
