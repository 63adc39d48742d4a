"""Packs under each objective, against a loop over rows that writes the objective out, and against each client alone."""

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
from rayfed.objectives import Objective, Plain
from rayfed.objectives.fedga import FedGA
from rayfed.objectives.fedlc import FedLC
from rayfed.objectives.fedprox import FedProx
from rayfed.objectives.tail_penalty import TailPenalty
from rayfed.tasks.data.federation import NumberRows
from rayfed.tasks.low_rank_regression import LinearModel

IN, CLASSES, SEED, ROUND = 6, 4, 3, 2
LR = {"sgd": 0.1, "adamw": 0.02}
SETTINGS = {
    "sgd": Client(optimizer="sgd", momentum=0.9, batch_size=4, epochs=2, weight_decay=0.01),
    "adamw": Client(optimizer="adamw", batch_size=4, epochs=2, clip_norm=0.1),
}
DRAW = np.random.default_rng(0)
DATA = NumberRows(
    DRAW.normal(size=(40, IN)).astype(np.float32), np.concatenate([DRAW.integers(0, 3, 30), np.arange(10) % CLASSES])
)


@dataclasses.dataclass(frozen=True)
class Decay(Objective):
    """A pull towards 0: unlike FedProx's, it is not 0 for entries that do not train."""

    strength: float

    def gradient(self, values, start):
        return self.strength * values


def member(client: int, rows: range, rank: int, share: float = 1.0) -> PackMember:
    """A client of that rank; a share of its entries trains."""
    g = torch.Generator().manual_seed(client)
    pair = LowRank(torch.randn(CLASSES, rank, generator=g), torch.randn(rank, IN, generator=g), 1.0 / rank)
    adapter = Adapter({"layer": pair}, {})
    support = torch.rand(adapter.layout.size, generator=g) < share
    return PackMember(client, adapter.layout, adapter.flatten(), support, np.asarray(rows))


MEMBERS = [member(0, range(0, 7), 1), member(1, range(5, 8), 3), member(2, range(9, 40), 2, share=0.6)]


def train(members, settings, objective):
    stack = Stack(model := LinearModel(CLASSES, IN).requires_grad_(False), ["layer"], [])

    def forward(inputs):
        return model(**inputs)

    own = (settings, SEED, torch.device("cpu"))
    context = TrainingContext(stack, forward, CLASSIFICATION, DATA, True, *own, objective=objective)
    return train_pack(context, members, lr=LR[settings.optimizer], t=ROUND)


def row_loss(objective, logits, label, counts, batch_counts):
    """The loss of one row, from the formula."""
    if isinstance(objective, FedLC):
        shifted = {c: logits[c] - objective.tau * n**-0.25 for c, n in enumerate(counts) if n}
        others = [s for c, s in shifted.items() if objective.denominator == "all" or c != label]
        return torch.stack(others).logsumexp(0) - shifted[label]
    targets = torch.eye(CLASSES)[label]
    if isinstance(objective, FedGA):
        n = torch.tensor(batch_counts if objective.counts == "batch" else counts)
        targets = targets + logits.detach().softmax(0) * (1 - n / n[label])
    return -(targets * logits.log_softmax(0)).sum()


def dense(own, settings, objective):
    """The client's entries after training and its mean loss."""
    pair = own.layout.unflatten(own.start).layers["layer"]
    values = own.start.clone().requires_grad_()
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    more = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {}
    optimizer = kinds[settings.optimizer](
        [values], lr=LR[settings.optimizer], weight_decay=settings.weight_decay, **more
    )
    counts, losses = np.bincount(DATA.labels[own.rows], minlength=CLASSES), []
    for rows in batches(own.rows, settings, SEED, ROUND, own.client):
        adapter = own.layout.unflatten(values).layers["layer"]
        in_batch = np.bincount(DATA.labels[rows], minlength=CLASSES)
        logits = [pair.scale * adapter.B @ (adapter.A @ torch.from_numpy(DATA.features[row])) for row in rows]
        terms = [row_loss(objective, z, DATA.labels[row], counts, in_batch) for z, row in zip(logits, rows)]
        loss = torch.stack(terms).mean()
        losses.append(loss.item())
        if isinstance(objective, FedProx):
            loss = loss + objective.mu / 2 * (values - own.start)[own.support].square().sum()
        if isinstance(objective, Decay):
            loss = loss + objective.strength / 2 * values[own.support].square().sum()
        if isinstance(objective, TailPenalty):
            loss = (
                loss + objective.weight * adapter.B[:, objective.start :].norm() * adapter.A[objective.start :].norm()
            )
        optimizer.zero_grad()
        loss.backward()
        values.grad[~own.support] = 0
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_([values], settings.clip_norm)
        optimizer.step()
        with torch.no_grad():
            values[~own.support] = own.start[~own.support]
    return values.detach(), np.mean(losses)


OBJECTIVES = [
    Plain(), Decay(0.5), FedProx(2.0), FedLC(0.7), FedLC(0.3, "others"), FedGA(), FedGA("client"), TailPenalty(0.1, 1),
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("optimizer", SETTINGS)
def test_a_pack_is_the_formula_and_each_client_alone(optimizer, objective):
    """Ranks 1, 3 and 2, batches of 1 to 4 rows, one client that trains a part of its entries."""
    settings = SETTINGS[optimizer]
    plain = train(MEMBERS, settings, Plain())
    for own, result, without in zip(MEMBERS, train(MEMBERS, settings, objective), plain, strict=True):
        vector, loss = dense(own, settings, objective)
        (alone,) = train([own], settings, objective)
        assert result.loss == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(result.vector, vector, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(result.vector, alone.vector, rtol=1e-4, atol=1e-5)
        assert torch.equal(result.vector[~own.support], own.start[~own.support])
        one_rank = own.client == 0 and isinstance(objective, TailPenalty)  # it has no tail
        assert isinstance(objective, Plain) or one_rank == torch.allclose(result.vector, without.vector, atol=1e-3)


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_no_pull_is_plain_training_to_the_bit(optimizer):
    pulled, plain = (train(MEMBERS, SETTINGS[optimizer], objective) for objective in (FedProx(0.0), Plain()))
    for one, other in zip(pulled, plain, strict=True):
        assert torch.equal(one.vector, other.vector)
        assert one.loss == other.loss


def test_the_row_of_a_class_that_the_client_lacks_keeps_its_bits():
    members, settings = [member(client, range(client, client + 2), 2) for client in range(6)], Client(batch_size=4)
    for own, result in zip(members, train(members, settings, FedLC()), strict=True):
        start, end = (own.layout.unflatten(vector).layers["layer"].B for vector in (own.start, result.vector))
        present = set(DATA.labels[own.rows].tolist())
        moved = set((start != end).any(1).nonzero().flatten().tolist())
        assert moved == (present if len(present) > 1 else set())


def test_a_penalty_of_the_clients_own_comes_on_top():
    """HetLoRA's tail under FedProx and under FedLC."""
    settings = SETTINGS["sgd"]
    tail = dataclasses.replace(MEMBERS[1], objective=TailPenalty(0.5, 1))
    for objective in (FedProx(2.0), FedLC()):
        (both,), (one,) = train([tail], settings, objective), train([MEMBERS[1]], settings, objective)
        (other,) = train([tail], settings, Plain())
        assert (both.vector - one.vector).norm() > 0.01
        assert (both.vector - other.vector).norm() > 0.01
        norms = [r.vector.norm() for r in (both, one)]
        assert norms[0] < norms[1]
