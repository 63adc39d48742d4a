"""Every setting by its dotted name, and settings of which one is changed, whatever the schema says to that."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from rayfed.config import Experiment, validate
from rayfed.config.describe import iter_fields

SECTIONS = ("eval.early_stop", "partition.sequence")  # that may be null: their fields are in the list
FIELDS = {name: field for name, field in iter_fields(Experiment) if name not in SECTIONS}
FULL = validate(  # with every section
    {
        "eval": {"early_stop": {"patience": 3}},
        "partition": {"sequence": {"experiences": 2}},
        "client": {"on_divergence": "drop"},
        "topology": {"kind": "graph", "graph": "erdos_renyi", "edge_probability": 0.5},
        "privacy": {"kind": "user", "noise_multiplier": 1.0, "target_epsilon": 2.0},
        "channel": {"kind": "over_the_air", "noise": 0.5},
    }
)


def changed(name: str) -> Experiment:
    """`FULL` with another value of one setting, not validated: most changes are not allowed alone."""
    experiment: Experiment = _with(FULL, name, _other(FIELDS[name].annotation, _get(FULL, name)))
    assert _get(experiment, name) != _get(FULL, name)
    return experiment


def _get(experiment: BaseModel, name: str) -> Any:
    for part in name.split("."):
        experiment = getattr(experiment, part)
    return experiment


def _with(model: Any, name: str, value: Any) -> Any:
    """A copy with one setting changed, and no validation: most changes are not allowed alone."""
    head, _, rest = name.partition(".")
    return model.model_copy(update={head: _with(getattr(model, head), rest, value) if rest else value})


def _other(kind: Any, value: Any = None) -> Any:
    """A value of the kind that is neither ``value`` nor any field's default."""
    inside = get_args(kind)
    if get_origin(kind) is Literal:
        return next(choice for choice in inside if choice != value)
    if get_origin(kind) is tuple:
        return (_other(inside[0]),) if inside[-1] is Ellipsis else tuple(_other(item) for item in inside)
    if get_origin(kind) is dict:
        return {_other(inside[0]): _other(inside[1])}
    if inside:  # Annotated, or a union with null
        return _other(inside[0], value)
    return not value if kind is bool else {int: 7, float: 0.7, str: "other"}[kind]
