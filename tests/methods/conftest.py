"""Fixtures of the tests of methods: a round without an engine, and random adapters."""

from __future__ import annotations

import pytest
from method_rounds import play, random_adapter


@pytest.fixture(name="play")
def _play():
    return play


@pytest.fixture(name="random_adapter")
def _random_adapter():
    return random_adapter
