"""Ray's label selectors: which nodes satisfy `engine.labels`, by Ray's own rules.

A selector has a condition for each label: `value`, `!value`, `in(value, value)` or `!in(value, value)`. A node without
the label satisfies the conditions with `!` alone. Ray lets a worker whose selector no node satisfies wait for ever, so
that is found before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHOWN = 5  # values of the nodes in a message


def satisfies(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels satisfies every condition."""
    return all(_holds(condition, labels.get(label)) for label, condition in selector.items())


def mistake_in_labels(selector: Mapping[str, str], nodes: Sequence[Mapping[str, str]]) -> str | None:
    """Why no node satisfies the selector, in one line; None where one does. ``nodes``: each node's labels."""
    if any(satisfies(labels, selector) for labels in nodes):
        return None
    for label, condition in selector.items():
        if not any(_holds(condition, labels.get(label)) for labels in nodes):
            values = sorted({labels[label] for labels in nodes if label in labels})
            shown = ", ".join(values[:SHOWN]) + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")
            there = f"Ray's nodes have {shown}" if values else "no node of Ray has this label"
            return f"engine.labels: got {condition!r} for {label}, but {there}"
    return f"engine.labels: got {dict(selector)}, but no node of Ray has all of these labels"


def _holds(condition: str, value: str | None) -> bool:
    """Whether a label's value, None where the node lacks the label, satisfies the condition."""
    choices = condition.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
    return (value in [choice.strip() for choice in choices]) != condition.startswith("!")
