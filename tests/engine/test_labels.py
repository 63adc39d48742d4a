"""Label selectors by Ray's rules, as Ray 2.60 placed bundles on a node with `zone: a` and one without labels."""

from __future__ import annotations

import pytest

from rayfed.config import validate
from rayfed.engine.labels import mistake_in_labels, satisfies
from rayfed.errors import UserError


@pytest.mark.parametrize(
    ("condition", "labelled", "bare"),
    [
        ("a", True, False), ("b", False, False), ("!a", False, True), ("!b", True, True), ("in(a,b)", True, False),
        ("in(b, a)", True, False), ("in(b)", False, False), ("!in(a,b)", False, True), ("!in(c)", True, True),
    ],
)  # fmt: skip
def test_which_nodes_satisfy_a_condition(condition: str, labelled: bool, bare: bool) -> None:
    assert satisfies({"zone": "a", "ray.io/node-id": "1"}, {"zone": condition}) == labelled
    assert satisfies({"ray.io/node-id": "2"}, {"zone": condition}) == bare


@pytest.mark.parametrize(
    ("selector", "line"),
    [
        ({}, None),
        ({"gpu": "H200", "zone": "!a"}, None),
        ({"gpu": "L4"}, "engine.labels: got 'L4' for gpu, but Ray's nodes have A100, H200"),
        ({"zone": "a", "disk": "fast"}, "engine.labels: got 'fast' for disk, but no node of Ray has this label"),
        (
            {"gpu": "H200", "zone": "a"},
            "engine.labels: got {'gpu': 'H200', 'zone': 'a'}, but no node of Ray has all of these labels",
        ),
    ],
)
def test_labels_that_no_node_has_are_named_with_what_nodes_have(selector: dict[str, str], line: str | None) -> None:
    nodes = [{"gpu": "H200"}, {"gpu": "A100", "zone": "a"}, {}]
    assert mistake_in_labels(selector, nodes) == line


def test_many_values_are_not_all_named() -> None:
    nodes = [{"id": f"{i}"} for i in range(9)]
    mistake = mistake_in_labels({"id": "x"}, nodes)
    assert mistake == "engine.labels: got 'x' for id, but Ray's nodes have 0, 1, 2, 3, 4 and 4 more"


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ({"-zone": "a"}, "'-zone' is no name of a label, such as ray.io/accelerator-type"),
        ({"zone": "in()"}, "zone allows a value, !value, in(value, value) and !in(value, value)"),
        ({"zone": ""}, "zone allows a value, !value, in(value, value) and !in(value, value)"),
        ({"zone": 1}, "it should be a mapping of up to 20 keys, from strings to strings or null"),
    ],
)
def test_labels_that_ray_would_refuse_are_refused_with_the_settings(labels: dict[str, object], why: str) -> None:
    with pytest.raises(UserError) as refusal:
        validate({"data": {"source": "lowrank"}, "engine": {"labels": labels}})
    assert str(refusal.value) == f"engine.labels: got {labels}, but {why}"
