"""Samples of the head, and the pass that measures features and outputs: in packs, alone, and against plain torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_runs import CLASSIFICATION
from torch.nn.functional import cross_entropy, linear, normalize

from rayfed import seeding
from rayfed.api import prepare
from rayfed.clients.local_training import PackMember, TrainingContext, train_pack
from rayfed.clients.own_rows import measured_statistics
from rayfed.clients.trainer import Trainer
from rayfed.config.training import Client
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.stack import Stack, head_values
from rayfed.objectives import ClassStatistics, ClientRound, Message, Stateful
from rayfed.objectives.fedhpl import FedHPL
from rayfed.objectives.fedimpro import FedImpro
from rayfed.tasks.models.unpadded import Unpadded, UnpaddedModel

CLASSES, WIDTH, SEED, ROUND, LR = 4, 32, 7, 3, 0.1
LAYERS = [f"encoder.encoder.layer.{i}.attention.self.query" for i in range(2)]
SETTINGS = Client(optimizer="sgd", momentum=0.0, batch_size=4)
DRAW = torch.Generator().manual_seed(5)
STATISTICS = ClassStatistics(
    torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.randn(4, WIDTH, generator=DRAW), torch.rand(4, WIDTH, generator=DRAW)
)


class Lab:
    """Members with random adapters, and their training on fresh copies of the base."""

    def __init__(self, base, tokens, flat=False, objective=None):
        self.base, self.tokens, self.flat, self.objective = base, tokens, flat, objective or FedImpro()

    def member(self, client, rows, numbers, rank=2):
        g = torch.Generator().manual_seed(client)
        pair = {
            name: LowRank(0.1 * torch.randn(WIDTH, rank, generator=g), torch.randn(rank, WIDTH, generator=g), 1.0)
            for name in LAYERS
        }
        head = head_values(self.base().model, self.base().head)
        adapter = Adapter(pair, {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in head.items()})
        vector, support = adapter.flatten(), torch.ones(adapter.layout.size, dtype=torch.bool)
        known = ClientRound(vector, support, torch.full_like(vector, LR), Message(numbers=numbers))
        return PackMember(client, adapter.layout, vector, support, np.asarray(rows, np.int64), context=known)

    def pack(self, numbers):
        """Of ranks 2 and 3, with batches of several sizes."""
        return [
            self.member(0, range(0, 6), numbers),
            self.member(1, range(6, 9), numbers, rank=3),
            self.member(2, range(20, 36), numbers),
        ]

    def context(self, settings=SETTINGS):
        fresh = self.base()
        stack = Stack(fresh.model, LAYERS, fresh.head)
        model = UnpaddedModel(fresh.model, Unpadded("mean")) if self.flat else None

        def forward(inputs):
            return model(inputs, stack.batch.segments) if model is not None else fresh.model(**inputs).logits

        own = (stack, forward, CLASSIFICATION, self.tokens, not self.flat, settings, SEED, torch.device("cpu"))
        return TrainingContext(*own, objective=self.objective, normalized=fresh.model.normalize)

    def train(self, members, settings=SETTINGS):
        return train_pack(self.context(settings), members, lr=LR, t=ROUND)


@pytest.fixture(params=["padded", "flat"])
def lab(request, base, tokens):
    return Lab(base, tokens, request.param == "flat")


def head_of(member, vector):
    head = member.layout.unflatten(vector).head
    return head["classifier.weight"], head["classifier.bias"]


def test_a_pack_is_each_client_alone_and_samples_are_its_own(lab):
    numbers = STATISTICS.numbers(True)
    pack = lab.pack(numbers)
    together, plain = lab.train(pack), lab.train(lab.pack(None))
    for own, result, without in zip(pack, together, plain, strict=True):
        (alone,) = lab.train([own])
        torch.testing.assert_close(result.vector, alone.vector, rtol=1e-4, atol=1e-5)
        assert result.loss == pytest.approx(alone.loss, rel=1e-4)
        assert not torch.allclose(result.vector, without.vector, atol=1e-3)


def test_under_fedhpl_a_pack_is_each_client_alone(lab):
    """The targets are those of the client's own message, which here differ."""
    lab.objective = FedHPL()
    pack, plain = lab.pack(None), lab.train(lab.pack(None))
    for i, member in enumerate(pack):
        logits = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(i))
        numbers = ClassStatistics(STATISTICS.counts, logits, torch.zeros_like(logits)).numbers(variances=False)
        known = dataclasses.replace(member.context, received=Message(numbers=numbers))
        pack[i] = dataclasses.replace(member, context=known)
    for own, result, without in zip(pack, lab.train(pack), plain, strict=True):
        (alone,) = lab.train([own])
        torch.testing.assert_close(result.vector, alone.vector, rtol=1e-4, atol=1e-5)
        assert result.loss == pytest.approx(alone.loss, rel=1e-4)
        assert not torch.allclose(result.vector, without.vector, atol=1e-3)


