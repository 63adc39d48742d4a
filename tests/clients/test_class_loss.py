"""Label smoothing and class weights: a pack trains each client as torch's CrossEntropyLoss would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_runs import CLASSIFICATION, lowrank

from rayfed.api.plans import build_components
from rayfed.clients.local_training import PackMember, TrainedClient, TrainingContext, batches, train_pack
from rayfed.config.training import Client
from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.stack import Stack
from rayfed.objectives.fedprox import FedProx
from rayfed.tasks.data.federation import NumberRows
from rayfed.tasks.low_rank_regression import LinearModel
from rayfed.tasks.metrics import single_label

IN, CLASSES, SEED, ROUND, LR = 6, 4, 3, 2, 0.1
DRAW = np.random.default_rng(0)
LABELS = np.array([0] * 12 + [1] * 5 + [3] * 2 + [2, 1, 0])  # the first client lacks class 2
DATA = NumberRows(DRAW.normal(size=(len(LABELS), IN)).astype(np.float32), LABELS)
ROWS = (range(0, 19), range(17, 22), range(3, 5))
SETTINGS = [
    {"label_smoothing": 0.2},
    {"class_weights": "balanced"},
    {"label_smoothing": 0.1, "class_weights": "balanced"},
]


def member(client: int, rows: range) -> PackMember:
    g = torch.Generator().manual_seed(client)
    pair = LowRank(torch.randn(CLASSES, 2, generator=g), torch.randn(2, IN, generator=g), 0.5)
    adapter = Adapter({"layer": pair}, {})
    everything = torch.ones(adapter.layout.size, dtype=torch.bool)
    return PackMember(client, adapter.layout, adapter.flatten(), everything, np.asarray(rows))


def train(members: list[PackMember], settings: Client, **more: Any) -> list[TrainedClient]:
    stack = Stack(model := LinearModel(CLASSES, IN).requires_grad_(False), ["layer"], [])
    own = (settings, SEED, torch.device("cpu"))
    context = TrainingContext(stack, lambda inputs: model(**inputs), CLASSIFICATION, DATA, True, *own, **more)
    return train_pack(context, members, lr=LR, t=ROUND)


def reference(own: PackMember, settings: Client) -> tuple[torch.Tensor, float]:
    """The client's entries after training and its mean loss, by torch's loss."""
    counts = np.bincount(LABELS[own.rows], minlength=CLASSES)
    weight = None
    if settings.class_weights:
        present = counts > 0
        weight = torch.tensor([sum(counts) / (present.sum() * n) if n else 0.0 for n in counts], dtype=torch.float32)
    criterion = torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=settings.label_smoothing)
    values, losses = own.start.clone().requires_grad_(), []
    optimizer = torch.optim.SGD([values], lr=LR, momentum=settings.momentum)
    for rows in batches(own.rows, settings, SEED, ROUND, own.client):
        pair = own.layout.unflatten(values).layers["layer"]
        logits = torch.from_numpy(DATA.features[rows]) @ (pair.scale * pair.B @ pair.A).T
        loss = criterion(logits, torch.from_numpy(LABELS[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return values.detach(), float(np.mean(losses))


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_pack_is_torchs_loss_of_each_client(options: dict[str, Any]) -> None:
    settings = Client(batch_size=4, epochs=2, **options)
    members = [member(client, rows) for client, rows in enumerate(ROWS)]
    for own, result in zip(members, train(members, settings), strict=True):
        vector, loss = reference(own, settings)
        assert result.loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(result.vector, vector, rtol=1e-4, atol=1e-5)


def test_it_goes_with_an_objective_that_adds_to_the_loss() -> None:
    settings, own = Client(batch_size=4, epochs=2, label_smoothing=0.2), [member(0, ROWS[0])]
    ((smooth,), (pulled,)) = train(own, settings), train(own, settings, objective=FedProx(0.0))
    assert torch.equal(smooth.vector, pulled.vector)
    ((plain,),) = (train(own, Client(batch_size=4, epochs=2)),)
    assert not torch.allclose(smooth.vector, plain.vector)


def test_weights_of_equal_counts_are_1_and_every_clients_rows_have_mean_1() -> None:
    counts = torch.tensor([[3.0, 3.0, 0.0], [1.0, 2.0, 9.0], [0.0, 0.0, 0.0]])
    weights = single_label.balanced(counts)
    assert weights[0].tolist() == [1.0, 1.0, 0.0]
    torch.testing.assert_close((weights * counts).sum(1), counts.sum(1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("client.label_smoothing=1.0",), r"client\.label_smoothing: got 1\.0, but it should be a number in \[0, 1\)"),
        (("client.class_weights=some",), r"client\.class_weights: got 'some', but it should be balanced or null"),
        (("client.label_smoothing=0.1",), r"client\.label_smoothing: got 0\.1, .* data\.task=text_classification and"),
        (
            ("data.source=stdlib", "partition.kind=iid", "client.class_weights=balanced", "objective.name=fedlc"),
            r"client\.class_weights: got 'balanced', but objective\.name=fedlc has a loss of its own; leave one out",
        ),
        (
            (
                "data.source=stdlib",
                "partition.kind=iid",
                "client.label_smoothing=0.1",
                "privacy={kind: example, noise_multiplier: 1}",
            ),
            r"client\.label_smoothing: got 0\.1, but with privacy\.kind=example every row has the task's own loss",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        build_components(lowrank(*overrides))
