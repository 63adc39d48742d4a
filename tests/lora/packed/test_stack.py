"""Stacked models against real PEFT: the same layers, logits and gradients. Slots do not affect each other."""

from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig
from torch import nn

from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed import kernel
from rayfed.lora.packed.segments import Segment
from rayfed.lora.packed.stack import Stack, head_layers, head_values
from rayfed.lora.peft import match_targets

TARGETS = {  # every adapted layer type, square or not
    "bert": ["query", "value", "intermediate.dense", "output.dense", "pooler.dense"],
    "mean": ["query", "value", "intermediate.dense", "output.dense"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}
LABELS = torch.tensor([0, 3, 1, 2, 0, 1])


def config_for(base, targets, rank=2, **options):
    options = {"lora_alpha": 6, "fan_in_fan_out": hasattr(base.model, "transformer"), **options}
    return LoraConfig(task_type="SEQ_CLS", r=rank, target_modules=targets, modules_to_save=list(base.head), **options)


def stacked(base, shapes, adapters):
    """The base with the adapters in slots 0, 1, ... of a stack."""
    stack = Stack(base.model, shapes, base.head)
    stack.load(adapters)
    return stack


def slot_vectors(stack, adapters):
    """The present values of the slots as flat vectors."""
    stack.snapshot(range(len(adapters)))
    return stack.read_snapshots([adapter.layout for adapter in adapters])


def forward(base, stack, inputs, segments):
    with stack.using(segments):
        return base.model(**inputs).logits


def gradient(stack, slot, name, part, shape):
    """One slot's gradient of one tensor, without its padding."""
    gradients = stack.views({part: values.grad for part, values in stack.parameters.items()})
    return stack.crop(gradients[name, part][slot], part, shape)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["bert", "mean", "gpt2"])
def test_logits_and_gradients_are_those_of_peft(
    base, inputs, random_adapter, peft_model, assert_close_float32, kind, rslora
):
    ours, theirs = base(kind), base(kind)
    config = config_for(ours, TARGETS[kind], use_rslora=rslora)
    shapes = match_targets(ours.model, config, ours.head)
    scale = 6 / 2**0.5 if rslora else 6 / 2
    adapter = random_adapter(shapes, head_values(ours.model, ours.head), 2, scale, seed=7)

    wrapped = peft_model(theirs.model, config, adapter)
    expected = wrapped(**inputs).logits
    nn.functional.cross_entropy(expected, LABELS).backward()

    plain = base(kind).model(**inputs).logits
    stack = stacked(ours, shapes, [adapter])
    logits = forward(ours, stack, inputs, [Segment(0, 6)])
    nn.functional.cross_entropy(logits, LABELS).backward()

    assert float((logits - plain).detach().abs().max()) > 0.1  # the adapter does something
    assert_close_float32(logits, expected)
    gradients = []
    for entry in adapter.layout.entries:
        if entry.part == "head":
            module, _, kind_of = entry.name.rpartition(".")
            saved = wrapped.base_model.model.get_submodule(module).modules_to_save["default"]
            gradients.append(saved.get_parameter(kind_of).grad)
        else:
            layer = wrapped.base_model.model.get_submodule(entry.name)
            gradients.append(getattr(layer, f"lora_{entry.part}")["default"].weight.grad)
    assert_close_float32([gradient(stack, 0, e.name, e.part, e.shape) for e in adapter.layout.entries], gradients)
    # Nearly all gradients are large enough to compare.
    assert sum(bool(g.abs().max() > 1e-3) for g in gradients) >= len(gradients) - 2


