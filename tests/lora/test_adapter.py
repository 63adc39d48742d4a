import json
import math

import pytest
import torch

from rayfed.lora.adapter import Adapter, Layout, LowRank, fresh_adapter, scale_of

SHAPES = {"layer.10.query": (6, 4), "layer.2.query": (5, 7)}
HEAD = {"score.weight": torch.arange(8.0).view(2, 4), "score.bias": torch.tensor([-1.0, 1.0])}


def random_adapter(rank: int = 3) -> Adapter:
    g = torch.Generator().manual_seed(0)
    layers = {
        name: LowRank(torch.randn(out, rank, generator=g), torch.randn(rank, inner, generator=g), scale)
        for (name, (out, inner)), scale in zip(SHAPES.items(), (0.5, 2.0))
    }
    return Adapter(layers, {name: torch.randn(t.shape, generator=g) for name, t in HEAD.items()})


def test_the_flat_order_is_layers_by_name_with_a_before_b_then_the_head():
    layout = random_adapter(rank=1).layout
    assert [(e.name, e.part, e.start) for e in layout.entries] == [
        ("layer.10.query", "A", 0),
        ("layer.10.query", "B", 4),
        ("layer.2.query", "A", 10),
        ("layer.2.query", "B", 17),
        ("score.bias", "head", 22),
        ("score.weight", "head", 24),
    ]
    assert layout.size == 32


def test_flatten_and_unflatten_give_the_same_bits_back():
    adapter = random_adapter()
    adapter.head["score.bias"][0] = -0.0
    adapter.layers["layer.2.query"].B[0, 0] = 1e-45
    vector = adapter.flatten()
    assert vector.dtype == torch.float32
    assert vector.shape == (adapter.layout.size,)
    again = adapter.layout.unflatten(vector)
    assert again.layout == adapter.layout
    for name, pair in adapter.layers.items():
        assert torch.equal(again.layers[name].A.view(torch.int32), pair.A.view(torch.int32))
        assert torch.equal(again.layers[name].B.view(torch.int32), pair.B.view(torch.int32))
        assert again.layers[name].scale == pair.scale
    for name, tensor in adapter.head.items():
        assert torch.equal(again.head[name].view(torch.int32), tensor.view(torch.int32))
    assert torch.equal(again.flatten().view(torch.int32), vector.view(torch.int32))


def test_the_order_of_the_mappings_does_not_matter():
    adapter = random_adapter()
    turned = Adapter(dict(reversed(adapter.layers.items())), dict(reversed(adapter.head.items())))
    assert list(turned.layers) != list(adapter.layers)
    assert turned.layout == adapter.layout
    assert turned.layout.to_json() == adapter.layout.to_json()
    assert torch.equal(turned.flatten(), adapter.flatten())


def test_flatten_copies_and_unflatten_gives_views():
    adapter = random_adapter()
    vector = adapter.flatten()
    vector.zero_()
    assert all(pair.A.abs().sum() > 0 and pair.B.abs().sum() > 0 for pair in adapter.layers.values())
    views = adapter.layout.unflatten(vector)
    views.layers["layer.2.query"].B[1, 2] = 7
    views.head["score.weight"][1, 3] = 8
    assert sorted(vector.nonzero().flatten().tolist()) == [
        next(e.start for e in adapter.layout.entries if e.name == "layer.2.query" and e.part == "B") + 1 * 3 + 2,
        adapter.layout.size - 1,
    ]


def test_a_vector_of_another_shape_is_refused():
    layout = random_adapter().layout
    n = layout.size
    for wrong in (torch.zeros(0), torch.zeros(n - 1), torch.zeros(n + 1), torch.zeros(1, n)):
        with pytest.raises(ValueError, match=f"expected a vector of {n} entries"):
            layout.unflatten(wrong)


