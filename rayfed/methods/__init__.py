"""Federated LoRA methods, one file a paper. `build` makes one by name; `METHODS` is the list.

A new method is one file and one line in `METHODS`.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rayfed.errors import UserError
from rayfed.methods.base import Method, PackSum, Profile, Start, Trainable, Update


@dataclass(frozen=True)
class MethodInfo:
    """A line of `rayfed methods`: where it is, what it costs. r, in, out: rank and layer sizes; d: densities."""

    home: str  # module:class
    paper: str
    down: str  # entries a client receives per layer and round
    up: str
    says: str


METHODS: dict[str, MethodInfo] = {
    "fed_sb": MethodInfo("rayfed.methods.fed_sb:FedSB", "arXiv 2502.15436", "r^2", "r^2",
                   "frozen factors; average the core between them"),
    "fed_talora": MethodInfo("rayfed.methods.fed_talora:FedTaLoRA", "arXiv 2505.12318", "as fedex_lora", "r (in + out)",
                       "FedEx-LoRA's residual, for sequences of tasks"),
    "fedex_lora": MethodInfo("rayfed.methods.fedex_lora:FedExLoRA", "arXiv 2410.09432", "(K + 1) r (in + out)",
                       "r (in + out)", "average the factors, put what that misses into the base"),
    "fedhl": MethodInfo("rayfed.methods.fedhl:FedHL", "arXiv 2505.18494", "r_k (in + out)", "r_k (in + out)",
                  "full-rank global model; unbiased mean, weights that counter truncation"),
    "fedit": MethodInfo("rayfed.methods.fedit:FedIT", "arXiv 2305.05644", "r (in + out)", "r (in + out)",
                  "average the factors"),
    "fedsa": MethodInfo("rayfed.methods.fedsa:FedSA", "arXiv 2410.01463", "r in", "r in",
                  "average A; B and the head stay with the client"),
    "fedsrd": MethodInfo("rayfed.methods.fedsrd:FedSRD", "arXiv 2510.04601", "density r out or in, missed rounds too",
                   "d_up r (in + out)", "important changes up, one factor's projected change down (our reading)"),
    "fedview": MethodInfo("rayfed.methods.fedview:FedView", "derived here", "r_k (in + out)", "r_k (in + out)",
                    "full-rank global model; corrections with error feedback down"),
    "ffa_lora": MethodInfo("rayfed.methods.ffa_lora:FFALoRA", "arXiv 2403.12313", "r_k out", "r_k out",
                     "A frozen and shared; average B"),
    "flasc": MethodInfo("rayfed.methods.flasc:Flasc", "arXiv 2406.05233", "d_down r (in + out)", "d_up r (in + out)",
                  "sparse down and up, dense local training"),
    "flexlora": MethodInfo("rayfed.methods.flexlora:FlexLoRA", "arXiv 2402.11505", "r_k (in + out)", "r_k (in + out)",
                     "mean of products, redistributed by SVD"),
    "flora": MethodInfo("rayfed.methods.flora:FLoRA", "arXiv 2409.05976", "sum_k r_k (in + out)", "r_k (in + out)",
                  "fresh factors each round; their stack is merged into the base"),
    "florist": MethodInfo("rayfed.methods.florist:FLoRIST", "arXiv 2506.09199", "p (in + out)", "r_k (in + out)",
                    "FLoRA with the stack cut to most of its energy"),
    "hetlora": MethodInfo("rayfed.methods.hetlora:HetLoRA", "arXiv 2401.06432", "r_k (in + out)", "r_k (in + out)",
                    "truncate, zero-pad, weigh by norm, prune ranks"),
    "lora_a2": MethodInfo("rayfed.methods.lora_a2:LoRAA2", "arXiv 2410.22815", "r (in + out)", "d_up r out or in",
                    "alternate A and B; each client sends its best ranks"),
    "lora_fair": MethodInfo("rayfed.methods.lora_fair:LoRAFAIR", "arXiv 2411.14961", "r (in + out)", "r (in + out)",
                      "average the factors, correct B towards the mean of products"),
    "rac_lora": MethodInfo("rayfed.methods.rac_lora:RACLoRA", "arXiv 2410.08305", "r out", "r_k out",
                     "a fresh frozen A each block; average B, merge, redraw"),
    "raflora": MethodInfo("rayfed.methods.raflora:RaFLoRA", "arXiv 2602.13486", "r_k (in + out)", "r_k (in + out)",
                    "FlexLoRA with weights by rank band"),
    "rbla": MethodInfo("rayfed.methods.rbla:RBLA", "arXiv 2408.08699", "r_k (in + out)", "r_k (in + out)",
                 "average every rank index over the clients that own it"),
    "rolora": MethodInfo("rayfed.methods.rolora:RoLoRA", "arXiv 2502.01755", "r (in + out)", "r out or r in",
                   "alternate: B in one round, A in the next"),
    "slora": MethodInfo("rayfed.methods.slora:SLoRA", "arXiv 2308.06522", "rho in out, then r (in + out)",
                  "rho in out, then r (in + out)", "sparse full fine-tuning first, then LoRA from its SVD"),
}  # fmt: skip


def build(name: str, **options: Any) -> Method:
    """The method of that name. UserError for an unknown name or option, or a value the option does not allow."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"method.name: got {name!r}, but {hint}allowed are {', '.join(sorted(METHODS))}")
    module, _, kind = METHODS[name].home.partition(":")
    cls = getattr(import_module(module), kind)
    hints = get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    for option, value in options.items():
        if option not in known:
            raise UserError(f"method.{option}: {name} has no such option; allowed are {', '.join(known) or 'none'}")
        _check(f"method.{option}", value, known[option])
    return cls(**options)


def _check(field: str, value: Any, hint: Any) -> None:
    """Options are literals, numbers, booleans and strings, perhaps null: the types that YAML gives."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise UserError(f"{field}: got {value!r}, but allowed are {', '.join(map(str, choices))}")
        return
    kinds = [kind for kind in get_args(hint) or (hint,) if isinstance(kind, type)]
    # An exact match: True is no 1, and nothing is converted but an integer where a number is meant.
    if type(value) not in kinds and not (float in kinds and type(value) is int):
        named = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UserError(f"{field}: got {'null' if value is None else repr(value)}, but it should be {named}")


__all__ = ["METHODS", "Method", "MethodInfo", "PackSum", "Profile", "Start", "Trainable", "Update", "build"]
