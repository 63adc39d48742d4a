"""Counter-based dropout: as good as independent draws, and a function of client, token and feature alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayfed import seeding
from rayfed.lora.packed.dropout import feature_keys, hash_dropout, token_keys

TOKENS, WIDTH = 2000, 512


def mask(rate, client=5, lengths=(20,) * (TOKENS // 20), layer="layer.0.query", width=WIDTH):
    tokens = torch.from_numpy(token_keys(client, lengths))[:, None]
    return hash_dropout(torch.ones(len(tokens), width), rate, tokens, feature_keys(layer, width)) == 0


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_the_rate_is_met_in_every_row_and_column(rate):
    """Means over tokens and over features have the spread of independent draws."""
    gone = mask(rate, client=seeding.derive_seed(0, "dropout", 1, 2, 3)).double()
    sigma = (rate * (1 - rate)) ** 0.5
    assert abs(float(gone.mean()) - rate) < 5 * sigma / gone.numel() ** 0.5
    for dim, count in ((0, TOKENS), (1, WIDTH)):
        means = gone.mean(dim)
        assert float((means - rate).abs().max()) < 5.5 * sigma / count**0.5
        assert float(means.std()) == pytest.approx(sigma / count**0.5, rel=0.2)


def test_entries_are_uncorrelated():
    """Correlations between features, and between tokens, have the spread of independent draws."""
    gone = mask(0.4).double()
    for samples in (gone, gone.T):
        count = samples.shape[0]
        found = torch.corrcoef(samples.T[:200])
        off = found[~torch.eye(200, dtype=torch.bool)]
        assert float(off.std()) == pytest.approx(count**-0.5, rel=0.1)
        assert float(off.abs().max()) < 6 * count**-0.5


def test_other_entries_are_scaled_and_gradients_follow_the_mask():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    tokens, features = torch.from_numpy(token_keys(3, [40]))[:, None], feature_keys("a", 8)
    y = hash_dropout(x, 0.25, tokens, features)
    gone = mask(0.25, client=3, lengths=[40], layer="a", width=8)
    torch.testing.assert_close(y, torch.where(gone, 0.0, x / 0.75))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(gone, 0.0, torch.full_like(x, 1 / 0.75)))


def test_client_layer_row_and_position_change_the_mask():
    """Independent masks agree in half of the entries at rate 1/2."""
    reference = mask(0.5)
    others = {
        "client": mask(0.5, client=6),
        "layer": mask(0.5, layer="layer.0.value"),
        "row": reference.view(-1, 20, WIDTH).roll(1, 0).flatten(0, 1),
        "place": reference.view(-1, 20, WIDTH).roll(1, 1).flatten(0, 1),
    }
    for name, other in others.items():
        assert float((reference == other).double().mean()) == pytest.approx(0.5, abs=0.005), name


def test_a_token_key_depends_on_row_and_position_alone():
    """Padding and the lengths of other rows do not matter."""
    padded = token_keys(9, [7, 7, 7]).reshape(3, 7)
    flat = np.split(token_keys(9, [7, 2, 5]), [7, 9])
    for row, (whole, own) in enumerate(zip(padded, flat)):
        assert np.array_equal(whole[: len(own)], own), row
    assert len(np.unique(padded)) == padded.size