def test_masks_partition_the_vector():
    adapter = random_adapter()
    layout = adapter.layout
    A, B, head = layout.mask("A"), layout.mask("B"), layout.mask("head")
    assert torch.equal(A.int() + B.int() + head.int(), torch.ones(layout.size, dtype=torch.int32))
    assert int(A.sum()) == sum(p.A.numel() for p in adapter.layers.values())
    assert int(B.sum()) == sum(p.B.numel() for p in adapter.layers.values())
    assert torch.equal(layout.mask("A", "head"), A | head)
    assert not layout.mask().any()
    marked = layout.unflatten(B.float())
    assert all(bool((p.B == 1).all()) and bool((p.A == 0).all()) for p in marked.layers.values())


def test_a_layout_survives_json():
    layout = random_adapter().layout
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert all(isinstance(entry.shape, tuple) for entry in again.entries)


def test_an_adapter_of_nothing_is_a_vector_of_nothing():
    empty = Adapter({}, {})
    assert empty.flatten().shape == (0,)
    assert empty.layout.unflatten(torch.zeros(0)) == empty
    head_only = Adapter({}, HEAD)
    assert head_only.layout.mask("head").all()
    assert torch.equal(head_only.flatten(), torch.cat([HEAD["score.bias"], HEAD["score.weight"].flatten()]))


def test_dense_is_scale_times_b_a():
    pair = LowRank(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0, 20.0]]), 0.5)
    assert pair.rank == 1
    assert pair.dense().tolist() == [[5, 10], [10, 20], [15, 30]]


@pytest.mark.parametrize(("B", "A"), [((3, 2), (3, 2)), ((3, 1), (2, 3)), ((3,), (3, 2))])
def test_factors_that_do_not_fit_together_are_refused(B, A):
    with pytest.raises(ValueError, match=r"B is \(out, r\) and A is \(r, in\)"):
        LowRank(torch.zeros(B), torch.zeros(A), 1.0)


def test_scales_are_those_of_peft():
    assert scale_of(4, 8) == 2
    assert scale_of(4, 8, rslora=True) == 4
    assert scale_of(3, 1, rslora=True) == 1 / math.sqrt(3)


def test_a_fresh_adapter_changes_nothing_and_draws_a_as_peft_does():
    shapes = {"wide": (8, 400), "narrow": (400, 9)}
    adapter = fresh_adapter(shapes, HEAD, rank=50, scale=2.0, seed=3)
    for name, (out, inner) in shapes.items():
        pair = adapter.layers[name]
        assert pair.B.shape == (out, 50)
        assert pair.A.shape == (50, inner)
        assert not pair.B.any()
        bound = 1 / math.sqrt(inner)
        assert float(pair.A.abs().max()) <= bound
        assert float(pair.A.max()) > 0.95 * bound
        assert float(pair.A.min()) < -0.95 * bound
        assert pair.scale == 2.0


def test_the_head_of_a_fresh_adapter_is_a_copy():
    adapter = fresh_adapter(SHAPES, HEAD, rank=2, scale=1.0, seed=0)
    assert torch.equal(adapter.head["score.weight"], HEAD["score.weight"])
    adapter.head["score.weight"].zero_()
    assert HEAD["score.weight"].any()


def test_a_layers_draw_belongs_to_its_name_and_the_seed():
    both = fresh_adapter(SHAPES, HEAD, rank=2, scale=1.0, seed=0)
    alone = fresh_adapter({"layer.2.query": SHAPES["layer.2.query"]}, {}, rank=2, scale=1.0, seed=0)
    turned = fresh_adapter(dict(reversed(SHAPES.items())), HEAD, rank=2, scale=1.0, seed=0)
    other = fresh_adapter(SHAPES, HEAD, rank=2, scale=1.0, seed=1)
    A = both.layers["layer.2.query"].A
    assert torch.equal(alone.layers["layer.2.query"].A, A)
    assert torch.equal(turned.layers["layer.2.query"].A, A)
    assert not torch.equal(other.layers["layer.2.query"].A, A)
    same_shape = fresh_adapter({"a": (6, 4), "b": (6, 4)}, {}, rank=2, scale=1.0, seed=0)
    assert not torch.equal(same_shape.layers["a"].A, same_shape.layers["b"].A)
