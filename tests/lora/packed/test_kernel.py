"""The stacked change against the same equations written with autograd's own operations."""

from __future__ import annotations

import pytest
import torch

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.kernel import SlotConstants, add_lora_, add_projected_, project
from rayfed.lora.packed.segments import Segment, Segments
from rayfed.lora.packed.stack import Stack

OUT, IN, RANK = 12, 8, 4  # rows of 16 bytes, which grouped products need


def frozen_forms():
    g = torch.Generator().manual_seed(1)
    matrix = torch.randn(OUT, IN, generator=g, dtype=torch.float64)
    pair = LowRank(
        torch.randn(OUT, 2, generator=g, dtype=torch.float64), torch.randn(2, IN, generator=g, dtype=torch.float64), 0.7
    )
    return {"nothing": None, "matrix": matrix, "pair": pair}


def segments_of(slots, sizes, batched=None, half=False, grouped=False):
    segments = [Segment(slot, size) for slot, size in zip(slots, sizes)]
    segments = Segments(segments, half, torch.device("cpu"), half)
    segments.batched = segments.batched if batched is None else batched
    segments.grouped = grouped and not segments.equal_sizes
    return segments


def written_out(y, x, u, A, B, segments, constants):
    rows, start = [], 0
    for k, size in zip(segments.slots, segments.sizes):
        r = slice(start, start + size)
        start += size
        total = y[r] + constants.scales[k] * (u[r] @ A[k].T @ B[k].T)
        if isinstance(constants.base_changes[k], LowRank):
            total = total + x[r] @ constants.base_changes[k].dense().T
        elif constants.base_changes[k] is not None:
            total = total + x[r] @ constants.base_changes[k].T
        rows.append(total)
    return torch.cat(rows)


@pytest.mark.parametrize("batched", [False, True], ids=["by segment", "batched"])
@pytest.mark.parametrize("sizes", [(2, 3, 1), (2, 2, 2)], ids=["ragged", "even"])
@pytest.mark.parametrize("slots", [(2, 0, 1), (1, 2, 3), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 4)])
@pytest.mark.parametrize("form", ["nothing", "matrix", "pair"])
def test_values_and_all_gradients(shape, form, slots, sizes, batched):
    g = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64, requires_grad=True)

    frozen = frozen_forms()[form]
    segments = segments_of(slots, sizes, batched)
    constants = SlotConstants([2.0, -1.0, 0.5, 3.0], [None, frozen, frozen, frozen])
    tensors = [draw(*shape, OUT), draw(*shape, IN), draw(*shape, IN), draw(4, RANK, IN), draw(4, OUT, RANK)]
    results = []
    for function in (add_lora_, written_out):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y, x, u, A, B = leaves
        out = function(y * 1.0, x, u, A, B, segments, constants)  # y is what a layer made: no leaf
        (out * torch.arange(out.numel(), dtype=torch.float64).view_as(out).sin()).sum().backward()
        results.append([out.detach()] + [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slots", [(2, 0, 1), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 4)])
def test_grouped_products_with_scaled_factors_are_those_of_padded_segments(shape, slots):
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*size, generator=g) for size in ((*shape, OUT), (*shape, IN), (4, RANK, IN), (4, OUT, RANK))]
    scales, way, results = [2.0, -1.0, 0.5, 3.0], torch.randn(*shape, OUT, generator=g), []
    for grouped in (False, True):
        y, x, A, B = (t.clone().requires_grad_() for t in tensors)
        segments = segments_of(slots, (2, 3, 1), True, grouped=grouped)
        constants = SlotConstants(None if grouped else scales, [None] * 4)
        scaled = B * torch.tensor(scales).view(-1, 1, 1) if grouped else B  # as the stack does on a GPU
        out = add_lora_(y * 1.0, x, x, A, scaled, segments, constants)
        (out * way).sum().backward()
        results.append([out.detach(), *(t.grad for t in (y, x, A, B))])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(20, 70, 1), (64, 64, 64)], ids=["ragged", "even"])
@pytest.mark.parametrize("form", ["nothing", "matrix", "pair"])
def test_in_bfloat16_operands_and_results_are_rounded_once(form, sizes):
    """Each product adds at most the rounding of its operands and of its result: 2^-9 each, relative to the whole."""
    g = torch.Generator().manual_seed(0)
    slots, frozen = (2, 0, 1), frozen_forms()[form]
    compute = torch.bfloat16

    def draw(*size, dtype=torch.float32):
        return torch.randn(*size, generator=g).to(dtype)

    rows = sum(sizes)
    tensors = [draw(rows, OUT, dtype=compute), *[draw(rows, IN, dtype=compute)] * 2, draw(3, RANK, IN, dtype=compute)]
    tensors.append(draw(3, OUT, RANK, dtype=compute))
    rounded = frozen
    if frozen is not None:
        rounded = LowRank(frozen.B.to(compute), frozen.A.to(compute), 0.7) if form == "pair" else frozen.to(compute)
    way, results = torch.randn(rows, OUT, generator=g), []
    for function, fine in ((add_lora_, False), (written_out, True)):
        leaves = [(t.double() if fine else t).clone().requires_grad_() for t in tensors]
        constants = SlotConstants([2.0, -1.0, 0.3], [frozen if fine else rounded] * 3)
        y, x, u, A, B = leaves
        out = function(y * 1.0, x, u, A, B, segments_of(slots, sizes, half=not fine), constants)
        (out * way).sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves if t.grad is not None)])
    for mine, theirs in zip(*results, strict=True):
        assert float((mine.double() - theirs).norm() / theirs.norm()) < 4 * 2**-9


