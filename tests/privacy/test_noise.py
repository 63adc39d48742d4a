"""The noise has the standard deviation that it claims, and is keyed or secret as asked."""

from __future__ import annotations

import pytest
import torch

from rayfed.privacy.noise import gaussian


def test_its_variance_is_right_to_a_percent():
    """400,000 draws: sigma is off by 0.11 % in the mean, so 3 % are 27 standard errors, and 1 % are 9."""
    noise = gaussian(400_000, 3.0, "keyed", 0, "test", 1)
    assert float(noise.std()) == pytest.approx(3.0, rel=0.01)
    assert abs(float(noise.mean())) < 5 * 3.0 / 400_000**0.5
    assert float((noise.abs() < 3.0).double().mean()) == pytest.approx(0.6827, abs=0.005)


def test_keyed_noise_repeats_and_secret_noise_does_not():
    assert torch.equal(gaussian(9, 1.0, "keyed", 5, "a", 1), gaussian(9, 1.0, "keyed", 5, "a", 1))
    for other in ((6, "a", 1), (5, "b", 1), (5, "a", 2)):
        assert not torch.equal(gaussian(9, 1.0, "keyed", 5, "a", 1), gaussian(9, 1.0, "keyed", *other))
    assert not torch.equal(gaussian(9, 1.0, "secret", 5, "a", 1), gaussian(9, 1.0, "secret", 5, "a", 1))


def test_without_a_deviation_there_is_none():
    assert not gaussian(9, 0.0, "secret", 5, "a", 1).any()