def test_nothing_but_the_stack_trains(base):
    fresh = base("mean")
    stack = Stack(fresh.model, match_targets(fresh.model, config_for(fresh, ["query"]), fresh.head), fresh.head)
    assert not any(parameter.requires_grad for parameter in fresh.model.parameters())
    assert all(values.requires_grad for values in stack.parameters.values())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_three_ranks_in_one_batch_are_three_models(base, inputs, random_adapter, assert_close_float32, kind):
    """Logits and gradients of each slot are those of the same adapter alone, whatever lies in the other slots."""
    fresh = base(kind)
    shapes = match_targets(fresh.model, config_for(fresh, TARGETS[kind]), fresh.head)
    head = head_values(fresh.model, fresh.head)
    adapters = [random_adapter(shapes, head, rank, 4 / rank, seed=rank) for rank in (1, 2, 4)]
    sizes = (1, 3, 2)
    pack = stacked(fresh, shapes, adapters)
    logits = forward(fresh, pack, inputs, [Segment(slot, size) for slot, size in enumerate(sizes)])
    losses = [
        nn.functional.cross_entropy(part, labels) for part, labels in zip(logits.split(sizes), LABELS.split(sizes))
    ]
    torch.stack(losses).sum().backward()

    begin = 0
    for slot, (adapter, size) in enumerate(zip(adapters, sizes)):
        mine = slice(begin, begin + size)
        begin += size
        alone = base(kind)
        solo = stacked(alone, shapes, [adapter])
        expected = forward(alone, solo, {k: v[mine] for k, v in inputs.items()}, [Segment(0, size)])
        nn.functional.cross_entropy(expected, LABELS[mine]).backward()
        assert_close_float32(logits[mine], expected)
        entries = adapter.layout.entries
        theirs = [gradient(solo, 0, e.name, e.part, e.shape) for e in entries]
        assert_close_float32([gradient(pack, slot, e.name, e.part, e.shape) for e in entries], theirs)


def test_an_adapter_in_one_slot_does_not_touch_another(base, inputs, random_adapter):
    fresh = base("mean")
    shapes = match_targets(fresh.model, config_for(fresh, TARGETS["mean"]), fresh.head)
    head = head_values(fresh.model, fresh.head)
    first, second, third = (random_adapter(shapes, head, 2, 3.0, seed=seed) for seed in (1, 2, 3))
    stack = stacked(fresh, shapes, [first, second])
    segments = [Segment(0, 4), Segment(1, 2)]
    with torch.no_grad():
        before = forward(fresh, stack, inputs, segments)
        stack.load([first, third])
        after = forward(fresh, stack, inputs, segments)
        turned = forward(fresh, stack, inputs, [Segment(1, 4), Segment(0, 2)])
    assert torch.equal(after[:4], before[:4])
    assert not torch.allclose(after[4:], before[4:], atol=1e-3)
    assert not torch.allclose(turned[:4], before[:4], atol=1e-3)
    for found, adapter in zip(slot_vectors(stack, [first, third]), (first, third)):
        assert torch.equal(found, adapter.flatten())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_padding_stays_zero_while_training(base, inputs, random_adapter, optimizer):
    fresh = base("bert")
    shapes = match_targets(fresh.model, config_for(fresh, TARGETS["bert"]), fresh.head)
    head = head_values(fresh.model, fresh.head)
    adapters = [random_adapter(shapes, head, rank, 1.0, seed=rank) for rank in (1, 4, 2)]
    stack = stacked(fresh, shapes, [adapters[1]] * 3)  # a slot is used again: what lay there before must be gone
    stack.load(adapters)
    steps = optimizer(stack.parameters.values(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        steps.zero_grad()
        logits = forward(fresh, stack, inputs, [Segment(slot, 2) for slot in range(3)])
        nn.functional.cross_entropy(logits, LABELS).backward()
        steps.step()
    for slot, rank in enumerate((1, 4, 2)):
        for B, A in stack.factors(slot):
            assert not A[rank:].any()
            assert not B[:, rank:].any()
            assert A[:rank].all()
    assert not torch.allclose(slot_vectors(stack, adapters)[0], adapters[0].flatten(), atol=1e-3)


def test_rows_that_no_segment_owns_are_refused(base, inputs):
    fresh = base("mean")
    stack = Stack(fresh.model, match_targets(fresh.model, config_for(fresh, ["query"]), fresh.head), fresh.head)
    with pytest.raises(ValueError, match="the batch has 6 rows, its segments 5"):
        forward(fresh, stack, inputs, [Segment(0, 5)])
    with pytest.raises(ValueError, match="the batch has 6 rows, its segments 0"):
        fresh.model(**inputs)  # outside of any batch, nobody owns the rows


def test_adapters_that_do_not_fit_the_stack_are_refused(base, random_adapter):
    fresh = base("mean")
    shapes = match_targets(fresh.model, config_for(fresh, ["query", "value"]), fresh.head)
    head = head_values(fresh.model, fresh.head)
    stack = Stack(fresh.model, shapes, fresh.head)
    fewer = dict(list(shapes.items())[1:])
    with pytest.raises(KeyError, match="the adapter's layers are not the model's"):
        stack.load([random_adapter(fewer, head, 2, 1.0, seed=0)])


@pytest.mark.parametrize("head", [nn.Conv2d(3, 4, 1), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))])
def test_a_head_that_is_not_made_of_linear_layers_is_refused(head):
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": head})
    with pytest.raises(UserError, match=r"model\.name: the head classifier.* is a (Conv2d|LayerNorm), but only heads"):
        Stack(model, {"body": (4, 4)}, ("classifier",))


