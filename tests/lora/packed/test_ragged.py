"""Padding of segments: values and gradients are those of `pad_sequence`, and unpadding is the inverse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rayfed.lora.packed.ragged import RaggedIndex
from rayfed.lora.packed.segments import ROUNDED, Batch, Segment, Segments

CPU = torch.device("cpu")
SIZES = [(3, 1, 4), (2,), (5, 5), (1, 1, 1, 7)]


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_padding_is_pad_sequence(sizes):
    index = RaggedIndex(sizes, CPU)
    x = drawn(sum(sizes), 3).requires_grad_()
    weights = drawn(index.count, index.longest, 3)
    expected = nn.utils.rnn.pad_sequence(list(x.split(list(sizes))), batch_first=True)
    padded = index.pad(x).view(index.count, index.longest, 3)
    assert torch.equal(padded, expected)
    assert torch.equal(index.unpad(padded.flatten(0, 1)), x)
    (expected,) = torch.autograd.grad((expected * weights).sum(), x)
    (found,) = torch.autograd.grad((padded * weights).sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_are_those_of_finite_differences(sizes):
    index = RaggedIndex(sizes, CPU)
    assert torch.autograd.gradcheck(index.pad, (drawn(sum(sizes), 2).requires_grad_(),))
    assert torch.autograd.gradcheck(index.unpad, (drawn(index.count * index.longest, 2).requires_grad_(),))


def test_nan_reaches_no_other_sequence():
    index = RaggedIndex((1, 3), CPU)
    padded = index.pad(torch.tensor([torch.nan, 1.0, 2.0, 3.0]))
    assert torch.equal(padded.isnan(), torch.tensor([True] + 5 * [False]))
    filled = torch.zeros(6).masked_fill(index.padding_mask, torch.nan)
    assert not index.unpad(filled).isnan().any()


@pytest.mark.parametrize("slots", [(0, 1, 2), (1, 2, 3), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(2, 1, 3), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("wide", [1, 4])
def test_unpad_and_scatter_are_inverses(slots, sizes, wide):
    segments = Segments([Segment(slot, size) for slot, size in zip(slots, sizes)], False, CPU)
    x, stacked = drawn(sum(sizes) * wide, 5), drawn(4, 2, 3)
    padded = segments.pad(x)
    assert padded.shape == (3, max(sizes) * wide, 5)
    for k, (own, size) in enumerate(zip(x.view(sum(sizes), wide, 5).split(list(sizes)), sizes)):
        assert torch.equal(padded[k, : size * wide], own.flatten(0, 1))
        assert not padded[k, size * wide :].any()
    assert torch.equal(segments.unpad(padded), x)
    assert torch.equal(segments.select(stacked), stacked[list(slots)])
    back = segments.scatter(segments.select(stacked), 4)
    (left_out,) = set(range(4)) - set(slots)
    assert torch.equal(back[list(slots)], stacked[list(slots)])
    assert not back[left_out].any()


def test_an_input_is_padded_once_until_it_changes():
    segments = Segments([Segment(0, 1), Segment(1, 3)], False, CPU)
    x = drawn(4, 5)
    first = segments.pad_input(x, x)
    assert torch.equal(first, segments.pad(x))
    assert segments.pad_input(x, x) is first
    x.add_(1)
    assert torch.equal(segments.pad_input(x, x), segments.pad(x))
    other = drawn(4, 5) + 2
    assert torch.equal(segments.pad_input(other, other), segments.pad(other))


def test_in_sixteen_bits_a_cpu_pads_tokens_to_a_rounded_size_and_rows_to_the_most():
    for by_token, longest in ((True, ROUNDED), (False, 3)):
        segments = Segments([Segment(0, 1), Segment(1, 3)], by_token, CPU, half=True)
        x = drawn(4, 5)
        assert segments.pad(x).shape == (2, longest, 5)
        assert torch.equal(segments.unpad(segments.pad(x)), x)
    even = Segments([Segment(0, ROUNDED), Segment(1, ROUNDED)], True, CPU, half=True)
    x = drawn(2 * ROUNDED, 5)
    assert even.pad(x).data_ptr() == x.data_ptr()  # nothing to pad: a view


def test_slots_may_come_in_any_order():
    segments = Segments([Segment(slot, 1) for slot in (2, 0, 1)], False, CPU)
    stacked = drawn(3, 2)
    assert torch.equal(segments.scatter(segments.select(stacked), 3), stacked)


def test_a_cpu_batches_equal_sizes_only_and_a_gpu_always():
    cases = {"alone": [4], "equal": [2, 2], "ragged": [1, 3]}

    def batched(device):
        segments = {name: [Segment(k, n) for k, n in enumerate(sizes)] for name, sizes in cases.items()}
        return {name: Segments(own, False, torch.device(device)).batched for name, own in segments.items()}

    assert batched("cpu") == {"alone": False, "equal": True, "ragged": False}
    assert batched("meta") == {"alone": True, "equal": True, "ragged": True}


def test_the_shape_tells_rows_from_tokens():
    batch = Batch()
    with batch.using([Segment(0, 2, lengths=[3, 1]), Segment(1, 1, lengths=[2])]):
        rows, tokens = batch.segments_of(torch.zeros(3, 7)), batch.segments_of(torch.zeros(1, 6, 7))
        assert (rows.sizes, rows.by_token) == ([2, 1], False)
        assert (tokens.sizes, tokens.by_token) == ([4, 2], True)
        assert batch.segments_of(torch.zeros(3, 5, 7)) is rows
        assert batch.segments_of(torch.zeros(6, 7)) is tokens
