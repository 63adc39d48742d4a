"""Differential privacy: what is clipped, where noise is added, what that guarantees. One file a mechanism.

`check` refuses what does not go together, from the settings alone. `build` makes the mechanism of a run, with its noise
calibrated and the rounds that the budget allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rayfed.config.execution import Engine
from rayfed.config.privacy import Privacy as Settings
from rayfed.config.task import Model
from rayfed.config.training import Client, Server
from rayfed.errors import UserError, allowed
from rayfed.methods import METHODS, Method, Profile
from rayfed.methods import build as build_method
from rayfed.methods._own_parts import OwnParts
from rayfed.methods.hetlora import HetLoRA
from rayfed.privacy.accounting import Sampling, check_installed, guarantee
from rayfed.privacy.base import Privacy
from rayfed.privacy.example import ExampleLevel, worst_clients
from rayfed.privacy.local import Local, most_participations
from rayfed.privacy.user import Release, UserLevel


def check(
    settings: Settings, name: str, method: Method, server: Server, client: Client, model: Model, engine: Engine
) -> None:
    """UserError where ``settings`` do not go with the method of that name, or with the other sections."""
    if settings.kind == "none":
        return
    if server.weights not in ("auto", "uniform"):
        raise allowed(
            "server.weights", server.weights, "with privacy a client's weight may not depend on its data; uniform is "
            "allowed, and what auto means then",
        )  # fmt: skip
    if server.max_mb is not None:
        what = "with privacy the sizes of messages are not released and may not decide when a run ends; null is allowed"
        raise allowed("server.max_mb", server.max_mb, what)
    if settings.kind != "example" and client.on_divergence == "fail":
        raise allowed(
            "client.on_divergence", client.on_divergence, "with privacy one client's training may not decide whether "
            "the run goes on; drop, which counts its change as zero, and clip are allowed",
        )  # fmt: skip
    if settings.noise_multiplier != 0:
        check_installed()
    if settings.kind == "user":
        _check_sum(settings, name, method)
        guarantee(settings.delta, settings.accountant, server.sampling)
    elif isinstance(method, OwnParts):
        raise allowed("method.name", name, "the model that it exports has a mean of parts that clients never send")
    if settings.kind == "example":
        _check_rows(method, server, model, engine)


def build(
    settings: Settings, server: Server, client: Client, profile: Profile, seed: int, population: int,
    cohorts: Callable[[int], Sequence[int]], sizes: Sequence[int],
) -> Privacy | None:  # fmt: skip
    """The mechanism of a run; None for the kind none.

    Args:
        profile: that of a client of the server's own rank.
        population: the number of clients of which cohorts are drawn.
        cohorts: the clients of round t, from 0.
        sizes: each client's number of rows.

    UserError where no noise reaches the target, or one round alone exceeds the budget.
    """
    if settings.kind == "none":
        return None
    samplings: dict[str, Sampling] = {"user": server.sampling, "local": "all", "example": "poisson"}
    sampling = samplings[settings.kind]
    rounds, own = server.rounds, guarantee(settings.delta, settings.accountant, sampling)
    mechanism: Privacy
    if settings.kind == "user":
        mechanism = UserLevel(settings, seed, own, 1.0, rounds, sampling, server.cohort, population, profile)
    elif settings.kind == "example":
        mechanism = ExampleLevel(settings, seed, own, 1.0, rounds, worst_clients(cohorts, sizes, client, rounds))
    else:
        mechanism = Local(settings, seed, own, 1.0, rounds, most_participations(cohorts, rounds))
    mechanism = _with_noise(mechanism)
    mechanism.check()
    return _within_budget(mechanism)


def private_methods() -> list[str]:
    """The names of the methods that user-level privacy takes, at the defaults of their options."""
    return [name for name in METHODS if build_method(name).summed is not None]


def _check_sum(settings: Settings, name: str, method: Method) -> None:
    if method.summed is None:
        others = ", ".join([*private_methods(), "and fedhl with method.gamma=0"])
        raise UserError(
            f"privacy.kind: got 'user', which releases one sum of clipped updates, but {name} cannot use it: "
            f"{method.refuses_privacy}; it is taken by {others}"
        )
    if settings.order == "clip_first" and method.summed == "products":
        raise allowed(
            "privacy.order", settings.order, f"{name} sums products of factors, which a client's top-k does not see; "
            "sparsify_first is allowed",
        )  # fmt: skip


def _check_rows(method: Method, server: Server, model: Model, engine: Engine) -> None:
    if isinstance(method, HetLoRA) and method.regularizer:
        raise allowed("method.regularizer", method.regularizer, "it is no loss of a row; with privacy 0 is allowed")
    if server.empty_clients:
        raise UserError("server.empty_clients: got true, but a client without rows adds no noise; false is allowed")
    if model.dtype != "float32":
        raise allowed(
            "model.dtype", model.dtype, "rounding would make the clipped gradients longer; float32 is allowed"
        )
    if engine.gradient_checkpointing:
        raise allowed(
            "engine.gradient_checkpointing", True, "the norms of rows are taken in one pass; false is allowed"
        )


def _with_noise(mechanism: Privacy) -> Privacy:
    """The mechanism with the noise that is given, or that its target asks for."""
    z, target = mechanism.settings.noise_multiplier, mechanism.settings.target_epsilon
    if z is None:
        assert target is not None
        z = mechanism.guarantee.noise(mechanism.uses(mechanism.rounds), target)
    return replace(mechanism, noise_multiplier=z)


def _within_budget(mechanism: Privacy) -> Privacy:
    """The mechanism with the rounds that the budget allows. UserError where it allows none."""
    target, z = mechanism.settings.target_epsilon, mechanism.settings.noise_multiplier
    if target is None or z is None:  # no budget, or the noise was made for it
        return mechanism
    rounds = mechanism.guarantee.rounds(mechanism.uses, z, target, mechanism.rounds)
    if not rounds:
        first = mechanism.guarantee.epsilon(mechanism.uses(1), z)
        raise allowed("privacy.target_epsilon", target, f"with this noise one round alone takes epsilon {first:.3g}")
    return replace(mechanism, rounds=rounds)


__all__ = ["ExampleLevel", "Local", "Privacy", "Release", "UserLevel", "build", "check", "private_methods"]
