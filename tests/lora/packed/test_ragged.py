"""Runs side by side: what is put into a grid comes back, gradients are those of plain padding, free places are zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rayfed.lora.packed.ragged import RaggedIndex
from rayfed.lora.packed.segments import Batch, Segment, Segments

CPU = torch.device("cpu")
SIZES = [(3, 1, 4), (2,), (5, 5), (1, 1, 1, 7)]


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_grid_is_plain_padding(sizes):
    grid = RaggedIndex(sizes, CPU)
    x = drawn(sum(sizes), 3).requires_grad_()
    weights = drawn(grid.lines, grid.longest, 3)
    padded = nn.utils.rnn.pad_sequence(list(x.split(list(sizes))), batch_first=True)
    spread = grid.pad(x).view(grid.lines, grid.longest, 3)
    assert torch.equal(spread, padded)
    assert torch.equal(grid.unpad(spread.flatten(0, 1)), x)
    (expected,) = torch.autograd.grad((padded * weights).sum(), x)
    (found,) = torch.autograd.grad((spread * weights).sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_both_ways_have_the_gradients_of_finite_differences(sizes):
    grid = RaggedIndex(sizes, CPU)
    assert torch.autograd.gradcheck(grid.spread, (drawn(sum(sizes), 2).requires_grad_(),))
    assert torch.autograd.gradcheck(grid.gather, (drawn(grid.lines * grid.longest, 2).requires_grad_(),))


def test_nan_behind_a_run_reaches_nobody():
    grid = RaggedIndex((1, 3), CPU)
    spread = grid.pad(torch.tensor([torch.nan, 1.0, 2.0, 3.0]))
    assert torch.equal(spread.isnan(), torch.tensor([True] + 5 * [False]))
    filled = torch.zeros(6).masked_fill(grid.free, torch.nan)
    assert not grid.unpad(filled).isnan().any()


@pytest.mark.parametrize("slots", [(0, 1, 2), (1, 2, 3), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(2, 1, 3), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("wide", [1, 4])
def test_what_is_shared_out_comes_back(slots, sizes, wide):
    runs = Segments([Segment(slot, size) for slot, size in zip(slots, sizes)], False, CPU)
    x, stacked = drawn(sum(sizes) * wide, 5), drawn(4, 2, 3)
    grid = runs.grid(x)
    assert grid.shape == (3, max(sizes) * wide, 5)
    for k, (run, size) in enumerate(zip(x.view(sum(sizes), wide, 5).split(list(sizes)), sizes)):
        assert torch.equal(grid[k, : size * wide], run.flatten(0, 1))
        assert not grid[k, size * wide :].any()
    assert torch.equal(runs.row(grid), x)
    assert torch.equal(runs.of(stacked), stacked[list(slots)])
    back = runs.into(runs.of(stacked), 4)
    (left_out,) = set(range(4)) - set(slots)
    assert torch.equal(back[list(slots)], stacked[list(slots)])
    assert not back[left_out].any()


def test_slots_may_come_in_any_order():
    runs = Segments([Segment(slot, 1) for slot in (2, 0, 1)], False, CPU)
    stacked = drawn(3, 2)
    assert torch.equal(runs.into(runs.of(stacked), 3), stacked)


def test_a_cpu_takes_ragged_runs_one_by_one_and_a_gpu_never():
    runs = {"alone": [4], "even": [2, 2], "ragged": [1, 3]}

    def together(device):
        segments = {name: [Segment(k, n) for k, n in enumerate(sizes)] for name, sizes in runs.items()}
        return {name: Segments(found, False, torch.device(device)).batched for name, found in segments.items()}

    assert together("cpu") == {"alone": False, "even": True, "ragged": False}
    assert together("meta") == {"alone": True, "even": True, "ragged": True}


def test_rows_and_tokens_are_told_apart_by_the_shape_and_found_once():
    batch = Batch()
    with batch.using([Segment(0, 2, lengths=[3, 1]), Segment(1, 1, lengths=[2])]):
        rows, tokens = batch.segments_of(torch.zeros(3, 7)), batch.segments_of(torch.zeros(1, 6, 7))
        assert (rows.sizes, rows.flat) == ([2, 1], False)
        assert (tokens.sizes, tokens.flat) == ([4, 2], True)
        assert batch.segments_of(torch.zeros(3, 5, 7)) is rows
        assert batch.segments_of(torch.zeros(6, 7)) is tokens