@pytest.mark.parametrize(("batched", "grouped"), [(False, False), (True, False), (True, True)])
def test_nan_in_one_segment_reaches_no_other(batched, grouped):
    """Padding is filled with zeros, not multiplied by zero: 0 times NaN would be NaN."""
    g = torch.Generator().manual_seed(0)
    segments = segments_of((0, 1), (1, 4), batched, grouped=grouped)
    constants = SlotConstants(None if grouped else [1.0, 1.0], [None, None])
    A, B = torch.randn(2, RANK, IN, generator=g), torch.randn(2, OUT, RANK, generator=g)
    found = []
    for bad in (0.0, torch.nan):
        x = torch.randn(5, IN, generator=torch.Generator().manual_seed(3))
        x[0] += bad
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        out = add_lora_(torch.zeros(5, OUT), leaves[0], *leaves, segments, constants)
        out.sum().backward()
        found.append([out[1:].detach(), *(leaf.grad[1:] for leaf in leaves)])
    for clean, beside in zip(*found):
        assert torch.equal(clean, beside)


@pytest.mark.parametrize("shared", [False, True])
def test_the_output_of_a_linear_layer_is_changed_in_place_and_autograd_copies_nothing(shared):
    """It is a view of what the layer computed: marked as changed, it would be copied several times going back."""
    x, A, B = torch.ones(1, 4, IN, requires_grad=True), torch.ones(2, RANK, IN), torch.ones(2, OUT, RANK)
    y, segments = torch.nn.Linear(IN, OUT)(x), segments_of((0, 1), (2, 2))
    if shared:
        (z,) = project(x, [A], segments)
        out = add_projected_(y, z, B, segments)
    else:
        out = add_lora_(y, x, x, A, B, segments, SlotConstants([1.0, 1.0], [None, None]))
    assert out.data_ptr() == y.data_ptr()
    assert out.grad_fn.name() == ("_AddProjectedBackward" if shared else "_AddLoraBackward")


def test_without_dropout_x_gets_both_gradients():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, IN, generator=g, dtype=torch.float64, requires_grad=True)
    A = torch.randn(1, RANK, IN, generator=g, dtype=torch.float64, requires_grad=True)
    B = torch.randn(1, OUT, RANK, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(OUT, IN, generator=g, dtype=torch.float64)
    segments, constants = segments_of((0,), (4,)), SlotConstants([0.5], [frozen_forms()["matrix"]])
    assert torch.autograd.gradcheck(lambda x, A, B: add_lora_(x @ weight.T, x, x, A, B, segments, constants), (x, A, B))


@pytest.mark.parametrize("batched", [False, True])
def test_a_bfloat16_base_and_float32_factors_keep_their_dtypes(batched):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, IN, generator=g).bfloat16()
    A = torch.randn(2, RANK, IN, generator=g, requires_grad=True)
    B = torch.randn(2, OUT, RANK, generator=g, requires_grad=True)
    segments, constants = (
        segments_of((0, 1), (3, 1), batched),
        SlotConstants([0.5, 0.5], [torch.randn(OUT, IN, generator=g)] * 2),
    )
    y = torch.zeros(4, OUT, dtype=torch.bfloat16)
    out = add_lora_(y.clone(), x, x, A, B, segments, constants)
    assert out.dtype == torch.bfloat16
    wanted = written_out(y.float(), x.float(), x.float(), A, B, segments, constants)
    torch.testing.assert_close(out.float(), wanted, rtol=0.02, atol=0.05)
    out.float().sum().backward()
    assert A.grad.dtype == torch.float32
    assert bool(A.grad.any())


def stack_over(layer):
    model = torch.nn.ModuleDict({"layer": layer})
    return Stack(model, ["layer"], []), model


def test_a_base_change_acts_as_a_changed_weight():
    """A slot over base + F gives what a slot over a base of weight W + F gives."""
    torch.manual_seed(0)
    plain, changed = torch.nn.Linear(IN, OUT), torch.nn.Linear(IN, OUT)
    F = torch.randn(OUT, IN)
    with torch.no_grad():
        changed.weight.copy_(plain.weight + F)
        changed.bias.copy_(plain.bias)
    pair, x, outputs = LowRank(torch.randn(OUT, 2), torch.randn(2, IN), 1.5), torch.randn(3, 4, IN), []
    for layer, frozen in ((plain, {"layer": F}), (changed, {})):
        stack, model = stack_over(layer)
        stack.load([Adapter({"layer": pair}, {})] * 2, [{}, frozen])
        with stack.using([Segment(1, 3)]):
            outputs.append(model["layer"](x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def test_neighbours_with_the_same_base_change_share_one_product():
    """One product per distinct change. A change that several clients share has one copy."""
    stack, model = stack_over(torch.nn.Linear(IN, OUT))
    shared, other = torch.randn(OUT, IN), torch.randn(OUT, IN)
    adapter = Adapter({"layer": LowRank(torch.ones(OUT, 1), torch.ones(1, IN), 1.0)}, {})
    stack.load([adapter] * 4, [{"layer": shared}, {"layer": shared}, {}, {"layer": other}])
    constants = model["layer"].constants
    assert constants.base_changes[0] is constants.base_changes[1]
    segments = segments_of((0, 1, 2, 3), (2, 1, 3, 2))
    assert [rows for rows, _ in constants.base_changes_of(segments, 10)] == [slice(0, 30), slice(60, 80)]
