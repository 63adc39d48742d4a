"""Attention in blocks against torch's own function, called for each text by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rayfed.tasks.models import varlen_attention as attention
from rayfed.tasks.models.block_attention import COUNT, WIDTH, block_attention, block_layout
from rayfed.tasks.models.varlen_attention import LONG, PackedSequences, varlen_attention

HEADS, D, SCALE = 4, 8, 0.3
CLIENTS = [[5, 1, 20], [30, 7, WIDTH], [WIDTH + 9], [2], [LONG]]  # shared tiles, full ones, longer texts
CPU = torch.device("cpu")


def draw(clients, dtype=torch.float32):
    """Query, key and value as models make them: views of (1, T, heads * width)."""
    g = torch.Generator().manual_seed(1)
    flat = [torch.randn(1, sum(map(sum, clients)), HEADS * D, generator=g).to(dtype) for _ in range(3)]
    return [x.requires_grad_() for x in flat]


def heads_of(flat):
    return [x.view(1, -1, HEADS, D).transpose(1, 2) for x in flat]


def one_by_one(flat, clients, causal):
    sizes = [length for lengths in clients for length in lengths]
    parts = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=SCALE)
        for q, k, v in zip(*(x.split(sizes, dim=2) for x in heads_of(flat)))
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def in_blocks(flat, clients, causal):
    layout = PackedSequences(clients, CPU).blocks(HEADS, causal, flat[0].dtype)
    return block_attention(*heads_of(flat), layout, SCALE)


def through_transformers(flat, clients, causal):
    layer = nn.Module()
    layer.is_causal = causal
    with PackedSequences(clients, CPU).in_use():
        return varlen_attention(layer, *heads_of(flat), None, scaling=SCALE)[0]


def with_gradients(function, flat, clients, causal):
    y = function(flat, clients, causal)
    way = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, flat, way)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("clients", [CLIENTS, [[1]], [[90], [3, 3]]], ids=["mixed", "one token", "two widths"])
def test_results_and_gradients_are_those_of_every_text_alone(clients, causal):
    flat = draw(clients)
    found, expected = (with_gradients(function, flat, clients, causal) for function in (in_blocks, one_by_one))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("clients", [CLIENTS, [*CLIENTS, [LONG + 1]]], ids=["blocks", "a long text"])
def test_sixteen_bits_are_near_float32(clients, causal):
    """Scores, weights and results are each rounded to 8 bits: a few times 2^-9, relative to the whole."""
    coarse = draw(clients, torch.bfloat16)
    fine = [x.detach().float().requires_grad_() for x in coarse]
    found = with_gradients(through_transformers, coarse, clients, causal)
    for a, b in zip(found, with_gradients(one_by_one, fine, clients, causal), strict=True):
        assert a.dtype == torch.bfloat16
        assert 1e-4 < float((a.float() - b).norm() / b.norm()) < 6 * 2**-9


@pytest.mark.parametrize("clients", [[[3, 2], [4, 1]], [[3, 40], [4, 50]], [[3], [LONG + 1]]], ids=str)
def test_what_diverges_stays_with_its_client(clients):
    flat, own = draw(clients, torch.bfloat16), sum(clients[0])
    with torch.no_grad():
        for x in flat:
            x[:, :own] = torch.nan
    y = through_transformers(flat, clients, False)
    assert not y[:, :own].isfinite().any()
    assert y[:, own:].isfinite().all()
    for grad in torch.autograd.grad(y[:, own:].float().sum(), flat):
        assert grad[:, own:].isfinite().all()


def test_few_shapes_occur():
    """oneDNN makes a kernel for each new shape, which takes longer than the product."""
    shapes = set()
    for texts in range(1, 40):
        layout = block_layout([[20, 5]] * texts, HEADS, False, torch.bfloat16)
        shapes |= {tuple(block.bias.shape) for block in layout.blocks}
    assert shapes == {(n, 1, WIDTH, WIDTH) for n in range(COUNT, 41, COUNT)}


def test_a_batch_is_laid_out_once_and_float32_has_no_blocks(monkeypatch):
    sequences = PackedSequences(CLIENTS, CPU)
    assert sequences.blocks(HEADS, False, torch.bfloat16) is sequences.blocks(HEADS, False, torch.bfloat16)
    monkeypatch.setattr(attention, "block_attention", None)
    through_transformers(draw(CLIENTS), CLIENTS, False)
    with pytest.raises(TypeError):
        through_transformers(draw(CLIENTS, torch.bfloat16), CLIENTS, False)
