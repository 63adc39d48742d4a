"""The worked example of docs/write-a-method.md: one file, and it runs like the others."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import rayfed
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import Profile, build

PAGE = Path(__file__).resolve().parents[2] / "docs" / "write-a-method.md"
NAME = "fedmedian:FedMedian"


@pytest.fixture
def fedmedian(tmp_path, monkeypatch):
    """The first code block of the page, in a file of the name that the page gives it."""
    (source,) = re.findall(r"`fedmedian.py`:\n\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "fedmedian.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield build(NAME)
    sys.modules.pop("fedmedian", None)


def test_the_page_names_it_as_it_is_built():
    assert f"method.name={NAME}" in PAGE.read_text(encoding="utf-8")


def test_it_runs_like_the_others(fedmedian, tiny, tmp_path):
    result = rayfed.run(tiny(f"method.name={NAME}", "wire.up.density=0.5"), out=tmp_path / "run")
    assert len({record["state/digest"] for record in result.metrics}) == 2
    assert result.metrics[-1]["test/accuracy"] is not None


def test_it_computes_the_median(fedmedian, play, random_adapter):
    state = fedmedian.init(random_adapter({"layer": (4, 3)}, 2, 1.0, 0), seed=0)

    def train(client, start, adapter):
        step = (-1.0, 0.5, 1e6)[client.client]
        layers = {n: LowRank(p.B + step, p.A + step, p.scale) for n, p in adapter.layers.items()}
        return Adapter(layers, {n: t + step for n, t in adapter.head.items()})

    after, _ = play(fedmedian, state, [Profile(k, 2) for k in range(3)], train)
    torch.testing.assert_close(after.vector, state.vector + 0.5)
