"""A method outside the package: found by its import path, described and checked like the others."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from method_oracles import NON_SQUARE, training

from rayfed.cli.methods import describe
from rayfed.errors import UserError
from rayfed.methods import Profile, build

SOURCE = '''"""Two methods, one of them a plain class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from rayfed.methods import FactorMean, FactorState, fedavg, mean_change


@dataclass(frozen=True)
class Damped(FactorMean):
    """A share of the mean change."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """How much of the mean change counts."""

    paper = "none"
    summary = "a share of the mean"
    optimizers = ("fedavg",)

    def aggregate(self, state, updates, advance=fedavg):
        change = self.share * mean_change(updates, state.layout.size)
        return state.next(vector=advance("vector", state.vector, change))


class Plain(FactorMean):
    """No dataclass; its option has no default."""

    def __init__(self, label: str) -> None:
        self.label = label


NOT_A_METHOD = 3
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "my_methods.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_methods", None)


def test_a_dataclass_is_built_with_its_options(outside, play, random_adapter):
    method = build("my_methods:Damped", share=0.25)
    state = method.init(random_adapter(NON_SQUARE, 2, 1.0, seed=0), seed=0)
    after, (update,) = play(method, state, [Profile(0, 2)], training(1))
    torch.testing.assert_close(after.vector, state.vector + 0.25 * update.change)
    again = method.restore(after.tensors(), after.facts(), after.clients)
    assert torch.equal(again.vector, after.vector)
    assert again.rounds == 1


def test_a_plain_class_is_built_with_its_arguments(outside):
    assert build("my_methods:Plain", label="x").label == "x"


def test_it_is_described(outside):
    text = describe("my_methods:Damped")
    assert "a share of the mean" in text
    assert "method.share = 0.5  [a number in (0, 1]]\n    How much of the mean change counts." in text
    assert "method.label = (no default)  [a string]" in describe("my_methods:Plain")


def test_another_process_unpickles_it(outside):
    """As Ray's workers do: they need the module's folder on PYTHONPATH."""
    code = f"import pickle; print(pickle.loads({pickle.dumps(build('my_methods:Damped'))!r}).share)"
    path = ":".join([str(outside), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout == "0.5\n", done.stderr


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("my_methods:Damped", {"share": 0.0}, "method.share: got 0.0, but it should be a number in (0, 1]"),
        ("my_methods:Damped", {"shar": 0.1}, "method.shar: my_methods:Damped has no such option; did you mean share?"),
        ("my_methods:Plain", {}, "method.label: my_methods:Plain needs this option: a string"),
        ("my_methods:Plain", {"label": 3}, "method.label: got 3, but it should be a string"),
        ("my_methods:Missing", {}, "method.name: got 'my_methods:Missing', but my_methods has no function or class"),
        ("my_methods:NOT_A_METHOD", {}, "method.name: got 'my_methods:NOT_A_METHOD', but that is no subclass of"),
        (
            "no_such_module:Damped",
            {},
            "method.name: got 'no_such_module:Damped', but no_such_module cannot",
        ),
    ],
)
def test_a_refusal_is_one_line(outside, name, options, says):
    with pytest.raises(UserError) as refused:
        build(name, **options)
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)