def test_heads_of_several_linear_layers_are_found_by_full_name():
    model = nn.ModuleDict({"score": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))})
    assert list(head_layers(model, ("score",))) == ["score.0", "score.2"]
    values = head_values(model, ("score",))
    assert {name: tuple(t.shape) for name, t in values.items()} == {
        "score.0.weight": (3, 4), "score.0.bias": (3,), "score.2.weight": (2, 3),
    }  # fmt: skip
    values["score.0.bias"].fill_(9)
    assert not (model["score"][0].bias == 9).any()
    stack = Stack(model, {}, ("score",))
    assert {name for name, _ in stack.views(stack.parameters)} == set(values)
    stack.load([Adapter({}, {n: 0 * t for n, t in values.items()}), Adapter({}, values)])
    with stack.using([Segment(1, 2)]):
        out = model["score"](torch.ones(2, 4))
    expected = torch.tanh(torch.ones(2, 4) @ values["score.0.weight"].T + 9) @ values["score.2.weight"].T
    torch.testing.assert_close(out, expected)


def test_load_makes_one_slot_per_adapter_at_each_layers_largest_rank():
    model = nn.ModuleDict({"one": nn.Linear(5, 7), "two": nn.Linear(7, 3), "score": nn.Linear(3, 2)})
    stack = Stack(model, ["one", "two"], ["score"])
    head = {"score.weight": torch.ones(2, 3), "score.bias": torch.ones(2)}

    def adapter(*ranks):
        shapes = zip(("one", "two"), ((7, 5), (3, 7)), ranks)
        return Adapter({n: LowRank(torch.ones(o, r), torch.ones(r, i), r) for n, (o, i), r in shapes}, head)

    for ranks in ([(1, 2), (4, 1)], [(1, 2), (4, 1), (2, 3)], [(1, 2)]):
        stack.load([adapter(*own) for own in ranks])
        slots, one, two = len(ranks), max(r for r, _ in ranks), max(r for _, r in ranks)
        flat = {part: values.detach() for part, values in stack.parameters.items()}
        values = stack.views(flat)
        assert {place: tuple(t.shape) for place, t in values.items()} == {
            ("one", "A"): (slots, one, 5), ("one", "B"): (slots, 7, one),
            ("two", "A"): (slots, two, 7), ("two", "B"): (slots, 3, two),
            ("score.weight", "head"): (slots, 2, 3), ("score.bias", "head"): (slots, 2),
        }  # fmt: skip
        assert all(values["one", "A"][slot].sum() == 5 * own for slot, (own, _) in enumerate(ranks))
        # The columns between the tensors hold nothing, and each tensor begins at a multiple of 64 bytes.
        assert sum(float(t.sum()) for t in values.values()) == sum(float(t.sum()) for t in flat.values())
        assert all(t[slot].data_ptr() % 64 == 0 for t in values.values() for slot in range(slots))
        assert model["one"].constants.scales == [own for own, _ in ranks]


