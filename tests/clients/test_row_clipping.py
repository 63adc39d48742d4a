"""Example-level privacy: norms of rows, clipped sums and noise, against a loop over single rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import CLASSIFICATION
from torch import nn

from rayfed.clients.local_training import PackMember, TrainingContext, train_pack
from rayfed.clients.row_clipping import clipped_backward
from rayfed.config.privacy import Privacy as Settings
from rayfed.config.training import Client
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.row_norms import RowNorms
from rayfed.lora.packed.segments import Segment
from rayfed.lora.packed.stack import Stack, head_values
from rayfed.lora.peft import layer_shape
from rayfed.privacy.accounting import Guarantee
from rayfed.privacy.example import ExampleLevel, worst_clients
from rayfed.tasks.models.unpadded import Unpadded, UnpaddedModel

CASES = [(form, *more) for form in ("padded", "flat") for more in (("AB", 0.0), ("AB", 0.3), ("B", 0.0), ("R", 0.0))]


def adapter_of(base, names, rank, seed, core):
    g, model = torch.Generator().manual_seed(seed), base.model
    layers = {}
    for name in names:
        out, inner = layer_shape(model.get_submodule(name))
        B, A = 0.3 * torch.randn(out, rank, generator=g), 0.3 * torch.randn(rank, inner, generator=g)
        layers[name] = LowRank(B, A, 4 / rank, torch.randn(rank, rank, generator=g) if core else None)
    head = {n: t + 0.3 * torch.randn(t.shape, generator=g) for n, t in head_values(model, base.head).items()}
    return Adapter(layers, head)


def lab(base, flat, dropout=0.0, core=False, ranks=(2, 2, 1)):
    """The tiny BERT with one adapter a slot."""
    fresh = base()
    names = [n for n, _ in fresh.model.named_modules() if n.endswith((".query", ".value"))]
    adapters = [adapter_of(fresh, names, rank, k, core) for k, rank in enumerate(ranks)]
    stack = Stack(fresh.model, names, fresh.head, dropout)
    stack.load(adapters)
    if flat:
        model = UnpaddedModel(fresh.model, Unpadded("mean"))
        return SimpleNamespace(
            stack=stack, adapters=adapters, forward=lambda inputs: model(inputs, stack.batch.segments)
        )
    return SimpleNamespace(stack=stack, adapters=adapters, forward=lambda inputs: fresh.model(**inputs).logits)


def losses_of(on, tokens, rows, flat):
    batch = tokens.batch(rows, not flat)
    labels = batch.pop("labels")
    sums, _ = CLASSIFICATION.loss(on.forward(batch), labels)
    return sums


def gradients(stack):
    found = {part: values.grad.clone() for part, values in stack.parameters.items() if values.grad is not None}
    return {place: g for place, g in stack.views(found).items() if place in stack.trained}


def forget(stack):
    for parameter in stack.parameters.values():
        parameter.grad = None


@pytest.mark.parametrize(("form", "parts", "dropout"), CASES)
def test_norms_and_clipped_sums_are_those_of_a_loop_over_rows(base, tokens, form, parts, dropout):
    """Three clients, one of a smaller rank, with 3, 1 and 4 rows. Some rows are clipped, and some are not."""
    flat = form == "flat"
    on = lab(base, flat, dropout, core=parts == "R")
    on.stack.train({place for place in on.stack.trained if place[1] in (*parts, "head")})
    rows = [np.array([0, 30, 59]), np.array([7]), np.array([12, 25, 41, 58])]

    def segments(slots):
        # Dropout's keys count tokens of a segment, so the loop keeps the whole segments.
        return [Segment(k, len(rows[k]), 17 + k if dropout else None, tokens.lengths[rows[k]].tolist()) for k in slots]

    norms, sums = [], {}
    for k in range(3):
        for i in range(len(rows[k])):
            forget(on.stack)
            with on.stack.using(segments([k])):
                losses_of(on, tokens, rows[k], flat)[i].backward()
            found = gradients(on.stack)
            norms.append(sum(float(g[k].double().square().sum()) for g in found.values()) ** 0.5)
            weight = min(1.0, 0.5 * norms[0] / norms[-1]) / len(rows[k])
            for place, g in found.items():
                sums[place] = sums.get(place, 0.0) + weight * g
    forget(on.stack)
    sizes = torch.tensor([len(own) for own in rows for _ in own])
    with on.stack.using(segments(range(3))), RowNorms(on.stack) as recorder:
        losses = losses_of(on, tokens, np.concatenate(rows), flat)
        found = clipped_backward(recorder, losses, sizes, 0.5 * norms[0])
    torch.testing.assert_close(found, torch.tensor(norms), rtol=1e-5, atol=1e-7)
    clipped = [norm > 0.5 * norms[0] for norm in norms]
    assert any(clipped)
    for place, g in gradients(on.stack).items():
        torch.testing.assert_close(g, sums[place], rtol=1e-5, atol=1e-5 * float(sums[place].abs().max()))


def test_a_head_over_every_token_counts_each_row_once():
    """A head that sees all tokens of a row, as a language model's: weight and bias add up over the tokens first."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.inner(x)))

    torch.manual_seed(0)
    model = Model()
    stack = Stack(model, ["inner"], ["head"])
    head = {"head.weight": torch.randn(3, 6), "head.bias": torch.randn(3)}
    stack.load([Adapter({"inner": LowRank(torch.randn(6, 2), torch.randn(2, 5), 2.0)}, head)])
    x = torch.randn(4, 7, 5)
    expected = []
    for i in range(4):
        forget(stack)
        with stack.using([Segment(0, 1)]):
            model(x[i : i + 1]).square().sum().backward()
        expected.append(sum(float(g.square().sum()) for g in gradients(stack).values()))
    forget(stack)
    with stack.using([Segment(0, 4)]), RowNorms(stack) as recorder:
        model(x).square().sum((1, 2)).sum().backward()
    torch.testing.assert_close(recorder.close(), torch.tensor(expected), rtol=1e-4, atol=0)


