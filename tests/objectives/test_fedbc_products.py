"""FedBC for methods that average products: its distance, its pull and its weights live in the space of products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import lowrank

import rayfed
from rayfed import wire
from rayfed.api import prepare
from rayfed.clients.messages import ClientOrder, ObjectiveOrder, TrainJob
from rayfed.clients.trainer import Trainer
from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import METHODS, Trainable, method_class

PRODUCTS = [name for name in METHODS if method_class(name).averages == "products"]
LR, SCALES = 0.05, (2.0, 1.0)
LAM = torch.tensor([0.7, 0.4])


def starts() -> list[Adapter]:
    """Two clients of ranks 1 and 2, with scales of their own, at random pairs."""
    g = torch.Generator().manual_seed(3)
    ranks = zip((1, 2), SCALES, strict=True)
    return [
        Adapter({"layer": LowRank(torch.randn(6, r, generator=g), torch.randn(r, 6, generator=g), s)}, {})
        for r, s in ranks
    ]


def trained(steps: int, stored: torch.Tensor | None) -> tuple[list[LowRank], list[torch.Tensor]]:
    """The pairs of the two clients after so many steps in one pack, and the numbers that they send."""
    plan = prepare(lowrank(
        "method.name=flexlora", "profiles={kind: tiers, ranks: [1, 2]}", "objective.name=fedbc", "objective.rate=0.5",
        "objective.gamma=0.25", f"client.steps={steps}", f"client.lr={LR}",
    ))  # fmt: skip
    adapters = starts()
    payloads = [wire.encode(adapter.flatten()) for adapter in adapters]
    payloads += [] if stored is None else [wire.encode(torch.stack([lam, torch.tensor(0.25)])) for lam in stored]
    orders = tuple(
        ClientOrder(
            k, a.layout, k, Trainable(), a.layout.size, 1.0, "fp32",
            objective=ObjectiveOrder(stored=None if stored is None else 2 + k),
        )
        for k, a in enumerate(adapters)
    )  # fmt: skip
    result = Trainer(plan).execute(TrainJob(0, LR, orders), payloads)
    ends = [
        a.layout.unflatten(a.flatten() + wire.decode(upload).values).layers["layer"]
        for a, upload in zip(adapters, result.uploads, strict=True)
    ]
    return ends, [wire.decode(message.numbers).values for message in result.messages]


def change(end: LowRank, start: LowRank) -> np.ndarray:
    """s (B A - B_z A_z) in float64."""
    return end.scale * ((end.B.double() @ end.A.double()) - (start.B.double() @ start.A.double())).numpy()


def test_the_pull_is_the_gradient_of_the_squared_distance_of_products() -> None:
    """In the first step there is no distance, so two steps with and without the pull differ by one pull."""
    once, plain, pulled = trained(1, None)[0], trained(2, None)[0], trained(2, LAM)[0]
    for k, adapter in enumerate(starts()):
        z, w = adapter.layers["layer"], once[k]
        D, lam, s = change(w, z), float(LAM[k]), SCALES[k]
        in_B, in_A = 2 * lam * s * D @ w.A.double().numpy().T, 2 * lam * s * w.B.double().numpy().T @ D
        assert np.abs(in_B).max() > 1e-2
        np.testing.assert_allclose((pulled[k].B - plain[k].B).double().numpy(), -LR * in_B, atol=2e-6)
        np.testing.assert_allclose((pulled[k].A - plain[k].A).double().numpy(), -LR * in_A, atol=2e-6)


def test_the_dual_variable_grows_with_the_squared_distance_of_products() -> None:
    ends, numbers = trained(3, LAM)
    for k, adapter in enumerate(starts()):
        square = np.square(change(ends[k], adapter.layers["layer"])).sum()
        assert float(numbers[k]) == pytest.approx(max(0.0, float(LAM[k]) + 0.5 * (square - 0.25)), rel=1e-5)


@pytest.mark.parametrize("method", [name for name in PRODUCTS if name != "fedhl"])
def test_every_such_method_takes_it_and_with_rate_0_is_itself(method: str, tmp_path) -> None:
    own = (f"method.name={method}", "server.weights=auto")
    if method_class(method).mixed_ranks:
        own = (*own, "profiles={kind: tiers, ranks: [1, 2]}")
    plain = rayfed.run(lowrank(*own, "server.weights=uniform"), out=tmp_path / "plain")
    still = rayfed.run(lowrank(*own, "objective.name=fedbc", "objective.rate=0"), out=tmp_path / "still")
    moved = rayfed.run(lowrank(*own, "objective.name=fedbc", "objective.rate=0.5"), out=tmp_path / "moved")
    last = [run.history["train/loss"].tolist()[-1] for run in (plain, still, moved)]
    assert last[0] == pytest.approx(last[1], rel=1e-6)
    assert last[0] != pytest.approx(last[2], rel=1e-6)


def test_every_layer_is_pulled_to_its_own_start(tiny) -> None:
    """In a model of many layers, whose order in messages is another: a pull of 0 distance has no gradient."""
    trainer = Trainer(prepare(tiny("method.name=flexlora", "lora.target_modules=all-linear", "objective.name=fedbc")))
    order = trainer.plan.method.broadcast(
        trainer.plan.method.init(trainer.plan.start(), 0), trainer.plan.profiles.profile(0, 1, 0)
    ).layout
    g = torch.Generator().manual_seed(2)
    start = torch.randn(order.size, generator=g)
    assert list(order.unflatten(start).layers) != list(trainer.stack.lora)
    own = ClientOrder(0, order, 0, Trainable(), order.size, 1.0, "fp32", objective=ObjectiveOrder(stored=1))
    payloads = [wire.decode(wire.encode(values)) for values in (start, torch.tensor([1.0, 0.0]))]
    (member,) = [trainer._member(own, payloads, {}, 0.1, 0)]
    trainer.stack.load([order.unflatten(start)], [{}])
    assert member.objective.penalty(trainer.stack.factors(0)) == 0
    moved = order.unflatten(start + 1e-3)
    trainer.stack.load([moved], [{}])
    expected = sum(
        np.square(change(pair, order.unflatten(start).layers[name])).sum() for name, pair in moved.layers.items()
    )
    assert float(member.objective.penalty(trainer.stack.factors(0))) == pytest.approx(expected, rel=1e-3)


def test_methods_with_weights_of_their_own_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"objective.name: got 'fedbc', but its dual variables are the clients' weights"
    ):
        prepare(lowrank("method.name=fedhl", "objective.name=fedbc"))
    prepare(lowrank("method.name=fedhl", "method.data=examples", "objective.name=fedbc"))
