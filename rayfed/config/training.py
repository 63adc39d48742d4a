"""The sections that say how it is trained and measured: client, server, eval."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rayfed.config.types import Betas, NonNegative, Section, Share, section


class Schedule(Section):
    """A learning rate over the rounds, as a factor of `lr`."""

    kind: Literal["constant", "linear", "cosine", "exponential"] = Field(
        "constant", description="Shape after the warm-up: constant, or falling to `final` by the last round."
    )
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="Rounds of linear warm-up from lr / warmup to lr.")
    final: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="Factor reached in the last round.")


class Client(Section):
    """Local training."""

    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="Fresh in every round.")
    lr: PositiveFloat = Field(1e-3, description="Learning rate.")
    schedule: Schedule = section(Schedule, "How lr changes over the rounds.")
    momentum: Share = Field(0.9, description="SGD momentum.")
    betas: Betas = Field((0.9, 0.999), description="AdamW betas.")
    eps: PositiveFloat = Field(1e-8, description="AdamW epsilon.")
    weight_decay: NonNegative = Field(0.0, description="Weight decay (L2 for SGD, decoupled for AdamW).")
    clip_norm: PositiveFloat | None = Field(None, description="Clip each client's gradient to this L2 norm; null: off.")
    batch_size: PositiveInt = Field(16, description="Examples per step.")
    epochs: PositiveInt = Field(1, description="Passes over the client's data a round; ignored when steps is given.")
    steps: PositiveInt | None = Field(None, description="Optimizer steps a round, epochs repeating as needed.")


class Server(Section):
    """The rounds."""

    rounds: PositiveInt = Field(100, description="Communication rounds.")
    cohort: PositiveInt = Field(10, description="Clients per round, drawn without replacement.")
    weights: Literal["auto", "uniform", "examples"] = Field(
        "auto", description="Aggregation weights; auto: what the method's paper uses."
    )
    optimizer: Literal["auto", "fedavg", "sgd", "fedavgm", "fedadam", "adamw"] = Field(
        "auto",
        description="fedavg: add the mean update; sgd: lr times it; fedavgm: with momentum; fedadam: Reddi et al. "
        "2021; adamw: torch AdamW with its defaults, as FLASC's code; auto: adamw for flasc, else fedavg.",
    )
    lr: PositiveFloat | None = Field(
        None, description="Server learning rate; null: 1 for sgd and fedavgm, 1e-3 for fedadam and adamw."
    )
    schedule: Schedule = section(Schedule, "How lr changes over the rounds.")
    momentum: Share = Field(0.9, description="fedavgm momentum.")
    betas: Betas | None = Field(
        None, description="Moment decays; null: (0.9, 0.999) for adamw, (0.9, 0.99) for fedadam."
    )
    eps: PositiveFloat | None = Field(
        None, description="null: 1e-8 for adamw; 1e-3 for fedadam (its tau, the degree of adaptivity)."
    )
    weight_decay: NonNegative | None = Field(None, description="adamw only; null: 0.01, torch's default.")


class EarlyStop(Section):
    """Stop when the validation metric stops improving."""

    patience: PositiveInt = Field(..., description="Evaluations without improvement before the run stops.")
    min_delta: NonNegative = Field(0.0, description="Improvement in accuracy (0 to 1) that counts.")


class Eval(Section):
    """Evaluation of the global model."""

    every: PositiveInt = Field(1, description="Rounds between evaluations; the last round is always evaluated.")
    batch_size: PositiveInt = Field(64, description="Examples per forward pass.")
    masked: bool = Field(
        True, description="Also evaluate the sparse model that clients download, where down.density is below 1."
    )
    tiers: bool = Field(
        False,
        description="Also evaluate what each tier of clients (rank and download density) would receive of the model.",
    )
    clients: bool = Field(
        False,
        description="Also measure the test accuracy that each client gets: of what it would receive of the model (or "
        "has of its own), on test rows weighted like its own classes. Its mean and quantiles over the clients are "
        "recorded. Where every client has a model of its own, that is one evaluation a client.",
    )
    controls: bool = Field(
        False,
        description="At the end, also measure the frozen base with only a head trained: in the same rounds, and "
        "centrally to convergence.",
    )
    diagnostics: bool = Field(
        False,
        description="Also measure, every round, how far the global model is from the mean of the clients' products and "
        "from the product of their mean factors.",
    )
    early_stop: EarlyStop | None = Field(None, description="null: run all rounds.")