def test_only_the_head_moves_by_the_samples(lab):
    """After one step the factors have the bits of plain training, and the head has moved by the gradient of the term,
    written out in torch."""
    once = SETTINGS.model_copy(update={"steps": 1, "epochs": None})
    for weight in (1.0, 0.5):
        lab.objective = FedImpro(weight=weight)
        own, without = lab.member(4, range(10, 17), STATISTICS.numbers(True)), lab.member(4, range(10, 17), None)
        (result,), (plain,) = lab.train([own], once), lab.train([without], once)
        head = own.layout.mask("head")
        assert torch.equal(result.vector[~head], plain.vector[~head])
        assert not torch.equal(plain.vector[~head], own.start[~head])
        assert result.loss == plain.loss  # the loss of the rows alone
        draw = seeding.torch_rng(SEED, "objective.samples", ROUND, 4, 0)
        features, labels = lab.objective.samples(own.context, SETTINGS.batch_size, draw)
        values = [tensor.clone().requires_grad_() for tensor in head_of(own, own.start)]
        scaled = normalize(features, dim=-1) * WIDTH**0.5  # as the model does with its features
        (weight * cross_entropy(linear(scaled, *values), labels)).backward()
        for value, found, before in zip(values, head_of(own, result.vector), head_of(own, plain.vector), strict=True):
            torch.testing.assert_close(before - found, LR * value.grad, rtol=1e-3, atol=1e-6)


def test_a_weight_of_zero_is_plain_training_to_the_bit(lab):
    plain = lab.train(lab.pack(None))
    lab.objective = FedImpro(weight=0.0)
    for found, wanted in zip(lab.train(lab.pack(STATISTICS.numbers(True))), plain, strict=True):
        assert torch.equal(found.vector, wanted.vector)


DRAWN: dict[int, list[torch.Tensor]] = {}


class Recorded(FedImpro):
    """Records what each client draws, by the number of its entries."""

    def samples(self, client, rows, draw):
        found = super().samples(client, rows, draw)
        DRAWN.setdefault(len(client.start), []).append(found[0])
        return found


def test_samples_are_new_in_every_step_and_the_same_in_any_pack(lab):
    lab.objective = Recorded()
    pack = lab.pack(STATISTICS.numbers(True))[:2]  # of two and of one step
    drawn = []
    for packs in ([pack], [pack[:1], pack[1:]]):
        DRAWN.clear()
        for members in packs:
            lab.train(members)
        drawn.append({n: torch.cat(found) for n, found in DRAWN.items()})
        assert [len(found) for found in DRAWN.values()] == [2, 1]
        first, second = DRAWN[len(pack[0].start)]
        assert not torch.equal(first[:3], second[:3])
        assert not torch.equal(first[:3], DRAWN[len(pack[1].start)][0][:3])
    assert drawn[0].keys() == drawn[1].keys()
    assert all(torch.equal(drawn[0][n], drawn[1][n]) for n in drawn[0])


class Outputs(Stateful):
    """Measures the model's outputs."""

    measures = "outputs"


@pytest.mark.parametrize("what", ["features", "outputs"])
def test_the_pass_measures_each_client_by_class(lab, what):
    """Against the head of each client's model, computed row by row."""
    lab.objective = FedImpro() if what == "features" else Outputs()
    members = [*lab.pack(None), lab.member(9, range(0), None)]
    vectors = [member.start for member in members]
    found = measured_statistics(lab.context(), members, vectors, CLASSES)
    for member, own in zip(members, found, strict=True):
        if not len(member.rows):
            assert not own.known.any()
            continue
        context, seen = lab.context(), []
        (layer,) = context.stack.head.values()
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        (alone,) = measured_statistics(context, [member], [member.start], CLASSES)
        features = torch.cat(seen).detach()
        torch.testing.assert_close(features.square().mean(1), torch.ones(len(features)))  # normalised
        rows = features if what == "features" else linear(features, *head_of(member, member.start))
        wanted = ClassStatistics.of(rows, torch.from_numpy(lab.tokens.labels[member.rows]), CLASSES)
        for name in ("counts", "means", "variances"):
            torch.testing.assert_close(getattr(alone, name), getattr(wanted, name), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(getattr(own, name), getattr(wanted, name), rtol=1e-4, atol=1e-5)


def test_a_client_without_a_model_is_not_measured(base, tokens):
    lab = Lab(base, tokens)
    members = lab.pack(None)
    some = measured_statistics(lab.context(), members, [members[0].start, None, members[2].start], CLASSES)
    every = measured_statistics(lab.context(), members, [member.start for member in members], CLASSES)
    assert some[1] is None
    torch.testing.assert_close(some[2].means, every[2].means, rtol=1e-4, atol=1e-5)
    assert measured_statistics(lab.context(), members, [None] * 3, CLASSES) == [None] * 3


@pytest.mark.parametrize("padding", ["batch", "never"])
def test_the_head_of_gpt2_has_the_features_of_the_last_token(tiny, tiny_gpt2, padding):
    """A head is linear: its mean outputs are those of its mean inputs."""
    model = (f"model.name={tiny_gpt2}", "model.pooling=stock", 'lora.target_modules=["c_attn"]')
    plan = prepare(tiny(*model, f"engine.padding={padding}"))
    context, start, found = Trainer(plan).context, plan.start(), {}
    vector, rows = start.flatten(), [plan.federation.rows_of(client) for client in plan.federation.holders[:3]]
    support = torch.ones(len(vector), dtype=torch.bool)
    pack = [PackMember(i, start.layout, vector, support, own) for i, own in enumerate(rows)]
    for objective in (FedImpro(), FedHPL()):
        changed = dataclasses.replace(context, objective=objective)
        found[objective.measures] = measured_statistics(changed, pack, [vector] * 3, CLASSES)
    for features, outputs in zip(found["features"], found["outputs"], strict=True):
        known = features.known
        expected = linear(features.means, start.head["score.weight"])
        torch.testing.assert_close(outputs.means[known], expected[known], rtol=1e-4, atol=1e-5)
