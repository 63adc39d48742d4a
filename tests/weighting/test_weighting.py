"""Weightings by name and by import path."""

from __future__ import annotations

import sys

import pytest

from rayfed.errors import UserError
from rayfed.profiles.profile import Profile
from rayfed.weighting import build

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
    ("name", "says"),
    [
        ("unifrom", "server.weights: got 'unifrom', but did you mean uniform? allowed are examples, uniform"),
        ("rayfed.profiles.profile:Profile", "server.weights: got 'rayfed.profiles.profile:Profile', but that is no"),
    ],
)
def test_a_refusal_is_one_line(name, says):
    with pytest.raises(UserError) as refused:
        build(name)
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)
