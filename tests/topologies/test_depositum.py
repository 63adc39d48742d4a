"""DEPOSITUM: every iterate against NumPy, the invariant, and the optimum that decentralised FedAvg does not reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quadratics import ALPHA, CLIENTS, COMPLETE, RING, SIZE, Quadratics, central, gradients, soft

from rayfed.topologies import Algorithm, Vectors, build

GAMMA, WEIGHT = 0.4, 0.3


def rounds(algorithm: Algorithm, network: Quadratics, count: int) -> list[Vectors]:
    """The vectors after each of so many rounds, from a common start."""
    own: Vectors = {name: torch.zeros(CLIENTS, SIZE, dtype=torch.float64) for name in algorithm.vectors}
    own = {**own, "x": own["x"] + 0.3}
    found = []
    for _ in range(count):
        own = algorithm.round(own, network)
        found.append(own)
    return found


def by_hand(order: str, steps: int, count: int) -> list[tuple[np.ndarray, ...]]:
    """(x, y, nu, g) after every single step."""
    x, y, nu, g = np.full((CLIENTS, SIZE), 0.3), *np.zeros((3, CLIENTS, SIZE))
    found = []
    for t in range(steps * count):
        W = RING if (t + 1) % steps == 0 else np.eye(CLIENTS)
        nu = GAMMA * nu + (1 - GAMMA) * y
        if order == "prox_mix":
            x = W @ soft(x - ALPHA * nu, ALPHA * WEIGHT)
        else:
            x = soft(W @ x - ALPHA * nu, ALPHA * WEIGHT)
        y, g = W @ (y + gradients(x) - g), gradients(x)
        np.testing.assert_allclose(y.mean(0), g.mean(0), atol=1e-12)
        found.append((x, y, nu, g))
    return found


@pytest.mark.parametrize("order", ["prox_mix", "mix_prox"])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_iterate_is_that_of_the_equations(order: str, steps: int) -> None:
    network = Quadratics(RING, steps, GAMMA)
    found = rounds(build("depositum", prox="l1", prox_weight=WEIGHT, order=order), network, 6)
    expected = by_hand(order, steps, 6)
    np.testing.assert_allclose(np.stack(network.seen), np.stack([x for x, *_ in expected]), atol=1e-13)
    for own, step in zip(found, expected[steps - 1 :: steps], strict=True):
        for name, values in zip(("x", "y", "nu", "g"), step, strict=True):
            np.testing.assert_allclose(own[name].numpy(), values, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("order", ["prox_mix", "mix_prox"])
@pytest.mark.parametrize("steps", [1, 5])
def test_all_clients_reach_the_central_optimum(order: str, steps: int) -> None:
    *_, last = rounds(
        build("depositum", prox="l1", prox_weight=WEIGHT, order=order), Quadratics(RING, steps, GAMMA), 3000 // steps
    )
    optimum = central(WEIGHT)
    assert 0 < (optimum == 0).sum() < SIZE  # or h would have nothing to show
    assert float((last["x"] - torch.from_numpy(optimum)).abs().max()) < 1e-12
    torch.testing.assert_close(last["y"].mean(0), last["g"].mean(0), atol=1e-13, rtol=0)


def test_decentralised_fedavg_settles_elsewhere() -> None:
    """Without h, so that both algorithms have one problem."""
    optimum = torch.from_numpy(central(0.0))
    *before, last = rounds(build("dfedavg"), Quadratics(RING, 5), 600)
    assert float((last["x"] - before[-1]["x"]).abs().max()) < 1e-12  # it has settled
    assert float((last["x"].mean(0) - optimum).abs().max()) > 1e-3
    *_, tracked = rounds(build("depositum"), Quadratics(RING, 5, GAMMA), 600)
    assert float((tracked["x"] - optimum).abs().max()) < 1e-12


def test_on_a_complete_graph_it_is_gradient_descent_one_step_late() -> None:
    found = rounds(build("depositum"), Quadratics(COMPLETE, 1), 8)
    x = np.full(SIZE, 0.3)
    for own in found:
        np.testing.assert_allclose(own["x"].numpy(), np.tile(x, (CLIENTS, 1)), atol=1e-13)
        x = x - ALPHA * gradients(np.tile(x, (CLIENTS, 1))).mean(0)


def test_mixing_before_the_prox_leaves_each_model_sparse() -> None:
    sparse, filled = (
        rounds(build("depositum", prox="l1", prox_weight=0.5, order=order), Quadratics(RING, 1, GAMMA), 6)[-1]["x"] == 0
        for order in ("mix_prox", "prox_mix")
    )
    assert int(sparse.sum()) > int(filled.sum())