def test_what_does_not_train_gets_no_gradient_and_its_part_zeros():
    stack, model = Stack(m := nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)}), ["one", "two"], []), m
    pair = LowRank(torch.ones(4, 2), torch.ones(2, 4), 1.0)
    stack.load([Adapter({"one": pair, "two": pair}, {})])
    stack.train([("two", "B")])
    with stack.using([Segment(0, 3)]):
        model["two"](model["one"](torch.ones(3, 4))).sum().backward()
    assert stack.parameters["A"].grad is None
    gradients = stack.views({"B": stack.parameters["B"].grad})
    assert not gradients["one", "B"].any()
    assert gradients["two", "B"].all()


@pytest.mark.parametrize("other_input", [False, True])
def test_layers_that_read_one_input_share_a_product_and_others_are_right_too(monkeypatch, other_input):
    """As on a GPU, in bfloat16: q, k and v, of different ranks, where v may read another input after all."""
    g = torch.Generator().manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj"]
    pairs = [
        {
            n: LowRank(torch.randn(16, r, generator=g), torch.randn(r, 8, generator=g), 1.5 / r)
            for n, r in zip(names, ranks)
        }
        for ranks in ((1, 9, 2), (4, 3, 2))
    ]
    x = torch.randn(5, 8, generator=g).bfloat16().requires_grad_()
    found, project = [], Mock(wraps=kernel.project)
    monkeypatch.setattr("rayfed.lora.packed.layers.project", project)
    for grouped in (False, True):
        monkeypatch.setattr("rayfed.lora.packed.stack.groups_products", lambda device, here=grouped: here)
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(8, 16) for name in names}).bfloat16()
        stack = Stack(model, names, [], compute=torch.bfloat16)
        stack.load([Adapter(own, {}) for own in pairs])
        with stack.using([Segment(0, 2), Segment(1, 3)]):
            read = {"q_proj": x, "k_proj": x, "v_proj": 2 * x if other_input else x}
            outputs = [model[name](read[name]) for name in names]
            sum((i + 1) * out.float().square().sum() for i, out in enumerate(outputs)).backward()
        gradients = stack.views({part: values.grad for part, values in stack.parameters.items()})
        cropped = [
            stack.crop(gradients[name, part][slot], part, getattr(pair, part).shape)
            for slot, own in enumerate(pairs) for name, pair in own.items() for part in ("A", "B")
        ]  # fmt: skip
        found.append([*(out.detach() for out in outputs), x.grad, *cropped])
        x.grad = None
    assert project.call_count == (2 if other_input else 1)
    for mine, theirs in zip(*found, strict=True):
        assert float((mine - theirs).float().norm() / theirs.float().norm()) < 4 * 2**-8


# One layer of its own.


def layer_of(base, pairs, dropout=0.0):
    """(stack, layer): a stack over this layer alone, with the pairs in its slots."""
    model = nn.ModuleDict({"layer": base})
    stack = Stack(model, ["layer"], [], dropout)
    stack.load([Adapter({"layer": pair}, {}) for pair in pairs])
    return stack, model["layer"]


