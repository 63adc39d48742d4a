"""The README's example of a new method: one file, one line, and it runs like the others."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import rayfed
from rayfed.methods import METHODS, MethodInfo, build

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def fedmedian(monkeypatch):
    """The README's two code blocks, put where they say they belong."""
    section = README.read_text(encoding="utf-8").partition("### Add a method")[2]
    source, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:2]
    module = types.ModuleType("rayfed.methods.fedmedian")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "fedmedian.py", "exec"), module.__dict__)
    registered = eval("{" + line + "}", {"MethodInfo": MethodInfo})
    for name, card in registered.items():
        monkeypatch.setitem(METHODS, name, card)
    return build(*registered)


def test_it_runs_like_the_others(fedmedian, tiny, tmp_path):
    result = rayfed.run(tiny("method.name=fedmedian", "wire.up.density=0.5"), out=tmp_path / "run")
    assert len({record["state/digest"] for record in result.metrics}) == 2
    assert result.metrics[-1]["test/accuracy_masked"] is None


def test_it_computes_the_median(fedmedian, play, random_adapter):
    from rayfed.lora.adapter import Adapter, LowRank
    from rayfed.methods.base import Profile

    shapes = {"layer": (4, 3)}
    state = fedmedian.init(random_adapter(shapes, 2, 1.0, 0), seed=0)

    def train(client, start, adapter):
        step = (-1.0, 0.5, 1e6)[client.client]
        layers = {n: LowRank(p.B + step, p.A + step, p.scale) for n, p in adapter.layers.items()}
        return Adapter(layers, {n: t + step for n, t in adapter.head.items()})

    after, _ = play(fedmedian, state, [Profile(k, 2) for k in range(3)], train)
    torch.testing.assert_close(after.vector, state.vector + 0.5)
