"""A client's loss is the sum of its rows' sums over the sum of their counts, whatever pack it is in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayfed.clients.local_training import PackMember, TrainingContext, batches, train_pack
from rayfed.config.training import Client
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.stack import Stack
from rayfed.tasks.base import Task
from rayfed.tasks.low_rank_regression import LinearModel, NumberRows

IN, OUT, SEED, ROUND, LR = 5, 4, 3, 2, 0.05


class MissingTargets(Task):
    """Squared errors of the targets that are there: a row has as many terms as it has targets that are not nan."""

    def loss(self, outputs, labels):
        there = ~labels.isnan()
        errors = torch.where(there, outputs - labels.nan_to_num(), 0.0).square()
        return errors.sum(1), there.sum(1).float()


@pytest.fixture
def data():
    draw = np.random.default_rng(0)
    targets = draw.normal(size=(30, OUT)).astype(np.float32)
    for row in range(30):
        targets[row, 1 + row % OUT :] = np.nan  # rows of 1 to 4 terms
    return NumberRows(draw.normal(size=(30, IN)).astype(np.float32), targets)


def member(client: int, rows: range) -> PackMember:
    g = torch.Generator().manual_seed(client)
    pair = LowRank(torch.randn(OUT, 2, generator=g), torch.randn(2, IN, generator=g), 0.5)
    adapter = Adapter({"layer": pair}, {})
    everything = torch.ones(adapter.layout.size, dtype=torch.bool)
    return PackMember(client, adapter.layout, adapter.flatten(), everything, np.asarray(rows))


def dense(own: PackMember, data: NumberRows, settings: Client) -> tuple[torch.Tensor, float]:
    """The client's entries after training and its mean loss, with a loop over rows and targets."""
    pair = own.layout.unflatten(own.start).layers["layer"]
    A, B = pair.A.clone().requires_grad_(), pair.B.clone().requires_grad_()
    optimizer, losses = torch.optim.SGD([A, B], lr=LR, momentum=settings.momentum), []
    for rows in batches(own.rows, settings, SEED, ROUND, own.client):
        total, count = torch.zeros(()), 0
        for row in rows:
            outputs = pair.scale * B @ (A @ torch.from_numpy(data.features[row]))
            for output, target in zip(outputs, data.labels[row]):
                if not np.isnan(target):
                    total, count = total + (output - float(target)) ** 2, count + 1
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(float(total.detach()) / count)
    trained = Adapter({"layer": LowRank(B.detach(), A.detach(), pair.scale)}, {})
    return trained.flatten(), sum(losses) / len(losses)


@pytest.mark.parametrize("pack", [[0], [0, 1, 2], [2, 0]], ids=str)
def test_rows_of_different_counts_weigh_by_their_counts(data, pack):
    settings = Client(optimizer="sgd", momentum=0.9, batch_size=4)
    members = [member(0, range(0, 7)), member(1, range(7, 9)), member(2, range(9, 30))]
    stack = Stack(model := LinearModel(OUT, IN).requires_grad_(False), ["layer"], [])

    def forward(inputs):
        return model(**inputs)

    context = TrainingContext(stack, forward, MissingTargets(), data, True, settings, SEED, torch.device("cpu"))
    chosen = [members[i] for i in pack]
    for own, result in zip(chosen, train_pack(context, chosen, lr=LR, t=ROUND), strict=True):
        vector, loss = dense(own, data, settings)
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert (vector - own.start).norm() > 0.05
        torch.testing.assert_close(result.vector, vector, rtol=1e-4, atol=1e-5)
