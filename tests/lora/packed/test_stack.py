"""Stacked models against real PEFT: the same layers, logits and gradients. Slots do not affect each other."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.layers import StackedLinear, StackedLora
from rayfed.lora.packed.segments import Batch, Segment
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
    with stack.batch.using(segments):
        return base.model(**inputs).logits


def gradient(stack, slot, name, part, shape):
    """One slot's gradient of one tensor, without its padding."""
    found = {(n, p): parameter.grad for n, p, parameter in stack.tensors()}
    return None if found[name, part] is None else stack.crop(found[name, part][slot], part, shape)


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
    trained = {id(parameter) for _, _, parameter in stack.tensors()}
    assert {id(p) for p in fresh.model.parameters() if p.requires_grad} == trained


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
    steps = optimizer([p for _, _, p in stack.tensors()], lr=0.05, weight_decay=0.1)
    for _ in range(3):
        steps.zero_grad()
        logits = forward(fresh, stack, inputs, [Segment(slot, 2) for slot in range(3)])
        nn.functional.cross_entropy(logits, LABELS).backward()
        steps.step()
    for layer in stack.lora.values():
        for slot, rank in enumerate((1, 4, 2)):
            assert not layer.A_KRI[slot, rank:].any()
            assert not layer.B_KOR[slot, :, rank:].any()
            assert layer.A_KRI[slot, :rank].all()
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
    assert {name for name, _, _ in stack.tensors()} == set(values)
    stack.load([Adapter({}, {n: 0 * t for n, t in values.items()}), Adapter({}, values)])
    with stack.batch.using([Segment(1, 2)]):
        out = model["score"](torch.ones(2, 4))
    expected = torch.tanh(torch.ones(2, 4) @ values["score.0.weight"].T + 9) @ values["score.2.weight"].T
    torch.testing.assert_close(out, expected)


# The stacked layers on their own.


def test_dropout_is_inverted_hits_the_adapter_only_and_is_off_without_a_key():
    base = nn.Linear(1000, 1000, bias=False)
    batch = Batch()
    layer = StackedLora(base, batch, dropout=0.25)
    eye = torch.eye(1000)
    layer.load([LowRank(eye, eye, 1.0)])
    x = torch.ones(4, 1000)
    with torch.no_grad(), batch.using([Segment(0, 4, dropout_key=0)]):
        change = layer(x) - base(x)
    values = change.flatten()
    kept = values > 0.5
    torch.testing.assert_close(values[kept], torch.full_like(values[kept], 4 / 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(values[~kept], torch.zeros_like(values[~kept]), rtol=0, atol=1e-4)
    assert 0.72 < float(kept.float().mean()) < 0.78
    with torch.no_grad(), batch.using([Segment(0, 4)]):
        torch.testing.assert_close(layer(x) - base(x), x, rtol=0, atol=1e-4)


def test_dropout_on_a_texts_own_tokens_does_not_depend_on_padding_or_neighbours():
    batch = Batch()
    layer = StackedLora(nn.Linear(8, 8), batch, dropout=0.5)
    layer.load([LowRank(torch.eye(8), torch.eye(8), 1.0)] * 2)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([x, torch.zeros(2, 4, 8)], dim=1)
    beside = torch.cat([torch.ones(3, 7, 8), padded])
    with torch.no_grad():
        with batch.using([Segment(0, 2, 9, [3, 2])]):
            alone, pooled = layer(x), layer(x[:, 0])
        with batch.using([Segment(1, 3, 4, [7, 7, 1]), Segment(0, 2, 9, [3, 2])]):
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
    batch = Batch()
    linear = nn.Linear(4, 3, bias=False)
    layer = StackedLinear(linear, batch)
    layer.load([torch.zeros(3, 4), linear.weight])
    assert layer.bias_KO is None
    with batch.using([Segment(1, 5)]):
        torch.testing.assert_close(layer(torch.ones(5, 4)), linear(torch.ones(5, 4)))


def test_rows_may_lie_end_to_end_without_padding():
    """Two clients, texts of 3 and 2 tokens, and of 4: the layer computes per token what it computes padded."""
    batch = Batch()
    layer = StackedLora(nn.Linear(8, 8), batch, dropout=0.5)
    layer.load([LowRank((slot + 1) * torch.eye(8), torch.eye(8), 1.0) for slot in range(2)])
    x = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(1))
    alone, packed = (lambda: Segment(0, 2, 9, [3, 2])), (lambda: Segment(1, 1, 4, [4]))
    with torch.no_grad():
        with batch.using([alone()]):
            own, pooled = layer(x[:, :5]), layer(x[0, :2])
        with batch.using([alone(), packed()]):
            both, both_pooled = layer(x), layer(x[0, :3])
        with batch.using([Segment(0, 2, None, [3, 2]), Segment(1, 1, None, [4])]):
            change = layer(x) - layer.base(x)
    assert both.shape == (1, 9, 8)
    torch.testing.assert_close(both[:, :5], own)
    torch.testing.assert_close(both_pooled[:2], pooled)
    torch.testing.assert_close(change[:, :5], x[:, :5])
    torch.testing.assert_close(change[:, 5:], 2 * x[:, 5:])
    for wrong in (x[:, :8], torch.zeros(9, 2, 8)):
        with batch.using([alone(), packed()]), pytest.raises(ValueError, match="its segments 3 of 9 tokens"):
            layer(wrong)
