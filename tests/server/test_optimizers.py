"""Server optimizers against their published formulas, written out again here in a few lines of float64."""

import pytest
import torch

from rayfed.config.training import Schedule, Server
from rayfed.errors import UserError
from rayfed.server.optimizers import ServerOptimizer, scheduled


def changes(rounds=6, n=50):
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(n, generator=draw)
    return start, [0.1 * torch.randn(n, generator=draw) for _ in range(rounds)]


def advanced(optimizer, start, deltas):
    x = start
    for delta in deltas:
        x = optimizer.advance("vector", x, delta)
    return x


def test_fedavg_adds_the_mean_change():
    start, deltas = changes()
    ours = advanced(ServerOptimizer("fedavg", Server()), start, deltas)
    torch.testing.assert_close(ours, start + sum(deltas))


def test_sgd_scales_it():
    start, deltas = changes()
    ours = advanced(ServerOptimizer("sgd", Server(lr=0.3)), start, deltas)
    torch.testing.assert_close(ours, start + 0.3 * sum(deltas))


def test_fedavgm_has_heavy_ball_momentum():
    start, deltas = changes()
    x, v = start.double(), torch.zeros(50, dtype=torch.float64)
    for delta in deltas:
        v = 0.8 * v + delta
        x = x + 0.5 * v
    ours = advanced(ServerOptimizer("fedavgm", Server(lr=0.5, momentum=0.8)), start, deltas)
    torch.testing.assert_close(ours.double(), x, rtol=1e-5, atol=1e-6)


def test_fedadam_is_algorithm_2_of_reddi_et_al():
    start, deltas = changes()
    x, m, v = start.double(), torch.zeros(50).double(), torch.full((50,), 1e-6).double()
    for delta in deltas:
        m = 0.9 * m + 0.1 * delta
        v = 0.99 * v + 0.01 * delta.double() ** 2
        x = x + 0.02 * m / (v.sqrt() + 1e-3)
    ours = advanced(ServerOptimizer("fedadam", Server(lr=0.02)), start, deltas)
    torch.testing.assert_close(ours.double(), x, rtol=1e-5, atol=1e-6)


def test_adamw_is_torchs_with_its_defaults_and_decays_entries_that_no_client_sent():
    start, deltas = changes()
    deltas = [delta.index_fill(0, torch.arange(10), 0.0) for delta in deltas]
    parameter = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([parameter], lr=1e-3)
    for delta in deltas:
        parameter.grad = -delta
        theirs.step()
    ours = advanced(ServerOptimizer("adamw", Server()), start, deltas)
    assert torch.equal(ours, parameter.detach())
    torch.testing.assert_close(ours[:10], start[:10] * (1 - 1e-5) ** 6)


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam", "adamw"])
def test_restored_moments_go_on_to_the_bit(kind):
    start, deltas = changes()
    whole = advanced(ServerOptimizer(kind, Server()), start, deltas)
    first = ServerOptimizer(kind, Server())
    middle = advanced(first, start, deltas[:3])
    second = ServerOptimizer(kind, Server())
    second.state = {name: tensor.clone() for name, tensor in first.state.items()}
    assert torch.equal(advanced(second, middle, deltas[3:]), whole)
    forgetful = advanced(ServerOptimizer(kind, Server()), middle, deltas[3:])
    assert not torch.equal(forgetful, whole)


def test_values_given_are_not_changed():
    for kind in ("fedavg", "sgd", "fedavgm", "fedadam", "adamw"):
        start, deltas = changes(rounds=2)
        before = start.clone()
        optimizer = ServerOptimizer(kind, Server())
        middle = optimizer.advance("vector", start, deltas[0])
        after = middle.clone()
        optimizer.advance("vector", middle, deltas[1])
        assert torch.equal(start, before), kind
        assert torch.equal(middle, after), kind


@pytest.mark.parametrize(("kind", "settings"), [("fedavg", Server(lr=0.1)), ("sgd", Server(weight_decay=0.1))])
def test_settings_an_optimizer_does_not_have_are_refused(kind, settings):
    with pytest.raises(UserError, match=r"^server"):
        ServerOptimizer(kind, settings)


def test_rates_warm_up_and_fall_to_their_final_factor():
    rates = [scheduled(2.0, Schedule(kind="cosine", warmup=2, final=0.1), t, 10) for t in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[-1] == pytest.approx(0.2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    linear = [scheduled(1.0, Schedule(kind="linear", final=0.5), t, 5) for t in range(5)]
    assert linear == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5])
    exponential = [scheduled(1.0, Schedule(kind="exponential", final=0.01), t, 3) for t in range(3)]
    assert exponential == pytest.approx([1.0, 0.1, 0.01])
    assert {scheduled(1.0, Schedule(), t, 5) for t in range(5)} == {1.0}
