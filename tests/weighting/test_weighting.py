"""Weightings by name and by import path."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from rayfed.errors import UserError
from rayfed.profiles.profile import Profile
from rayfed.weighting import WEIGHTINGS, build

CLIENT = Profile(3, rank=4, examples=17)


def test_the_packages_own():
    assert build("uniform").weight(CLIENT) == 1.0
    assert build("examples").weight(CLIENT) == 17.0


def test_one_from_outside(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from rayfed.weighting import Weighting\n\n\n"
        "class Ranks(Weighting):\n    def weight(self, client):\n        return client.rank ** 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert build("mine:Ranks").weight(CLIENT) == 2.0
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("chebyshev", {"eps": 1.5}, "weighting.eps: got 1.5, but it should be a number in [0, 1]"),
        ("bound", {"eps": 0.1}, "weighting.eps: bound has no such option; allowed are direction, rho, cap"),
        ("bound", {"direction": "up"}, "weighting.direction: got 'up', but it should be gap or inverse"),
        ("norm", {"rows": 3}, "weighting.rows: norm has no such option; allowed are none"),
    ],
)
def test_options_are_checked(name, options, says):
    with pytest.raises(UserError) as refused:
        build(name, **options)
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_weighting_gives_each_client_a_weight(name):
    """One row, equal rows, losses of 0, and losses that are not finite: weights stay usable."""
    own, clients = build(name), [Profile(i, rank=4, examples=1 + i) for i in range(4)]
    assert all(own.weight(client) > 0 for client in clients)
    if own.needs is None:
        return
    hard = [[1.0], [0.0, 0.0], [math.nan, 2.0], [math.inf, 3.0]]
    losses = [torch.tensor(rows, dtype=torch.float64) for rows in hard]
    norms = torch.tensor([[0.0], [1.0], [2.0], [0.5]])
    for pick in ([0, 1, 2, 3], [1], [1, 1], [2, 3]):
        chosen = [clients[i] for i in pick]
        sent = norms[pick] if own.needs == "change_norms" else torch.stack([own.statistics(losses[i]) for i in pick])
        weights = own.weights(chosen, sent.double())
        assert weights.shape == (len(pick),)
        assert bool((weights >= 0).all())
        assert 0 < float(weights.sum()) < math.inf
        assert all(math.isfinite(value) for value in own.report(sent.double()).values())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("unifrom", "server.weights: got 'unifrom', but did you mean uniform? allowed are bound, chebyshev,"),
        ("chebychev", "server.weights: got 'chebychev', but did you mean chebyshev?"),
        ("rayfed.profiles.profile:Profile", "server.weights: got 'rayfed.profiles.profile:Profile', but that is no"),
    ],
)
def test_a_refusal_is_one_line(name, says):
    with pytest.raises(UserError) as refused:
        build(name)
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)
