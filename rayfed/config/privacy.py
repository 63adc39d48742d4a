"""The section that says what a run guarantees about single clients or rows: privacy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rayfed.config.describe import format_value, mistake
from rayfed.config.types import Clients, NonNegative, Positive, Section

Probability = Annotated[float, Field(gt=0, lt=1)]
KINDS = {  # field of `privacy` -> the kinds that use the field
    "order": ("user",),
    "quantile": ("user",),
    "quantile_lr": ("user",),
    "quantile_noise": ("user",),
    "noise_cohort": ("user",),
    "noise_population": ("user",),
    "mask": ("local",),
}


class Privacy(Section):
    """Differential privacy by clipping and Gaussian noise. docs/privacy.md says what is private, and from whom."""

    kind: Literal["none", "user", "local", "example"] = "none"
    """Whose data the guarantee is about, and who adds noise. `user`: all rows of a client; the server, which is
    trusted, clips each client's update and adds noise to the sum. `local`: all rows of a client; each client clips its
    update and adds noise before it sends. `example`: one row; each client clips the gradient of each row and adds noise
    to their sum in every local step.
    """
    clip_norm: Positive = 1.0
    """C, the largest L2 norm: of a client's update (`user`, `local`) or of a row's gradient (`example`). Larger ones
    are scaled down.
    """
    noise_multiplier: NonNegative | None = None
    """z: the noise on a sum has the standard deviation z C in every coordinate. 0: clipping alone, no guarantee. null:
    the least z with which `server.rounds` rounds stay within `target_epsilon`.
    """
    target_epsilon: Positive | None = None
    """The largest epsilon of the run. With a `noise_multiplier` it is a budget: the run ends before the round that
    would exceed it.
    """
    delta: Annotated[float, Field(ge=1e-30, lt=1)] = 1e-5
    """The delta of the guarantee (epsilon, delta). It should be below 1 / clients, or 1 / rows for `example`."""
    accountant: Literal["auto", "pld", "rdp"] = "auto"
    """How epsilon adds up over rounds. `pld`: privacy loss distributions, the tighter one; `rdp`: Renyi divergences.
    auto: pld, but rdp for cohorts of a fixed size, for which there is no distribution.
    """
    noise: Literal["keyed", "secret"] = "keyed"
    """`keyed`: the noise is a function of `seed`, so that runs repeat; whoever has the seed can subtract it. `secret`:
    it is drawn from the operating system, and no run repeats.
    """
    order: Literal["sparsify_first", "clip_first"] = "sparsify_first"
    """For `user`, where uploads are sparse: the client's top-k before the clipping, as in FLASC, or after it."""
    quantile: Probability | None = None
    """For `user`: the clip norm follows this quantile of the clients' norms, from `clip_norm` on (Andrew et al. 2021).
    null: the clip norm is fixed.
    """
    quantile_lr: Positive = 0.2
    """For `quantile`: the clip norm is multiplied by exp(-quantile_lr (b - quantile)) after each round, where b is the
    noised share of the clients below it.
    """
    quantile_noise: Positive | None = None
    """For `quantile`: standard deviation of the noise on the number of clients below the norm, in clients. null: a
    twentieth of the cohort, or z where that is more. The noise on the updates grows, so that both together cost what z
    says.
    """
    noise_cohort: Clients | None = None
    """For `user`: noise and epsilon as if so many clients took part in a round. So a small simulation has the noise of
    a large deployment; epsilon is the deployment's. null: server.cohort.
    """
    noise_population: Clients | None = None
    """For `user`: the population of that deployment. Needs `noise_cohort`."""
    mask: Literal["noised", "random"] = "noised"
    """For `local`, where uploads are sparse: the entries that a client sends are the largest of its noised update, or
    drawn at random before.
    """

    def mistakes(self) -> Iterator[str]:
        for field in list(type(self).model_fields)[1:]:
            value, kinds = getattr(self, field), KINDS.get(field, ("user", "local", "example"))
            if self.kind not in kinds and value != Privacy.model_fields[field].default:
                belongs = f"that belongs to privacy.kind={' or '.join(kinds)}, and the kind is {self.kind}"
                yield mistake(f"privacy.{field}", value, belongs)
        if self.kind == "none":
            return
        if self.noise_multiplier is None and self.target_epsilon is None:
            one = "then privacy.target_epsilon says how much noise there is; set one of them"
            yield mistake("privacy.noise_multiplier", None, one)
        if self.noise_multiplier == 0 and self.target_epsilon is not None:
            yield mistake("privacy.noise_multiplier", 0, "privacy.target_epsilon needs noise: above 0, or null")
        cohort, population = self.noise_cohort, self.noise_population
        if (cohort is None) != (population is None):
            both = f"noise_population is {format_value(population)}; a deployment has both"
            yield mistake("privacy.noise_cohort", cohort, both)
        if cohort is not None and population is not None and cohort > population:
            yield mistake("privacy.noise_cohort", cohort, f"noise_population is {population}")
        if self.quantile is not None and self.order == "clip_first":
            fixed = "with order=clip_first clients clip at a norm that is fixed; sparsify_first is allowed"
            yield f"privacy.quantile: got a quantile, but {fixed}"

    def depends_on_rounds(self, before: int, after: int) -> str | None:
        calibrated = self.kind != "none" and self.noise_multiplier is None
        return "target_epsilon" if calibrated and before != after else None
