"""HetLoRA's penalty against its formula in float64, and against the gradient that it must have."""

from __future__ import annotations

import pytest
import torch

from rayfed.objectives import Plain
from rayfed.objectives.tail_penalty import TailPenalty


def factors(rank=3):
    draw = torch.Generator().manual_seed(0)
    shapes = [((out, rank), (rank, inner)) for out, inner in ((4, 5), (6, 2))]
    return [tuple(torch.randn(*s, generator=draw, requires_grad=True) for s in pair) for pair in shapes]


@pytest.mark.parametrize("start", [1, 2])
def test_it_is_the_norm_of_the_last_ranks(start):
    pairs = factors()
    wanted = sum((B[:, start:].double().norm() * A[start:].double().norm()).item() for B, A in pairs)
    penalty = TailPenalty(0.1, start).penalty(iter(pairs))
    assert penalty.item() == pytest.approx(0.1 * wanted, rel=1e-6)


def test_only_the_tail_gets_a_gradient():
    pairs = factors()
    TailPenalty(0.1, 2).penalty(iter(pairs)).backward()
    for B, A in pairs:
        assert not B.grad[:, :2].any()
        assert not A.grad[:2].any()
        b, a = B.detach()[:, 2], A.detach()[2]
        torch.testing.assert_close(B.grad[:, 2], 0.1 * a.norm() * b / b.norm())


def test_where_nothing_is_penalised_nothing_is_added():
    assert Plain().penalty(iter(factors())) is None
    assert TailPenalty(0.1, 1).penalty(iter(())) is None  # only a head trains
