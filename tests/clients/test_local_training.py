"""A pack against a plain loop over a real PEFT model, and against its own members trained alone.

Clients start from random B, not from zero: at B = 0 the first change of A is nothing, and comparing it says nothing.
"""

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_runs import CLASSIFICATION
from torch import nn

from rayfed.clients.local_training import PackMember, TrainingContext, batches, train_pack
from rayfed.config.training import Client
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.stack import Stack, head_values
from rayfed.lora.peft import match_targets
from rayfed.tasks.models.base import in_dtype
from rayfed.tasks.models.unpadded import Unpadded, UnpaddedModel

TARGETS = ["query", "value", "intermediate.dense"]
SGD = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.02}
ADAMW = {"optimizer": "adamw", "weight_decay": 0.1}
LR = {"sgd": 0.1, "adamw": 0.01}
BASE_SEED, ROUND = 11, 5


def config_for(base, rank):
    return LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=4, target_modules=TARGETS, modules_to_save=list(base.head)
    )


def settings_of(options, **more):
    return Client(**{"batch_size": 4, **options, **more})


@pytest.fixture(params=["padded", "flat"])
def lab(request, base, tokens):
    """Every claim holds for padded batches and for batches of real tokens only."""
    return lab_with(base, tokens, request.param == "flat")


def lab_with(base, tokens, flat):
    """Makes members with random starts and trains packs of them, each on a fresh copy of the base."""
    shapes = match_targets(base().model, config_for(base(), 1), base().head)
    head = head_values(base().model, base().head)

    def member(client, rows, rank=2, support=None):
        g = torch.Generator().manual_seed(client)
        layers = {
            name: LowRank(
                0.1 * torch.randn(out, rank, generator=g), 0.2 * torch.randn(rank, inner, generator=g), 4 / rank
            )
            for name, (out, inner) in shapes.items()
        }
        adapter = Adapter(layers, {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in head.items()})
        layout = adapter.layout
        support = torch.ones(layout.size, dtype=torch.bool) if support is None else support(layout)
        return PackMember(client, layout, adapter.flatten(), support, np.asarray(rows))

    def stack_of(dropout=0.0, dtype="float32"):
        fresh = in_dtype(base(), dtype)
        stack = Stack(fresh.model, shapes, fresh.head, dropout, getattr(torch, dtype))
        if flat:
            model = UnpaddedModel(fresh.model, Unpadded("mean"))
            return SimpleNamespace(stack=stack, forward=lambda inputs: model(inputs, stack.batch.segments))
        return SimpleNamespace(stack=stack, forward=lambda inputs: fresh.model(**inputs).logits)

    def train(members, settings, dropout=0.0, t=ROUND, seed=BASE_SEED, on=None, lr=None):
        on = on or stack_of(dropout)
        context = TrainingContext(
            on.stack, on.forward, CLASSIFICATION, tokens, not flat, settings, seed, torch.device("cpu")
        )
        return train_pack(context, members, lr=lr or LR[settings.optimizer], t=t)

    return SimpleNamespace(member=member, train=train, stack_of=stack_of)


def plain_loop(base, tokens, member, settings, rank=2):
    """One client's round written out with real PEFT, torch's optimizers and torch's clipping."""
    base = base()
    model = get_peft_model(base.model, config_for(base, rank)).eval()
    inner = model.base_model.model
    parameters = {}
    for entry in member.layout.entries:
        if entry.part == "head":
            module, _, kind = entry.name.rpartition(".")
            parameter = inner.get_submodule(module).modules_to_save["default"].get_parameter(kind)
        else:
            parameter = getattr(inner.get_submodule(entry.name), f"lora_{entry.part}")["default"].weight
        parameter.data.copy_(member.start[entry.start : entry.start + entry.numel].view(entry.shape))
        parameters[entry] = parameter
    trained = list(parameters.values())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    lr = LR[settings.optimizer]
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(trained, lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    else:
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=settings.weight_decay)
    losses, norms = [], []
    for rows in batches(member.rows, settings, BASE_SEED, ROUND, member.client):
        texts = [torch.tensor(tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]]).long() for row in rows]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        labels = torch.tensor(tokens.labels[rows])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, labels)
        loss.backward()
        if settings.clip_norm is not None:
            norms.append(float(nn.utils.clip_grad_norm_(trained, settings.clip_norm)))
        optimizer.step()
        losses.append(loss.item())
    vector = torch.cat([p.detach().flatten() for p in parameters.values()])
    return SimpleNamespace(vector=vector, loss=float(np.mean(losses)), steps=len(losses), norms=norms)


