"""LoRA-FAIR against its closed form on dense float64 matrices, and the limits of its regulariser."""

from __future__ import annotations

import pytest
import torch
from method_oracles import close, training

from rayfed.lora.adapter import fresh_adapter
from rayfed.methods.base import Profile
from rayfed.methods.fedit import FedIT
from rayfed.methods.lora_fair import LoRAFAIR

SHAPES = {"tall": (7, 5), "a.wide": (4, 9)}
ROUNDS = ([0, 1, 2], [4, 2], [3], [1, 2, 0, 4])
SCALE = 1.5


def profile(k, **more):
    return Profile(k, 3, SCALE, examples=3 + 2 * k, **more)


def begin(random_adapter, kind):
    if kind == "random":
        return random_adapter(SHAPES, 3, SCALE, 0)
    return fresh_adapter(SHAPES, {"head.weight": torch.ones(3, 5)}, 3, SCALE, 0)


def means(updates, name):
    """(D, Bbar, Abar) in float64."""
    whole = sum(u.client.examples for u in updates)
    D = B = A = 0
    for u in updates:
        pair, share = u.layout.unflatten(u.start.double() + u.change.double()).layers[name], u.client.examples / whole
        D, B, A = D + share * pair.scale * pair.B @ pair.A, B + share * pair.B, A + share * pair.A
    return D, B, A


def corrected(D, B, A, lam):
    ridge = A @ A.T + lam * torch.eye(3, dtype=torch.float64)
    return SCALE * (B + (D - SCALE * B @ A) @ A.T @ ridge.inverse() / SCALE) @ A


@pytest.mark.parametrize("kind", ["fresh", "random"])
@pytest.mark.parametrize("lam", [0.01, 1.0])
@pytest.mark.parametrize("up", [1.0, 0.3])
def test_agrees_with_the_closed_form(play, random_adapter, kind, lam, up):
    method, train = LoRAFAIR(lam=lam), training(1)
    state = method.init(begin(random_adapter, kind), 0)
    for members in ROUNDS:
        state, updates = play(method, state, [profile(k, density_up=up) for k in members], train)
        whole, heads, gaps = sum(u.client.examples for u in updates), 0, []
        for name in SHAPES:
            D, B, A = means(updates, name)
            close(method.delta(state, name).dense(), corrected(D, B, A, lam))
            gaps.append([(D - x).square().sum() for x in (D * 0, SCALE * B @ A, corrected(D, B, A, lam))])
        for u in updates:
            heads += u.client.examples / whole * u.trained.head["head.weight"].double()
        close(method.head(state)["head.weight"], heads)
        energy, before, after = (float(sum(column)) for column in zip(*gaps))
        assert state.report["gap_before"] == pytest.approx((before / energy) ** 0.5, abs=1e-3)
        assert state.report["gap"] == pytest.approx((after / energy) ** 0.5, abs=1e-3)


def test_what_a_sparse_download_keeps_back_is_not_lost(play, random_adapter):
    method, start = LoRAFAIR(lam=0.1), begin(random_adapter, "random")
    clients = [profile(k, density_down=0.5) for k in range(3)]
    state, updates = play(method, method.init(start, 0), clients, training(2))
    whole = sum(c.examples for c in clients)
    for name, pair in start.layers.items():
        B, A = pair.B.double(), pair.A.double()
        D = SCALE * B @ A
        for u in updates:
            share, sent = u.client.examples / whole, u.layout.unflatten(u.start.double()).layers[name]
            trained = u.layout.unflatten(u.start.double() + u.change.double()).layers[name]
            D = D + share * SCALE * (trained.B @ trained.A - sent.B @ sent.A)
            B, A = B + share * (trained.B - sent.B), A + share * (trained.A - sent.A)
        close(method.delta(state, name).dense(), corrected(D, B, A, 0.1))


def test_without_a_regulariser_it_projects_the_mean_product(play, random_adapter):
    """The best product on Abar's row space; a huge regulariser gives FedIT's."""
    state, clients = LoRAFAIR().init(begin(random_adapter, "random"), 0), [profile(k) for k in range(4)]
    free, updates = play(LoRAFAIR(lam=0.0), state, clients, training(3))
    tied, _ = play(LoRAFAIR(lam=1e9), state, clients, training(3))
    fedit, _ = play(FedIT(), state, clients, training(3))
    for name in SHAPES:
        D, _, A = means(updates, name)
        close(LoRAFAIR().delta(free, name).dense(), D @ torch.linalg.pinv(A) @ A)
        close(LoRAFAIR().delta(tied, name).dense(), FedIT().delta(fedit, name).dense().double())


def test_equal_clients_need_no_correction(play, random_adapter):
    """Also without any training: nothing is lost, round after round."""
    start = begin(random_adapter, "random")
    state = LoRAFAIR().init(start, 0)
    for _ in range(3):
        state, _ = play(LoRAFAIR(), state, [profile(0), profile(1)])
    for name, pair in start.layers.items():
        close(LoRAFAIR().delta(state, name).dense(), pair.dense().double())
    assert state.report["gap_before"] < 1e-3


def test_round_zero_without_training_keeps_everything(play, random_adapter):
    method, start = LoRAFAIR(), begin(random_adapter, "fresh")
    state, _ = play(method, method.init(start, 0), [profile(0), profile(1)])
    assert torch.equal(state.vector, start.flatten())
    assert state.report == {"gap_before": 0.0, "gap": 0.0}