def train(base, tokens, rows, z=0.0, clip=1e30, flat=True, private=True, order=None, **client):
    on = lab(base, flat, ranks=(2,) * len(rows))
    settings = Client(**{"lr": 0.1, "momentum": 0.0, "batch_size": 4, **client})
    own = Settings(kind="example", noise_multiplier=z, clip_norm=clip)
    privacy = ExampleLevel(own, 3, Guarantee(1e-5, "pld"), z, 5, ()) if private else None
    members = [
        PackMember(k, a.layout, a.flatten(), torch.ones(a.layout.size, dtype=torch.bool), np.asarray(own))
        for k, (a, own) in enumerate(zip(on.adapters, rows, strict=True))
    ]
    members = [members[k] for k in order or range(len(members))]
    context = TrainingContext(
        on.stack, on.forward, CLASSIFICATION, tokens, not flat, settings, 3, torch.device("cpu"), privacy
    )
    return train_pack(context, members, lr=0.1, t=2), members


ROWS = [[0, 3, 9], [5, 20, 31, 44]]


def test_without_noise_and_limit_whole_batches_are_plain_training(base, tokens):
    """batch_size 4 is at least as large as each client's data: every row is in every batch."""
    private, _ = train(base, tokens, ROWS, steps=3)
    plain, _ = train(base, tokens, ROWS, steps=3, private=False)
    for ours, theirs in zip(private, plain, strict=True):
        torch.testing.assert_close(ours.vector, theirs.vector, rtol=1e-4, atol=1e-5)
        assert (ours.loss, ours.examples, ours.steps) == (pytest.approx(theirs.loss), theirs.examples, theirs.steps)


def test_the_noise_in_a_step_is_that_of_the_expected_batch(base, tokens):
    """One SGD step at rate 0.1: the two runs differ by 0.1 z C / b N(0, I). 12 clients have 5,000 entries: 1 %."""
    rows = [[k, k + 20, k + 40] for k in range(12)]
    with_noise, members = train(base, tokens, rows, z=2.0, clip=0.5, steps=1)
    without, _ = train(base, tokens, rows, z=0.0, clip=0.5, steps=1)
    noise = torch.stack([own.vector - other.vector for own, other in zip(with_noise, without, strict=True)])
    assert noise.numel() > 5000
    assert bool(noise.all())
    assert float(noise.std()) == pytest.approx(0.1 * 2.0 * 0.5 / 3, rel=0.03)
    assert not torch.allclose(noise[0], noise[1])
    for own, member in zip(without, members, strict=True):
        assert float((own.vector - member.start).norm()) <= 0.1 * 0.5 * (1 + 1e-4)


def test_a_client_has_its_own_noise_and_rows_in_any_pack(base, tokens):
    one, _ = train(base, tokens, ROWS, z=1.0, clip=0.5, steps=4, batch_size=2)
    other, _ = train(base, tokens, ROWS, z=1.0, clip=0.5, steps=4, batch_size=2, order=[1, 0])
    for k in (0, 1):
        torch.testing.assert_close(one[k].vector, other[1 - k].vector, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_is_a_step_of_noise(base, tokens):
    """One of 60 rows is expected: many batches are empty."""
    result, members = train(base, tokens, [list(range(60))], z=1.0, clip=0.5, steps=20, batch_size=1)
    assert result[0].steps == 20
    empty = sum(not len(own) for own in batches_of(members[0], 20))
    assert 3 < empty < 12
    assert result[0].examples == sum(map(len, batches_of(members[0], 20)))
    assert bool(torch.isfinite(result[0].vector).all())


def batches_of(member, steps, batch=1):
    own = Settings(kind="example", noise_multiplier=1.0)
    privacy = ExampleLevel(own, 3, Guarantee(1e-5, "pld"), 1.0, 5, ())
    return privacy.batches(member.rows, Client(batch_size=batch, steps=steps), 2, member.client)


def test_every_row_is_drawn_with_its_probability():
    member = SimpleNamespace(rows=np.arange(50), client=1)
    counts = np.bincount(np.concatenate(batches_of(member, 2000, batch=10)), minlength=50)
    assert np.allclose(counts / 2000, 0.2, atol=0.04)  # over four standard deviations
    assert counts.mean() / 2000 == pytest.approx(0.2, abs=0.005)


def test_the_worst_client_is_among_those_that_count():
    """Clients of 4, 8, 16 and 16 rows; batch 8, one epoch: q is 1, 1, 1/2, and steps are 1, 1, 2."""
    cohorts = [[2], [0, 2], [1, 3], [1, 1, 1]]
    settings = Client(batch_size=8)
    found = worst_clients(lambda t: cohorts[t], [4, 8, 16, 16], settings, 4)
    pairs = [[(u.count, u.sample / u.population) for u in own] for own in found]
    assert pairs == [[(2, 0.5)], [(1, 1.0), (4, 0.5)], [(1, 1.0), (4, 0.5)], [(4, 1.0)]]
