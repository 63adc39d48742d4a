"""The list of methods: every line is true, every option comes from YAML and is checked by name."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from rayfed.errors import UserError
from rayfed.methods import METHODS, build
from rayfed.server.optimizers import RATES

YAML = {bool, int, float, str, type(None)}


@pytest.mark.parametrize("name", METHODS)
def test_its_options_are_what_yaml_can_say_and_have_a_docstring(name):
    cls = type(build(name))
    for option in dataclasses.fields(cls):
        hint = get_type_hints(cls)[option.name]
        assert get_origin(hint) is Literal or set(get_args(hint) or (hint,)) <= YAML
        assert build(name, **{option.name: option.default}) == build(name)


@pytest.mark.parametrize("name", METHODS)
def test_its_answers_are_among_those_there_are(name):
    method = build(name)
    assert method.weights in ("uniform", "examples")
    assert method.optimizer in method.optimizers
    assert set(method.optimizers) <= set(RATES)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("fedhl", {"gamma": "2"}, "method.gamma: got '2', but it should be float"),
        ("fedhl", {"gamma": True}, "method.gamma: got True, but it should be float"),
        ("fedhl", {"gamma": -1}, "method.gamma: got -1"),
        ("fedex_lora", {"rank_cap": 2.5}, "method.rank_cap: got 2.5, but it should be int or null"),
        ("flasc", {"mask": "never"}, "method.mask: got 'never', but allowed are refresh, fixed"),
        ("rbla", {"gamma": 1}, "method.gamma: rbla has no such option; allowed are none"),
        ("fedhll", {}, "method.name: got 'fedhll', but did you mean fedhl?"),
    ],
)
def test_a_wrong_option_is_one_line(name, options, says):
    with pytest.raises(UserError) as refused:
        build(name, **options)
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)