def test_dropout_is_inverted_hits_the_adapter_only_and_is_off_without_a_key():
    base = nn.Linear(1000, 1000, bias=False)
    eye = torch.eye(1000)
    stack, layer = layer_of(base, [LowRank(eye, eye, 1.0)], dropout=0.25)
    x = torch.ones(4, 1000)
    with torch.no_grad(), stack.using([Segment(0, 4, dropout_key=0)]):
        change = layer(x) - base(x)
    values = change.flatten()
    kept = values > 0.5
    torch.testing.assert_close(values[kept], torch.full_like(values[kept], 4 / 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(values[~kept], torch.zeros_like(values[~kept]), rtol=0, atol=1e-4)
    assert 0.72 < float(kept.float().mean()) < 0.78
    with torch.no_grad(), stack.using([Segment(0, 4)]):
        torch.testing.assert_close(layer(x) - base(x), x, rtol=0, atol=1e-4)


def test_dropout_on_a_texts_own_tokens_does_not_depend_on_padding_or_neighbours():
    stack, layer = layer_of(nn.Linear(8, 8), [LowRank(torch.eye(8), torch.eye(8), 1.0)] * 2, dropout=0.5)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([x, torch.zeros(2, 4, 8)], dim=1)
    beside = torch.cat([torch.ones(3, 7, 8), padded])
    with torch.no_grad():
        with stack.using([Segment(0, 2, 9, [3, 2])]):
            alone, pooled = layer(x), layer(x[:, 0])
        with stack.using([Segment(1, 3, 4, [7, 7, 1]), Segment(0, 2, 9, [3, 2])]):
            packed, packed_pooled = layer(beside), layer(beside[:, 0])
    torch.testing.assert_close(packed[3:, :3], alone)
    torch.testing.assert_close(packed_pooled[3:], pooled)
    assert not torch.allclose(alone, x + layer.base(x))


def test_every_layer_drops_entries_of_its_own(base):
    fresh = base("mean")
    shapes = match_targets(fresh.model, config_for(fresh, ["query", "value"]), fresh.head)
    stack = Stack(fresh.model, shapes, fresh.head, dropout=0.5)
    assert len(stack.lora) == len({tuple(layer.features_I.tolist()) for layer in stack.lora.values()}) == 4


def test_a_head_without_a_bias_has_none_in_any_slot():
    linear = nn.Linear(4, 3, bias=False)
    model = nn.ModuleDict({"score": linear})
    stack = Stack(model, [], ["score"])
    stack.load([Adapter({}, {"score.weight": weight}) for weight in (torch.zeros(3, 4), linear.weight)])
    assert list(stack.views(stack.parameters)) == [("score.weight", "head")]
    with stack.using([Segment(1, 5)]):
        torch.testing.assert_close(model["score"](torch.ones(5, 4)), linear(torch.ones(5, 4)))


def test_rows_may_lie_end_to_end_without_padding():
    """Two clients, texts of 3 and 2 tokens, and of 4: the layer computes per token what it computes padded."""
    pairs = [LowRank((slot + 1) * torch.eye(8), torch.eye(8), 1.0) for slot in range(2)]
    stack, layer = layer_of(nn.Linear(8, 8), pairs, dropout=0.5)
    x = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(1))
    alone, packed = (lambda: Segment(0, 2, 9, [3, 2])), (lambda: Segment(1, 1, 4, [4]))
    with torch.no_grad():
        with stack.using([alone()]):
            own, pooled = layer(x[:, :5]), layer(x[0, :2])
        with stack.using([alone(), packed()]):
            both, both_pooled = layer(x), layer(x[0, :3])
        with stack.using([Segment(0, 2, None, [3, 2]), Segment(1, 1, None, [4])]):
            change = layer(x) - layer.base(x)
    assert both.shape == (1, 9, 8)
    torch.testing.assert_close(both[:, :5], own)
    torch.testing.assert_close(both_pooled[:2], pooled)
    torch.testing.assert_close(change[:, :5], x[:, :5])
    torch.testing.assert_close(change[:, 5:], 2 * x[:, 5:])
    for wrong in (x[:, :8], torch.zeros(9, 2, 8)):
        with stack.using([alone(), packed()]), pytest.raises(ValueError, match="its segments 3 of 9 tokens"):
            layer(wrong)
