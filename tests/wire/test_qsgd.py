"""The stochastic formats: no bias, the paper's bound on the variance, exact sizes, one seed one payload."""

from __future__ import annotations

import math

import pytest
import torch

from rayfed import wire
from rayfed.wire.qsgd import BITS, BUCKET
from rayfed.wire.values import decode_values, encode_values

DRAWS = 400


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def decoded(x: torch.Tensor, format: str, seed: int) -> torch.Tensor:
    return decode_values(encode_values(x, format, seed), x.numel(), format)


@pytest.mark.parametrize("format", BITS)
def test_the_mean_is_exact_and_the_variance_is_bounded(format):
    x, s = torch.cat([normal(BUCKET), normal(44, 1) ** 3]), 2 ** (BITS[format] - 1) - 1
    draws = torch.stack([decoded(x, format, seed) for seed in range(DRAWS)]).double()
    error = draws.mean(0) - x
    grid = torch.cat([own.abs().max().expand(len(own)) / s for own in x.split(BUCKET)])
    share = (x.abs() / grid) % 1
    std = grid.double() * (share * (1 - share)).double().sqrt()
    # 5 standard errors; a value of few expected steps up in all draws has no normal distribution: a step more
    assert (error.abs() <= 5 * std / math.sqrt(DRAWS) + 5 * grid / DRAWS).all()
    assert abs(float(error.sum())) <= 5 * float((std**2).sum() / DRAWS) ** 0.5
    for own, found in zip(x.split(BUCKET), draws.split(BUCKET, 1), strict=True):
        n, squares = len(own), float((found - own).square().sum(1).mean())
        assert squares <= min(n / s**2, math.sqrt(n) / s) * float(own.square().sum())
        assert found.abs().max() == own.abs().max()


@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("count", [0, 1, 7, BUCKET, BUCKET + 1, 3000])
def test_sizes_are_exact_and_a_seed_decides_the_bytes(format, count):
    x = normal(count, 2)
    data = encode_values(x, format, 5)
    assert len(data) == 4 * math.ceil(count / BUCKET) + math.ceil(count * BITS[format] / 8)
    assert data == encode_values(x.clone(), format, 5)
    assert count < BUCKET or data != encode_values(x, format, 6)


def test_what_lies_on_a_level_travels_exactly():
    x = torch.tensor([-3.0, -2, -1, 0, 1, 2, 3])  # 3 bits: 3 levels a side
    assert all(decoded(x, "qsgd3", seed).tolist() == x.tolist() for seed in range(20))
    for tiny in (torch.zeros(5), torch.tensor([1e-45, -1e-45]), torch.tensor([3.4e38, -3.4e38])):
        assert torch.equal(decoded(tiny, "qsgd8", 1), tiny)


def test_sparse_values_are_rounded_among_themselves():
    x, indices = normal(1000, 3), torch.arange(0, 1000, 10)
    payload = wire.decode(wire.encode(x, indices=indices, values="qsgd4", seed=9))
    assert torch.equal(payload.indices, indices)
    assert torch.equal(payload.values, decoded(x[indices], "qsgd4", 9))


def test_refusals():
    with pytest.raises(ValueError, match="seed: qsgd4 rounds at random and needs one"):
        wire.encode(torch.ones(3), values="qsgd4")
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="x: holds NaN or an infinity, which qsgd2 cannot write"):
            wire.encode(torch.tensor([1.0, bad]), values="qsgd2", seed=0)
