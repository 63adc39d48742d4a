"""A tiny stacked model, tokens made by hand, and packs of clients to train on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CLASSES = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tiny_bert: Path) -> Callable[[], Any]:
    """base() -> a fresh copy of a frozen, mean-pooled `Base`."""
    from rayfed.config.task import Model
    from rayfed.tasks.models.base import load_base

    loaded = load_base(Model(name=str(tiny_bert), pooling="mean"), CLASSES, seed=1)
    return lambda: copy.deepcopy(loaded)


@pytest.fixture(scope="session")
def tokens() -> Any:
    """60 texts of 2 to 12 tokens; the longest belong to the last rows."""
    import numpy as np

    from rayfed.tasks.data.tokens import Tokens

    draw = np.random.default_rng(3)
    lengths = np.sort(draw.integers(2, 13, 60))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = draw.integers(4, 40, offsets[-1]).astype(np.int32)
    return Tokens(ids, offsets, draw.integers(0, CLASSES, 60))
