"""Packs under objectives with state, against a loop over each client that writes the equations out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_runs import CLASSIFICATION

from rayfed.clients.local_training import PackMember, TrainingContext, batches, train_pack
from rayfed.config.training import Client
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.stack import Stack
from rayfed.objectives import ClientRound, Message
from rayfed.objectives.fedbc import FedBC
from rayfed.objectives.fedglomo import FedGlomo
from rayfed.objectives.scaffold import Scaffold
from rayfed.tasks.data.federation import NumberRows
from rayfed.tasks.low_rank_regression import LinearModel

IN, CLASSES, SEED, ROUND, LR = 6, 4, 3, 2, 0.1
SETTINGS = Client(optimizer="sgd", momentum=0.0, batch_size=4, epochs=2, weight_decay=0.01, lr=LR)
DRAW = np.random.default_rng(0)
DATA = NumberRows(DRAW.normal(size=(40, IN)).astype(np.float32), DRAW.integers(0, CLASSES, 40))


def member(client: int, rows: range, share: float, stored: int, vector: bool) -> PackMember:
    """A client of which a share of the entries trains, with a random message and ``stored`` random numbers."""
    g = torch.Generator().manual_seed(client)
    pair = LowRank(torch.randn(CLASSES, 2, generator=g), torch.randn(2, IN, generator=g), 0.5)
    adapter = Adapter({"layer": pair}, {})
    n = adapter.layout.size
    support = torch.rand(n, generator=g) < share
    received = Message(torch.randn(n, generator=g) * support if vector else None)
    own = torch.rand(stored or n, generator=g) * (1.0 if stored else support)
    context = ClientRound(adapter.flatten(), support, torch.full((n,), LR), received, own)
    return PackMember(client, adapter.layout, adapter.flatten(), support, np.asarray(rows), context=context)


def members(stored: int = 0, vector: bool = True) -> list[PackMember]:
    """Clients of 4, 2 and 16 steps; the last one trains a part of its entries."""
    return [
        member(client, rows, share, stored, vector)
        for client, rows, share in ((0, range(0, 7), 1.0), (1, range(5, 8), 1.0), (2, range(9, 40), 0.6))
    ]


def train(pack, objective, dropout=0.0):
    stack = Stack(model := LinearModel(CLASSES, IN).requires_grad_(False), ["layer"], [], dropout)

    def forward(inputs):
        return model(**inputs)

    own = (SETTINGS, SEED, torch.device("cpu"))
    context = TrainingContext(stack, forward, CLASSIFICATION, DATA, True, *own, objective=objective)
    return train_pack(context, pack, lr=LR, t=ROUND)


def gradient(own, values, rows):
    """That of the mean loss of the rows, 0 where nothing trains."""
    values = values.clone().requires_grad_()
    pair = own.layout.unflatten(values).layers["layer"]
    logits = torch.from_numpy(DATA.features[rows]) @ pair.A.T @ pair.B.T * pair.scale
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(DATA.labels[rows])).backward()
    return values.grad * own.support


def steps(own):
    return batches(own.rows, SETTINGS, SEED, ROUND, own.client)


def decayed(own, values):
    return SETTINGS.weight_decay * values * own.support


def corrected(own, added):
    values = own.start.clone()
    for rows in steps(own):
        values = values - LR * (gradient(own, values, rows) + added(values) * own.support + decayed(own, values))
    return values


def recursion(own, start, rho):
    """The end of a trajectory with FedGLOMO's estimate."""
    values, before, estimate = start, start, torch.zeros_like(start)
    for step, rows in enumerate(steps(own)):
        last = gradient(own, before, rows) if step else 0.0
        estimate = gradient(own, values, rows) + (rho * (estimate - last) if step else 0.0)
        before, values = values, values - LR * (estimate + decayed(own, values))
    return values


def written_out(own, objective):
    """The client's trained entries, from the equations."""
    known = own.context
    if isinstance(objective, Scaffold):
        return corrected(own, lambda values: known.received.vector - known.stored)
    if isinstance(objective, FedBC):
        return corrected(own, lambda values: 2 * known.stored[0] * (values - own.start))
    g = own.start - recursion(own, own.start, objective.rho)
    if known.received.vector is None:
        return own.start - g
    previous = torch.where(own.support, known.received.vector, own.start)
    return own.start - (g - (1 - objective.beta) * (previous - recursion(own, previous, objective.rho)))


CASES = {
    "scaffold": (Scaffold(), {}),
    "fedbc": (FedBC(), {"stored": 2, "vector": False}),
    "fedglomo": (FedGlomo(), {}),
    "fedglomo-rho-1": (FedGlomo(0.7, 1.0), {}),
    "fedglomo-rho-0": (FedGlomo(0.3, 0.0), {}),
    "fedglomo-first": (FedGlomo(), {"vector": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pack_is_the_equation_and_each_client_alone(name):
    objective, known = CASES[name]
    pack = members(**known)
    for own, result in zip(pack, train(pack, objective), strict=True):
        (alone,) = train([own], objective)
        torch.testing.assert_close(result.vector, written_out(own, objective), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.vector, alone.vector, rtol=1e-5, atol=1e-6)
        assert torch.equal(result.vector[~own.support], own.start[~own.support])
        assert result.steps == len(steps(own))
        assert result.loss == pytest.approx(alone.loss, rel=1e-5)


def test_the_loss_is_that_of_the_first_trajectory():
    (one,), (two,) = train(members(vector=False)[:1], FedGlomo()), train(members()[:1], FedGlomo())
    assert one.loss == two.loss
    assert one.examples == two.examples


def test_both_trajectories_have_the_same_dropout():
    """From one start they end in the same place, so b of the move is left."""
    (own,) = members()[:1]
    same = dataclasses.replace(own.context, received=Message(own.start))
    (twins,) = train([dataclasses.replace(own, context=same)], FedGlomo(0.25), dropout=0.5)
    (one,) = train(members(vector=False)[:1], FedGlomo(0.25), dropout=0.5)
    torch.testing.assert_close(twins.vector - own.start, 0.25 * (one.vector - own.start), rtol=1e-4, atol=1e-6)
    (without,) = train(members(vector=False)[:1], FedGlomo(0.25))
    assert not torch.allclose(without.vector, one.vector, atol=1e-3)


def test_without_a_context_a_client_trains_plainly():
    """As in the baselines, where only a head trains."""
    own = members()[0]
    (plain,) = train([dataclasses.replace(own, context=None)], Scaffold())
    torch.testing.assert_close(plain.vector, corrected(own, torch.zeros_like), rtol=1e-4, atol=1e-5)


def test_scaffolds_control_variate_is_the_mean_gradient():
    """c_i+ is the mean over the steps of the gradient with weight decay, at the points of the corrected trajectory."""
    own = members()[2]
    (result,) = train([own], Scaffold())
    values, total = own.start.clone(), torch.zeros_like(own.start)
    for rows in steps(own):
        found = gradient(own, values, rows) + decayed(own, values)
        total += found
        values = values - LR * (found + own.context.received.vector - own.context.stored)
    sent = Scaffold().message(own.context, result.vector, result.steps)
    after = Scaffold().store(own.context, sent)
    torch.testing.assert_close(after, total / result.steps, rtol=1e-3, atol=1e-4)
    assert not sent.vector[~own.support].any()
