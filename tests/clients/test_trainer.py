"""Jobs in, results out: uploads, evaluation, features, and that a trainer stores nothing between jobs."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from rayfed import wire
from rayfed.api import prepare
from rayfed.clients.local_training import batches
from rayfed.clients.messages import ClientOrder, Divergence, EvalJob, FeatureJob, TrainJob
from rayfed.clients.trainer import Trainer
from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods.base import Trainable
from rayfed.tasks.models.base import load_base
from rayfed.tasks.models.unpadded import Padded, Unpadded

RANK = 4
CLIENTS = (2, 5, 7)


@pytest.fixture(scope="module", params=["never", "batch"])
def experiment(tiny, request):
    return tiny("engine.pack=3", "lora.rank=4", "partition.kind=iid", f"engine.padding={request.param}")


@pytest.fixture(scope="module")
def plan(experiment):
    return prepare(experiment)


@pytest.fixture(scope="module")
def federation(plan):
    return plan.federation


@pytest.fixture(scope="module")
def trainer(plan):
    return Trainer(plan)


@pytest.fixture(scope="module")
def model_spec(plan):
    return plan.model


@pytest.fixture(scope="module")
def adapter(model_spec):
    """A global model away from its start: B and A random, the head moved."""
    return random_adapter(model_spec, seed=4)


def random_adapter(model_spec, seed):
    g = torch.Generator().manual_seed(seed)
    layers = {
        name: LowRank(0.1 * torch.randn(out, RANK, generator=g), 0.2 * torch.randn(RANK, inner, generator=g), 2.0)
        for name, (out, inner) in model_spec.shapes.items()
    }
    head = {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in model_spec.head.items()}
    return Adapter(layers, head)


def train(trainer, adapter, payload, density=1.0, trainable=None, lr=0.05, clients=CLIENTS):
    layout, trainable = adapter.layout, trainable or Trainable()
    budget = wire.keep_count(layout.size, density)
    orders = tuple(ClientOrder(client, layout, 0, trainable, budget, density, "fp32") for client in clients)
    return trainer.execute(TrainJob(0, lr, orders), [payload])


def largest(change: torch.Tensor, count: int) -> list[int]:
    """The definition, by a full sort: larger magnitude first, then lower index."""
    return sorted(sorted(range(len(change)), key=lambda i: (-abs(float(change[i])), i))[:count])


def test_a_dense_upload_is_the_whole_change_without_indices(trainer, federation, adapter):
    result = train(trainer, adapter, wire.encode(adapter.flatten()))
    for client, upload, examples, steps in zip(CLIENTS, result.uploads, result.examples, result.steps):
        payload = wire.decode(upload)
        assert payload.indices is None
        assert payload.n == payload.count == adapter.layout.size
        assert (payload.values != 0).float().mean() > 0.99
        assert examples == len(federation.rows_of(client))
        assert steps == len(batches(federation.rows_of(client), trainer.plan.client, 0, 0, client))
    assert len(set(result.uploads)) == len(CLIENTS)
    still = train(trainer, adapter, wire.encode(adapter.flatten()), lr=1e-12)  # the change, not the trained values
    assert all(wire.decode(upload).values.abs().max() < 1e-6 for upload in still.uploads)


@pytest.mark.parametrize("density", [0.3, 0.011])
def test_an_upload_is_the_budgets_largest_changes(trainer, adapter, density):
    payload = wire.encode(adapter.flatten())
    dense = [wire.decode(upload).dense() for upload in train(trainer, adapter, payload).uploads]
    for change, upload in zip(dense, train(trainer, adapter, payload, density).uploads):
        sparse = wire.decode(upload)
        assert sparse.count == int(density * adapter.layout.size)
        assert sparse.indices.tolist() == largest(change, sparse.count)
        assert torch.equal(sparse.values, change[sparse.indices])


def test_entries_that_cannot_have_changed_take_no_index_bytes(trainer, adapter):
    """Only received entries train: a client that sends all of them sends their values and nothing else."""
    vector = adapter.flatten()
    arrived = wire.top_k(vector, adapter.layout.size // 2)
    payload = wire.encode(vector, indices=arrived)
    only = Trainable(received_only=True)
    for upload in train(trainer, adapter, payload, 0.5, only).uploads:
        got = wire.decode(upload)
        assert got.n == got.count == len(arrived)
        assert got.indices is None
        assert wire.inspect(upload).bytes_indices == 0
    # A smaller budget is a share of the whole adapter, not of what arrived.
    every = [wire.decode(upload).dense() for upload in train(trainer, adapter, payload, 1.0, only).uploads]
    for change, upload in zip(every, train(trainer, adapter, payload, 0.1, only).uploads):
        got = wire.decode(upload)
        assert got.n == len(arrived)
        assert got.count == int(0.1 * adapter.layout.size)
        assert got.indices.tolist() == largest(change, got.count)


def test_training_starts_from_what_was_decoded(trainer, adapter):
    """Entries that did not arrive start at zero and train: the dense local training of FLASC."""
    vector = adapter.flatten()
    arrived = wire.top_k(vector, adapter.layout.size // 2)
    masked = torch.zeros_like(vector)
    masked[arrived] = vector[arrived]
    sparse = train(trainer, adapter, wire.encode(vector, indices=arrived))
    assert sparse.uploads == train(trainer, adapter, wire.encode(masked)).uploads
    assert sparse.uploads != train(trainer, adapter, wire.encode(vector)).uploads


def test_parts_that_do_not_train_do_not_travel(trainer, adapter):
    layout = adapter.layout
    (upload,) = train(trainer, adapter, wire.encode(adapter.flatten()), 1.0, Trainable(("B",)), clients=(2,)).uploads
    assert wire.decode(upload).n == int(layout.mask("B").sum())


def test_a_payload_in_which_nothing_arrived_gives_an_empty_upload(trainer, adapter):
    nothing = wire.encode(adapter.flatten(), indices=torch.zeros(0, dtype=torch.int64))
    result = train(trainer, adapter, nothing, 1.0, Trainable(received_only=True))
    assert all(wire.decode(upload).n == 0 for upload in result.uploads)
    assert all(loss > 0 for loss in result.losses)


def test_a_client_that_diverges_has_no_upload(trainer, adapter):
    result = train(trainer, adapter, wire.encode(adapter.flatten()), lr=1e30, clients=(5,))
    assert result.diverged == {0: Divergence("training gave values that are not finite", dropped=True)}
    assert (result.uploads, result.sizes, result.personal, result.sent) == ((None,), (None,), (None,), ())


def test_a_job_done_twice_gives_the_same_bytes(trainer, model_spec, adapter):
    payload = wire.encode(adapter.flatten())
    first = train(trainer, adapter, payload, 0.3)
    train(trainer, adapter, wire.encode(random_adapter(model_spec, seed=9).flatten()), clients=(1, 3))
    trainer.execute(EvalJob("test", 0, 10, adapter.layout), [payload])
    again = train(trainer, adapter, payload, 0.3)
    assert again.uploads == first.uploads
    assert (again.losses, again.examples, again.steps) == (first.losses, first.examples, first.steps)


def test_every_order_starts_from_its_own_payload_and_layout(trainer, adapter):
    """Two tiers of rank in one pack: each upload is what the client sends when its tier is alone."""
    small = Adapter(
        {n: LowRank(p.B[:, :1].clone(), p.A[:1].clone(), 8.0) for n, p in adapter.layers.items()}, adapter.head
    )
    payloads = [wire.encode(adapter.flatten()), wire.encode(small.flatten())]
    layouts = (adapter.layout, small.layout)
    orders = tuple(
        ClientOrder(client, layouts[tier], tier, Trainable(), layouts[tier].size, 1.0, "fp32")
        for client, tier in ((2, 1), (5, 0), (7, 1))
    )
    result = trainer.execute(TrainJob(0, 0.05, orders), payloads)
    assert [wire.inspect(upload).n for upload in result.uploads] == [
        small.layout.size, adapter.layout.size, small.layout.size
    ]  # fmt: skip
    for order, upload in zip(orders, result.uploads):
        tier = (adapter, small)[order.payload]
        (alone,) = train(trainer, tier, payloads[order.payload], clients=(order.client,)).uploads
        a, b = wire.decode(upload).values, wire.decode(alone).values
        assert (a - b).norm() <= 1e-4 * b.norm()


# Evaluation and features.


def one_by_one(experiment, federation, split, change):
    """Losses, hits and pooled features of a base whose weights carry the adapter: one text at a time, no stack."""
    model = load_base(experiment.model, len(federation.classes), experiment.seed).model
    features = []
    with torch.no_grad():
        change(model)
        model.classifier.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        tokens = getattr(federation, split)
        losses, hits = [], []
        for row in range(len(tokens)):
            ids = torch.tensor(tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]]).long()[None]
            label = torch.tensor(tokens.labels[row : row + 1])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            losses.append(float(nn.functional.cross_entropy(logits, label)))
            hits.append(int(logits.argmax()) == int(label))
    return losses, hits, torch.cat(features)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_sums_are_those_of_a_plain_loop(experiment, federation, trainer, adapter, split):
    def merge(model):
        for name, pair in adapter.layers.items():
            model.get_submodule(name).weight += pair.dense()
        model.load_state_dict(adapter.head, strict=False)

    losses, hits, _ = one_by_one(experiment, federation, split, merge)
    result = trainer.execute(EvalJob(split, 0, len(losses), adapter.layout), [wire.encode(adapter.flatten())])
    assert sorted(result.rows.tolist()) == list(range(len(losses)))
    assert result.labels.tolist() == getattr(federation, split).labels[result.rows].tolist()
    assert (result.predictions == result.labels).tolist() == [hits[row] for row in result.rows]
    assert 0 < sum(hits) < result.count == len(losses)
    assert result.loss == pytest.approx(sum(losses), rel=1e-5)


def test_evaluation_of_some_classes_is_that_of_their_rows(federation, trainer, adapter):
    payload, rows = wire.encode(adapter.flatten()), len(federation.test)
    whole = trainer.execute(EvalJob("test", 0, rows, adapter.layout), [payload])
    some = trainer.execute(EvalJob("test", 0, rows, adapter.layout, classes=(1, 3)), [payload])
    rest = trainer.execute(EvalJob("test", 0, rows, adapter.layout, classes=(0, 2)), [payload])
    assert set(some.labels.tolist()) == {1, 3}
    assert some.count == len(some.rows) == int(np.isin(federation.test.labels, (1, 3)).sum())
    assert by_row(some) | by_row(rest) == by_row(whole)
    assert some.loss + rest.loss == pytest.approx(whole.loss, rel=1e-6)
    nothing = trainer.execute(EvalJob("test", 0, rows, adapter.layout, classes=()), [payload])
    assert (nothing.loss, nothing.count, len(nothing.rows), len(nothing.predictions)) == (0, 0, 0, 0)


def by_row(result):
    """Row -> its prediction and its label."""
    return dict(zip(result.rows.tolist(), zip(result.predictions.tolist(), result.labels.tolist())))


@pytest.mark.parametrize("cuts", [(30,), (16, 32, 48), (1, 2, 3, 59), ()], ids=str)
def test_evaluation_may_be_split_anyhow(federation, trainer, adapter, cuts):
    payload = wire.encode(adapter.flatten())
    rows = len(federation.test)
    whole = trainer.execute(EvalJob("test", 0, rows, adapter.layout), [payload])
    edges = (0, *cuts, rows)
    parts = [
        trainer.execute(EvalJob("test", start, stop, adapter.layout), [payload])
        for start, stop in itertools.pairwise(edges)
    ]
    assert sum(p.count for p in parts) == whole.count == rows
    assert np.concatenate([p.rows for p in parts]).tolist() == whole.rows.tolist()
    assert torch.equal(torch.cat([p.predictions for p in parts]), whole.predictions)
    assert sum(p.loss for p in parts) == pytest.approx(whole.loss, rel=1e-6)


def test_features_are_the_bases_own_whatever_adapter_was_loaded(experiment, federation, trainer, adapter):
    _, _, expected = one_by_one(experiment, federation, "test", lambda model: None)
    order = trainer.by_length["test"]
    before = trainer.execute(FeatureJob("test", 0, len(order)), [])
    train(trainer, adapter, wire.encode(adapter.flatten()))
    trainer.execute(EvalJob("test", 0, 20, adapter.layout), [wire.encode(adapter.flatten())])
    after = trainer.execute(FeatureJob("test", 0, len(order)), [])
    assert torch.equal(before.features, after.features)
    assert torch.equal(before.labels, after.labels)
    assert before.labels.tolist() == federation.test.labels[order].tolist()
    torch.testing.assert_close(before.features, expected[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["never", "batch"])
def test_features_of_a_model_whose_head_sees_every_token_are_those_of_the_last(tiny, tiny_gpt2, padding):
    """GPT-2 scores all tokens and keeps the last real one: one row of features a text, whatever the padding."""
    settings = tiny(
        f"model.name={tiny_gpt2}", "model.pooling=stock", "lora.target_modules=[c_attn]", "eval.batch_size=4",
        f"engine.padding={padding}",
    )  # fmt: skip
    plan = prepare(settings)
    federation, trainer = plan.federation, Trainer(plan)
    result = trainer.execute(FeatureJob("test", 0, 12), [])
    assert result.features.shape == (12, 32)
    model = load_base(settings.model, len(federation.classes), settings.seed).model
    rows = trainer.by_length["test"][:12]
    lengths = federation.test.lengths[rows]
    assert len(set(lengths[:4])) + len(set(lengths[4:8])) > 2  # there is padding
    for row, features in zip(rows, result.features):
        batch = federation.test.batch(rows[rows == row], padded=True)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
            torch.testing.assert_close(model.score(features), logits, rtol=1e-5, atol=1e-5)


def test_the_model_spec_describes_what_is_trained(experiment, model_spec, tiny_bert):
    assert {name: tuple(t.shape) for name, t in model_spec.head.items()} == {
        "classifier.weight": (4, 32), "classifier.bias": (4,),
    }  # fmt: skip
    assert list(model_spec.shapes.values()) == [(32, 32)] * 4
    assert model_spec.peft["fan_in_fan_out"] is False
    assert (model_spec.root, model_spec.peft["modules_to_save"]) == ("encoder.", None)  # the head has its own file
    assert model_spec.peft["target_modules"] == sorted(name.removeprefix("encoder.") for name in model_spec.shapes)
    assert model_spec.peft["base_model_name_or_path"] == str(tiny_bert)
    whole = load_base(experiment.model, 4, experiment.seed).model
    assert model_spec.parameters == sum(p.numel() for p in whole.parameters())


def test_the_plan_decides_about_padding(tiny):
    for settings, batching in (
        ((), Unpadded("mean")),
        (("engine.padding=never",), Unpadded("mean")),
        (("model.pooling=stock",), Unpadded("first")),
        (("engine.padding=batch",), Padded("engine.padding=batch")),
    ):
        assert prepare(tiny(*settings)).model.batching == batching


def test_padding_that_a_model_needs_cannot_be_forbidden(tiny, monkeypatch):
    choice = "rayfed.tasks._sequence_classification.choose_batching"
    monkeypatch.setattr(choice, lambda model, longest: Padded(f"{longest} tokens"))
    assert prepare(tiny("data.max_tokens=20")).model.batching == Padded("20 tokens")
    with pytest.raises(UserError) as refusal:
        prepare(tiny("data.max_tokens=100", "engine.padding=never"))
    assert str(refusal.value) == (
        "engine.padding: got 'never', but this model needs padding (64 tokens); allowed are auto and batch"
    )  # 64: it has no more positions


def test_padding_changes_uploads_by_rounding_only(tiny):
    """The same job with and without: three clients in a pack, from a random adapter."""
    results = []
    for padding in ("never", "batch"):
        plan = prepare(tiny("engine.pack=3", f"engine.padding={padding}"))
        trainer = Trainer(plan)
        adapter = random_adapter(plan.model, seed=4)
        clients = plan.federation.holders[:3].tolist()
        result = train(trainer, adapter, wire.encode(adapter.flatten()), clients=clients)
        results.append([wire.decode(upload).values for upload in result.uploads])
    for flat, padded in zip(*results):
        assert not torch.equal(flat, padded)  # they were computed in two ways
        assert (flat - padded).norm() <= 1e-4 * padded.norm()
