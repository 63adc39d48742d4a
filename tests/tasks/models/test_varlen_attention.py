"""Attention over texts that lie end to end against torch's own, called for each text by itself."""

import pytest
import torch
from torch import nn

from rayfed.tasks.models import varlen_attention as attention
from rayfed.tasks.models.varlen_attention import LONG, TILE, PackedSequences, varlen_attention

SHORT = [[5, 1, 40], [30, 7, TILE], [TILE + 9], [2]]  # texts of four clients: shared tiles, full ones, a long one
CPU = torch.device("cpu")


def draw(clients, heads=4, shared=1, width=8):
    """Query, key and value as models make them: views of (1, T, heads * width)."""
    g = torch.Generator().manual_seed(1)
    T = sum(map(sum, clients))
    sizes = heads, heads // shared, heads // shared
    flat = [torch.randn(1, T, n * width, generator=g, requires_grad=True) for n in sizes]
    return flat, [x.view(1, T, n, width).transpose(1, 2) for x, n in zip(flat, sizes)]


def one_by_one(query, key, value, clients, causal, scale):
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    sizes = [length for lengths in clients for length in lengths]
    parts = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        for q, k, v in zip(*(x.split(sizes, dim=2) for x in (query, key, value)))
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def by_attend(query, key, value, clients, causal, scale):
    layer = nn.Module()
    layer.is_causal = causal
    with PackedSequences(clients, CPU).in_use():
        return varlen_attention(layer, query, key, value, None, scaling=scale)[0]


def by_grid(query, key, value, clients, causal, scale):
    return attention._padded_attention(query, key, value, PackedSequences(clients, CPU), causal, scale)


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("clients", [SHORT, [[3], [LONG + 30, 4, 70, 5]], [[1]], [[90]]], ids=str)
@pytest.mark.parametrize("ours", [by_attend, by_grid])
def test_results_and_gradients_are_those_of_every_text_alone(ours, clients, causal, shared):
    flat, heads = draw(clients, shared=shared)
    expected = one_by_one(*heads, clients, causal, 0.3)
    found = ours(*heads, clients, causal, 0.3)
    assert found.shape == expected.shape == (1, sum(map(sum, clients)), 4, 8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    way = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    for a, b in zip(torch.autograd.grad(found, flat, way), torch.autograd.grad(expected, flat, way)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clients", [[[3, 2], [4, 1]], [[3, LONG + 1], [4, 1]]], ids=str)
@pytest.mark.parametrize("ours", [by_attend, by_grid])
def test_what_diverges_stays_with_its_client(ours, clients):
    flat, heads = draw(clients)
    own = sum(clients[0])
    with torch.no_grad():
        for x in flat:
            x[:, :own] = torch.nan
    found = ours(*heads, clients, False, 0.3)
    assert not found[:, :own].isfinite().any()
    assert found[:, own:].isfinite().all()
    for grad in torch.autograd.grad(found[:, own:].sum(), flat):
        assert grad[:, own:].isfinite().all()


def test_tiles_are_neighbours_of_one_client_and_no_larger_than_need_be():
    assert PackedSequences(SHORT, CPU).tiles == [[5, 1, 40], [30, 7], [TILE], [TILE + 9], [2]]
    assert PackedSequences([[1, 200, 1, 1]], CPU).tiles == [[1], [200], [1, 1]]
    laid = PackedSequences(SHORT, CPU)
    assert laid.masks(False, torch.float32) is laid.masks(False, torch.float32)  # once a batch, not once a layer
    assert [mask is None for mask in laid.masks(False, torch.float32)] == [False, False, True, True, True]


def test_the_scale_is_the_usual_one_where_none_is_given():
    _, heads = draw([[4, 5]])
    torch.testing.assert_close(
        by_attend(*heads, [[4, 5]], False, None), one_by_one(*heads, [[4, 5]], False, 8**-0.5), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "named",
    [
        {"attention_mask": torch.zeros(1, 1, 9, 9)},
        {"dropout": 0.1},
        {"softcap": 50.0},
        {"position_bias": torch.zeros(1)},
        {"sliding_window": 4},
    ],
    ids=lambda named: next(iter(named)),
)
def test_attention_of_another_kind_is_refused(named):
    _, heads = draw([[4, 5]])
    with PackedSequences([[4, 5]], CPU).in_use():
        varlen_attention(
            nn.Module(), *heads, **{"attention_mask": None, "sliding_window": 5}
        )  # reaches as far as any text
        with pytest.raises(ValueError, match=r"supports no other mask|longer than the window"):
            varlen_attention(nn.Module(), *heads, **{"attention_mask": None, **named})


def test_only_the_row_in_use_is_attended():
    _, heads = draw([[4, 5]])
    with pytest.raises(ValueError, match="in use"):
        varlen_attention(nn.Module(), *heads, None)
    with PackedSequences([[4, 6]], CPU).in_use(), pytest.raises(ValueError, match="in use"):
        varlen_attention(nn.Module(), *heads, None)
