"""Federated LoRA methods, one file a paper. A method's name is the name of its file.

`METHODS` lists the names. `build` makes a method by its name, or by an import path for a class outside the package.
Files whose names start with an underscore hold what several methods share.
"""

from __future__ import annotations

from typing import Any

from rayfed.config.options import make_member
from rayfed.methods._factor_mean import FactorMean
from rayfed.methods._layers import LayerMethod
from rayfed.methods._means import (
    Advance,
    ChangeMean,
    HeadMean,
    ProductMean,
    change_norm,
    fedavg,
    mean_change,
    product_change,
)
from rayfed.methods._messages import BaseChange, PackSum, Sparse, Start, Trainable, Update, Updates, matrix, merged
from rayfed.methods._state import Change, FactorState, LayerState, State
from rayfed.methods.base import ANY_OPTIMIZER, Method, Profile, Source
from rayfed.plugins import member_class, member_names

METHODS = member_names("rayfed.methods")
ALIASES = {"fed_talora": "fedex_lora"}
"""Names of papers' methods of which no part of a round is known to differ from another method: that method's name."""


def method_class(name: str) -> type[Method]:
    """The class of the method of that name, which may be an alias, or at that import path. UserError: there is none."""
    return member_class("rayfed.methods", ALIASES.get(name, name), Method, "method.name")


def with_mixed_ranks() -> list[str]:
    """The names of the methods whose clients may have different ranks."""
    return [name for name in METHODS if method_class(name).mixed_ranks]


def with_adapters() -> list[str]:
    """The names of the methods whose runs may start from a given adapter."""
    return [name for name in METHODS if not method_class(name).refuses_adapter]


def build(name: str, **options: Any) -> Method:
    """The method of that name, or at the import path `package.module:Class`, with these options.

    UserError for an unknown name or option, for a value that the option does not allow, and for an option that is
    missing.
    """
    return make_member(method_class(name), "method", name, options)


__all__ = [
    "ALIASES", "ANY_OPTIMIZER", "METHODS", "Advance", "BaseChange", "Change", "ChangeMean", "FactorMean", "FactorState",
    "HeadMean", "LayerMethod", "LayerState", "Method", "PackSum", "ProductMean", "Profile", "Source", "Sparse", "Start",
    "State", "Trainable", "Update", "Updates", "build", "change_norm", "fedavg", "matrix", "mean_change", "merged",
    "method_class", "product_change", "with_adapters", "with_mixed_ranks",
]  # fmt: skip