def assert_same_training(ours, theirs, member, rtol):
    """Tensor by tensor: the difference is small beside the change that training made."""
    for entry in member.layout.entries:
        place = slice(entry.start, entry.start + entry.numel)
        change = (theirs[place] - member.start[place]).norm()
        assert change > 1e-3, entry
        assert (ours[place] - theirs[place]).norm() <= rtol * change, entry


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("options", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_training_is_that_of_a_plain_loop_over_peft(base, tokens, lab, options, clip):
    settings = settings_of(options, epochs=2, clip_norm=clip)
    member = lab.member(client=7, rows=range(20, 30))  # batches of 4, 4 and 2, twice
    expected = plain_loop(base, tokens, member, settings)
    (result,) = lab.train([member], settings)
    assert (result.steps, result.examples) == (6, 20)
    assert expected.steps == 6
    if clip:
        assert max(expected.norms) > 2 * clip  # it does clip
    assert_same_training(result.vector, expected.vector, member, 2e-5)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("options", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_pack_is_its_members_trained_alone(lab, options, clip, dropout):
    """Mixed ranks, 1 to 4 steps, short texts beside long ones: nobody notices the neighbours."""
    settings = settings_of(options, clip_norm=clip)
    members = [
        lab.member(client=3, rows=range(0, 7), rank=1),  # two steps of short texts
        lab.member(client=4, rows=range(45, 60), rank=4),  # four steps of long ones
        lab.member(client=5, rows=range(25, 28), rank=2),  # one step
    ]
    results = lab.train(members, settings, dropout)
    assert [r.steps for r in results] == [2, 4, 1]
    for member, result in zip(members, results):
        (alone,) = lab.train([member], settings, dropout)
        assert (result.steps, result.examples) == (alone.steps, alone.examples)
        assert result.loss == pytest.approx(alone.loss, rel=1e-5)
        assert_same_training(result.vector, alone.vector, member, 1e-4)


@pytest.mark.parametrize("options", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_in_bfloat16_a_pack_changes_no_more_than_the_format_does(lab, options):
    """Mixed ranks, ragged steps, dropout; attention in blocks, products with adapters on rounded operands."""
    settings = settings_of(options, clip_norm=0.5)
    members = [
        lab.member(client=3, rows=range(0, 7), rank=1),
        lab.member(client=4, rows=range(45, 60), rank=4),
        lab.member(client=5, rows=range(25, 28), rank=2),
    ]

    def train(members, dtype):
        return [result.vector for result in lab.train(members, settings, on=lab.stack_of(0.3, dtype))]

    for member, mine in zip(members, train(members, "bfloat16"), strict=True):
        (alone,), (fine,) = (train([member], dtype) for dtype in ("bfloat16", "float32"))
        assert (mine - alone).norm() / 2 < (alone - fine).norm() < 0.3 * (fine - member.start).norm()


def test_the_place_in_the_pack_does_not_matter(lab):
    settings = settings_of(ADAMW, clip_norm=0.5)
    members = [lab.member(3, range(0, 7)), lab.member(4, range(45, 60)), lab.member(5, range(25, 28))]
    results = lab.train(members, settings, dropout=0.3)
    turned = lab.train(members[::-1], settings, dropout=0.3)[::-1]
    for member, a, b in zip(members, results, turned):
        assert_same_training(a.vector, b.vector, member, 1e-4)


def test_a_client_that_diverges_does_not_harm_its_neighbours(lab):
    settings = settings_of(SGD, clip_norm=1.0)
    good, bad = lab.member(1, range(10, 18)), lab.member(2, range(30, 38))
    bad.start[:] = 1e30
    broken, kept = lab.train([bad, good], settings)
    (alone,) = lab.train([good], settings)
    assert not torch.isfinite(broken.vector).all()
    assert_same_training(kept.vector, alone.vector, good, 1e-4)


def test_the_same_arguments_give_the_same_bits_whatever_was_trained_before(lab):
    settings = settings_of(ADAMW, clip_norm=0.5)
    on = lab.stack_of(dropout=0.2)
    pair = [lab.member(1, range(0, 9), rank=2), lab.member(2, range(30, 36), rank=1)]
    first = lab.train(pair, settings, on=on)
    before = [m.start.clone() for m in pair]
    ruined = lab.member(8, range(5, 20), rank=4)
    ruined.start[:] = 1e30
    lab.train([ruined] * 3, settings, on=on)
    lab.train([lab.member(9, range(5), rank=4, support=lambda layout: layout.mask("head"))], settings, on=on)
    again = lab.train(pair, settings, on=on)
    for a, b in zip(first, again):
        assert torch.equal(a.vector, b.vector)
        assert (a.loss, a.steps, a.examples) == (b.loss, b.steps, b.examples)
    assert all(torch.equal(member.start, start) for member, start in zip(pair, before))


@pytest.mark.parametrize("options", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_entries_outside_the_support_keep_their_bits(lab, options):
    settings = settings_of(options, epochs=2, clip_norm=0.5)

    def half(layout):
        return torch.rand(layout.size, generator=torch.Generator().manual_seed(1)) < 0.5

    masked, free = lab.member(1, range(0, 9), support=half), lab.member(2, range(30, 36), rank=1)
    masked.start[~masked.support] += 1e-30  # tiny values too: decay must not round them away
    results = lab.train([masked, free], settings)
    held = ~masked.support
    assert torch.equal(results[0].vector[held], masked.start[held])
    assert (results[0].vector[masked.support] != masked.start[masked.support]).float().mean() > 0.99
    assert (results[1].vector != free.start).float().mean() > 0.99
    (alone,) = lab.train([masked], settings)
    assert torch.equal(alone.vector[held], masked.start[held])
    assert_same_training(results[0].vector, alone.vector, masked, 1e-4)


def test_a_masked_step_is_clipped_by_the_norm_of_what_trains(lab):
    def every_other(layout):
        return torch.arange(layout.size) % 2 == 0

    settings = settings_of({"optimizer": "sgd", "momentum": 0.0}, steps=1, clip_norm=0.01)
    member = lab.member(1, range(0, 9), support=every_other)
    (result,) = lab.train([member], settings)
    assert float((result.vector - member.start).norm()) == pytest.approx(0.01 * LR["sgd"], rel=1e-3)


@pytest.mark.parametrize("options", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("part", ["A", "B", "head"])
def test_a_part_trains_alone(lab, options, part):
    """Beside a neighbour that trains everything, too, the other parts do not move."""
    member = lab.member(1, range(0, 9), support=lambda layout: layout.mask(part))
    everything = lab.member(2, range(30, 39))
    for result in (
        *lab.train([member], settings_of(options)),
        lab.train([everything, member], settings_of(options))[1],
    ):
        moved = result.vector != member.start
        assert not moved[~member.support].any()
        assert moved[member.support].float().mean() > 0.99


@pytest.mark.parametrize("rank", [2, 4])
def test_head_only_training_does_not_go_back_through_the_model(lab, rank):
    on = lab.stack_of()
    member = lab.member(1, range(4), rank, support=lambda layout: layout.mask("head"))
    lab.train([member], settings_of(SGD), on=on)
    assert all((values.grad is not None) == (part == "head") for part, values in on.stack.parameters.items())


def test_a_client_with_nothing_to_train_measures_its_loss(lab):
    idle = lab.member(1, range(0, 9), support=lambda layout: layout.mask())
    (result,) = lab.train([idle], settings_of(SGD, clip_norm=1.0))
    (probe,) = lab.train([lab.member(1, range(0, 9))], settings_of(SGD), lr=1e-12)
    assert torch.equal(result.vector, idle.start)
    assert (result.steps, result.examples) == (3, 9)
    assert result.loss == pytest.approx(probe.loss, rel=1e-5)


def test_dropout_changes_with_client_round_and_seed(lab):
    settings = settings_of(SGD, steps=1)
    member = lab.member(1, [50, 50, 50, 50])  # one text, so that the order of the batch changes nothing
    other = PackMember(2, member.layout, member.start, member.support, member.rows)

    def change(m, dropout, **named):
        return lab.train([m], settings, dropout, **named)[0].vector - m.start

    reference, plain = change(member, 0.3), change(member, 0.0)
    for same in (change(other, 0.0), change(member, 0.0, t=6), change(member, 0.0, seed=12)):
        assert torch.equal(same, plain)
    assert (reference - plain).norm() > 0.05 * plain.norm()
    for changed in (change(other, 0.3), change(member, 0.3, t=6), change(member, 0.3, seed=12)):
        assert (changed - reference).norm() > 0.05 * reference.norm()
    assert torch.equal(change(member, 0.3), reference)


def test_dropout_is_the_same_with_padding_and_without(base, tokens):
    settings = settings_of(ADAMW, clip_norm=0.5)
    labs = [lab_with(base, tokens, flat) for flat in (False, True)]
    members = [labs[0].member(3, range(0, 7), rank=1), labs[0].member(4, range(45, 60), rank=4)]
    padded, flat = (lab.train(members, settings, dropout=0.3) for lab in labs)
    for member, a, b in zip(members, padded, flat):
        assert_same_training(a.vector, b.vector, member, 1e-4)


def test_dropout_changes_with_the_step(lab):
    """Rows that are all one text, and steps too small to move anything: two steps' losses differ by dropout alone."""
    member = lab.member(1, [50, 50, 50, 50])
    losses = [lab.train([member], settings_of(SGD, steps=k), dropout=0.5, lr=1e-12)[0].loss for k in (1, 2)]
    assert abs(losses[1] - losses[0]) > 1e-4
    still = [lab.train([member], settings_of(SGD, steps=k), lr=1e-12)[0].loss for k in (1, 2)]
    assert still[1] == pytest.approx(still[0], rel=1e-6)


# Batches.


def test_every_epoch_is_a_permutation_in_batches_with_a_ragged_last_one():
    rows = np.arange(100, 110)
    plan = batches(rows, Client(batch_size=4, epochs=3), seed=0, t=0, client=0)
    assert [len(batch) for batch in plan] == [4, 4, 2] * 3
    epochs = [np.concatenate(plan[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_steps_cycle_through_epochs_and_override_them(steps):
    rows = np.arange(10)
    plan = batches(rows, Client(batch_size=4, epochs=5, steps=steps), seed=0, t=0, client=0)
    assert [len(batch) for batch in plan] == ([4, 4, 2] * 3)[:steps]
    whole = batches(rows, Client(batch_size=4, epochs=3), seed=0, t=0, client=0)
    assert all(np.array_equal(a, b) for a, b in zip(plan, whole))


def test_no_rows_make_no_batch():
    for steps in (None, 3):
        assert batches(np.array([], np.int64), Client(steps=steps), seed=0, t=0, client=0) == []


def test_fewer_rows_than_a_batch_make_one_batch():
    (only,) = batches(np.array([5, 9]), Client(batch_size=4), seed=0, t=0, client=0)
    assert sorted(only.tolist()) == [5, 9]


def test_the_order_is_keyed_by_seed_round_and_client():
    def order(**named):
        return np.concatenate(
            batches(np.arange(50), Client(batch_size=8), **{"seed": 0, "t": 0, "client": 0, **named})
        ).tolist()

    assert order() == order()
    assert len({tuple(order(**named)) for named in ({}, {"seed": 1}, {"t": 1}, {"client": 1})}) == 4


@pytest.mark.parametrize("options", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_the_products_of_a_gpu_train_as_those_of_a_cpu(lab, monkeypatch, options):
    """Here on a CPU: grouped products, scaled factors, one product for query and value. In bfloat16, no less exact."""
    members = [lab.member(1, range(0, 9), rank=2), lab.member(2, range(30, 41), rank=4), lab.member(3, range(50, 53))]
    settings, trained = settings_of(options, clip_norm=1.0), []
    for dtype, grouped in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        monkeypatch.setattr("rayfed.lora.packed.stack.groups_products", lambda device, found=grouped: found)
        on = lab.stack_of(dtype=dtype)
        trained.append(lab.train(members, settings, on=on))
        assert on.stack.batch.grouped == grouped
    for exact, cpu, gpu, member in zip(*trained, members):
        errors = [float((r.vector - exact.vector).norm() / (exact.vector - member.start).norm()) for r in (cpu, gpu)]
        assert errors[1] < 1.3 * errors[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_graph_outlives_its_step(lab, dtype):
    """A cycle through autograd's C++ would never be collected, and keep the memory of every step."""
    members, on = [lab.member(1, range(0, 9)), lab.member(2, range(30, 41))], lab.stack_of(0.0, dtype)

    def nodes() -> int:
        gc.collect()
        return sum(type(thing).__name__ == "_AddLoraBackward" for thing in gc.get_objects())

    before = nodes()  # of other tests
    lab.train(members, settings_of(SGD), on=on)
    assert nodes() == before
