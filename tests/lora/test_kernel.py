"""The stacked change against the same equations written with autograd's own operations."""

from __future__ import annotations

import pytest
import torch

from rayfed.lora.adapter import LowRank
from rayfed.lora.kernel import Piece, change
from rayfed.lora.stacked import Batch, Segment, StackedLinear, StackedLora

OUT, IN, RANK = 7, 5, 3


def frozen_forms():
    g = torch.Generator().manual_seed(1)
    matrix = torch.randn(OUT, IN, generator=g, dtype=torch.float64)
    pair = LowRank(
        torch.randn(OUT, 2, generator=g, dtype=torch.float64), torch.randn(2, IN, generator=g, dtype=torch.float64), 0.7
    )
    return {"nothing": None, "matrix": matrix, "pair": pair}


def written_out(y, x, u, A, B, pieces):
    rows = []
    for p in pieces:
        r = slice(p.start, p.stop)
        total = y[r] + p.scale * (u[r] @ A[p.slot].T @ B[p.slot].T)
        if isinstance(p.frozen, LowRank):
            total = total + x[r] @ p.frozen.dense().T
        elif p.frozen is not None:
            total = total + x[r] @ p.frozen.T
        rows.append(total)
    return torch.cat(rows)


CUTS = {  # where slots 2, 0 and 1 end
    "ragged": (2, 5, 6),
    "all alike": (2, 4, 6),
}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("shape", [(6,), (6, 4)])
@pytest.mark.parametrize("form", ["nothing", "matrix", "pair"])
def test_values_and_all_gradients(shape, form, cuts):
    g = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64, requires_grad=True)

    frozen = frozen_forms()[form]
    a, b, c = CUTS[cuts]
    pieces = [Piece(2, 0, a, 0.5, frozen), Piece(0, a, b, 2.0), Piece(1, b, c, -1.0, frozen)]
    tensors = [draw(*shape, OUT), draw(*shape, IN), draw(*shape, IN), draw(4, RANK, IN), draw(4, OUT, RANK)]
    results = []
    for function in (change, written_out):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y, x, u, A, B = leaves
        out = function(y * 1.0, x, u, A, B, pieces)  # y is what a layer made: no leaf
        (out * torch.arange(out.numel(), dtype=torch.float64).view_as(out).sin()).sum().backward()
        results.append([out.detach()] + [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_x_that_is_its_own_dropped_input_gets_both_gradients():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, IN, generator=g, dtype=torch.float64, requires_grad=True)
    A = torch.randn(1, RANK, IN, generator=g, dtype=torch.float64, requires_grad=True)
    B = torch.randn(1, OUT, RANK, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(OUT, IN, generator=g, dtype=torch.float64)
    pieces = [Piece(0, 0, 4, 0.5, frozen_forms()["matrix"])]
    assert torch.autograd.gradcheck(lambda x, A, B: change(x @ weight.T, x, x, A, B, pieces), (x, A, B))


def test_a_coarser_base_keeps_its_format_and_the_factors_theirs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, IN, generator=g).bfloat16()
    A = torch.randn(1, RANK, IN, generator=g, requires_grad=True)
    B = torch.randn(1, OUT, RANK, generator=g, requires_grad=True)
    pieces = [Piece(0, 0, 4, 0.5, torch.randn(OUT, IN, generator=g))]
    y = torch.zeros(4, OUT, dtype=torch.bfloat16)
    out = change(y.clone(), x, x, A, B, pieces)
    assert out.dtype == torch.bfloat16
    wanted = written_out(y.float(), x.float(), x.float(), A, B, pieces)
    torch.testing.assert_close(out.float(), wanted, rtol=0.02, atol=0.05)
    out.float().sum().backward()
    assert A.grad.dtype == torch.float32
    assert bool(A.grad.any())


def test_a_frozen_change_is_a_changed_weight():
    """A slot over base + F gives what a slot over a base of weight W + F gives."""
    torch.manual_seed(0)
    plain, changed = torch.nn.Linear(IN, OUT), torch.nn.Linear(IN, OUT)
    F = torch.randn(OUT, IN)
    with torch.no_grad():
        changed.weight.copy_(plain.weight + F)
        changed.bias.copy_(plain.bias)
    pair, x, outputs = LowRank(torch.randn(OUT, 2), torch.randn(2, IN), 1.5), torch.randn(3, 4, IN), []
    for layer, frozen in ((plain, F), (changed, None)):
        batch = Batch()
        stacked = StackedLora(layer, batch, slots=2, rank=RANK, dropout=0.0)
        stacked.load(1, pair, frozen)
        with batch.of([Segment(1, 3)]):
            outputs.append(stacked(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def test_fit_makes_room_for_exactly_the_slots_and_the_rank_asked_for():
    stacked = StackedLora(torch.nn.Linear(IN, OUT), Batch(), slots=2, rank=2, dropout=0.0)
    for slots in (2, 3):
        stacked.fit(slots, 4)
        assert stacked.A_KRI.shape == (slots, 4, IN)
        assert stacked.B_KOR.shape == (slots, OUT, 4)
        assert len(stacked.scales) == len(stacked.frozen) == slots
        before = stacked.A_KRI
        stacked.fit(slots, 4)
        assert stacked.A_KRI is before
    head = StackedLinear(torch.nn.Linear(IN, OUT), Batch(), slots=2)
    head.fit(3)
    assert (head.weight_KOI.shape, head.bias_KO.shape) == ((3, OUT, IN), (3, OUT))
