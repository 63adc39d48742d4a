"""The methods as a list: what each says of itself is true, and every option is documented and checked by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

import rayfed.methods
from rayfed.cli.methods import describe, describe_all
from rayfed.config.options import options_of
from rayfed.errors import UserError
from rayfed.methods import METHODS, build, method_class
from rayfed.methods.base import Source
from rayfed.server.optimizers import RATES
from rayfed.weighting import build as build_weighting

YAML = {bool, int, float, str, type(None)}
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## Sources")[2]


def test_every_file_without_an_underscore_is_a_method():
    files = {path.stem for path in Path(rayfed.methods.__path__[0]).glob("[!_]*.py")} - {"base"}
    assert set(METHODS) == files


@pytest.mark.parametrize("name", METHODS)
def test_it_says_what_it_is(name):
    method = build(name)
    build_weighting(method.weights)
    assert method.optimizer in method.optimizers
    assert set(method.optimizers) <= set(RATES)
    assert method.source in get_args(Source)
    assert method.paper.startswith("arXiv ") or method.source == "ours"
    assert 0 < len(method.summary) <= 80
    listed = describe_all()
    assert f"\n{name} " in f"\n{listed}"
    for fact in (method.paper, method.summary, method.traffic_down, method.traffic_up, method.source):
        assert fact in listed
        assert fact in describe(name)
    assert f"\nSource: {method.source}; deviates: " in inspect.getmodule(type(method)).__doc__


@pytest.mark.parametrize("name", METHODS)
def test_it_has_a_row_in_the_table_of_sources(name):
    cls = method_class(name)
    (row,) = [line for line in TABLE.splitlines() if line.startswith(f"| `{name}` |")]
    assert cls.paper.removeprefix("arXiv ") in row
    assert f"| {cls.source} |" in row


@pytest.mark.parametrize("name", METHODS)
def test_its_options_are_of_yamls_types_and_have_a_docstring(name):
    cls, text = method_class(name), describe(name)
    hints = get_type_hints(cls)
    for option, found in options_of(cls).items():
        hint = hints[option]
        assert get_origin(hint) is Literal or set(get_args(hint) or (hint,)) <= YAML
        assert build(name, **{option: found.default}) == build(name)
        (line,) = [i for i, line in enumerate(text.splitlines()) if line.startswith(f"method.{option} = ")]
        assert text.splitlines()[line + 1].startswith("    ")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("fedhl", {"gamma": "2"}, "method.gamma: got '2', but it should be a number of at least 0"),
        ("fedhl", {"gamma": True}, "method.gamma: got True, but it should be a number of at least 0"),
        ("fedhl", {"gamma": float("nan")}, "method.gamma: got nan, but it should be a number of at least 0"),
        ("fedhl", {"gama": 1}, "method.gama: fedhl has no such option; did you mean gamma? allowed are gamma, eps"),
        (
            "fedex_lora",
            {"rank_cap": 2.5},
            "method.rank_cap: got 2.5, but it should be an integer above 0 or null",
        ),
        ("flasc", {"mask": "never"}, "method.mask: got 'never', but it should be refresh or fixed"),
        ("rbla", {"gamma": 1}, "method.gamma: rbla has no such option; allowed are none"),
        ("fedhll", {}, "method.name: got 'fedhll', but did you mean fedhl?"),
    ],
)
def test_a_wrong_option_is_one_line(name, options, says):
    with pytest.raises(UserError) as refused:
        build(name, **options)
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("fedex_lora", "rank_cap", (0, -1, True)),
        ("fedhl", "gamma", (-1.0, float("inf"))),
        ("fedhl", "eps", (0.0,)),
        ("fedsrd", "density", (0.0, 1.5, float("nan"))),
        ("fedview", "floor", (-1.0,)),
        ("florist", "tau", (0.0, 1.01, float("nan"))),
        ("hetlora", "gamma", (0.0, 1.0)),
        ("hetlora", "regularizer", (-1.0,)),
        ("lora_a2", "rate_B", (0.0, float("inf"))),
        ("lora_fair", "lam", (-1.0,)),
        ("rac_lora", "block_rounds", (0,)),
        ("slora", "rounds_sparse", (0,)),
        ("slora", "rho", (0.0, 1.5)),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_class_too(name, option, values):
    for value in values:
        with pytest.raises(UserError, match=f"^method.{option}: got"):
            method_class(name)(**{option: value})
