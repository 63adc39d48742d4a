"""The sections that say how a run trains and measures: client, objective, server, eval."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from rayfed.config.describe import mistake
from rayfed.config.types import (
    Batch,
    Betas,
    Clients,
    DecidesNothing,
    Live,
    NonNegative,
    OwnClass,
    Positive,
    Rounds,
    Section,
    Share,
    Text,
    section,
)  # fmt: skip


class Schedule(Section):
    """A factor on the learning rate `lr`, round by round."""

    kind: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    """Shape after the warm-up: constant, or a fall to `final` in the last round."""
    warmup: Annotated[int, Field(ge=0, le=999_999)] = 0
    """Rounds of linear warm-up, from lr / warmup to lr."""
    final: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor on lr in the last round."""

    def depends_on_rounds(self, before: int, after: int) -> str | None:
        return None if self.kind == "constant" else "kind"  # the warm-up has a length of its own


class Client(Section):
    """Local training."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer. Its state is new in every round."""
    lr: Live[Positive] = 1e-3
    """Learning rate."""
    schedule: Schedule = section(Schedule)
    momentum: Live[Share] = 0.9
    """SGD momentum."""
    betas: Betas = (0.9, 0.999)
    """AdamW betas."""
    eps: Live[Positive] = 1e-8
    """AdamW epsilon."""
    weight_decay: Live[NonNegative] = 0.0
    """Weight decay: L2 for SGD, decoupled for AdamW."""
    clip_norm: Live[Positive | None] = None
    """Largest L2 norm of a client's gradient; larger ones are scaled down. null: no limit."""
    batch_size: Live[Batch] = 16
    """Examples per step."""
    epochs: Live[Annotated[int, Field(ge=1, le=10_000)]] = 1
    """Passes over the client's data per round. `steps` replaces it."""
    steps: Live[Annotated[int, Field(ge=1, le=100_000)] | None] = None
    """Optimizer steps per round; the data repeat as needed. null: `epochs` counts."""
    label_smoothing: Share = 0.0
    """For classification with one class a row: in training, the share of the target that is spread evenly over all
    classes. Evaluation has the plain cross-entropy.
    """
    class_weights: Literal["balanced"] | None = None
    """For classification with one class a row: the weights of the classes in the training loss. `balanced`: in inverse
    proportion to the client's own rows of the class, which stay at the client. null: all rows weigh alike.
    """
    max_change: Live[Positive | None] = 1e6
    """A client diverged if its change in a round has a larger L2 norm, over all entries of its adapter and head, or
    values that are not finite. null: only if there are values that are not finite. The default is above all that
    training gives that still learns, and below what would ruin the global model.
    """
    on_divergence: DecidesNothing[Literal["fail", "drop", "clip"]] = "fail"
    """What happens if a client diverged. `fail`: the run ends. `drop`: the client sends nothing, has no weight in the
    round, and stays as it was before; if all clients are dropped, the global state stays as it was. `clip`: a change
    that is too large is scaled down to `max_change`; one that is not finite is dropped. May be changed on --resume, and
    is not in the digest: without a client that diverged, a round is the same under all three. The metric
    `clients/diverged` counts these clients.
    """

    @property
    def changes_loss(self) -> bool:
        """Whether clients train with another loss than the plain cross-entropy of classes."""
        return self.label_smoothing > 0 or self.class_weights is not None

    def mistakes(self) -> Iterator[str]:
        if self.on_divergence == "clip" and self.max_change is None:
            yield mistake("client.on_divergence", "clip", "client.max_change=null says no limit; set a number")


class Objective(Section):
    """What clients minimise: the task's loss alone, that loss and another term, or another loss."""

    model_config = ConfigDict(extra="allow")
    name: Text = "plain"
    """`plain`: the task's loss alone; `fedprox`, `fedlc`, `fedga`, `fedbc`, `scaffold`, `fedglomo`, `fedimpro`,
    `fedhpl`, `tail_penalty`: see docs/objectives.md; or your own, `package.module:Class`. All other keys are options of
    the objective.
    """

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Server(Section):
    """The rounds."""

    rounds: Rounds = 100
    """Communication rounds."""
    cohort: Clients = 10
    """Clients per round, drawn without replacement; with `sampling: poisson` their mean number."""
    max_mb: Positive | None = None
    """The run ends after the round in which all messages so far, both ways, come to this many MB (10^6 bytes) or more.
    That round is evaluated. null: no limit.
    """
    sampling: Literal["fixed", "poisson"] = "fixed"
    """How a cohort is drawn. `fixed`: it always has `cohort` clients. `poisson`: each client takes part by a draw of
    its own, with the same probability; a cohort may be larger, smaller or empty.
    """
    empty_clients: bool = False
    """Also draw clients without training rows, as FLASC's code does. They receive and send as all others do, change
    nothing, and count in the mean: so the weights must be uniform. false: they are never drawn.
    """
    weights: Literal["auto", "uniform", "examples", "norm", "bound", "chebyshev"] | OwnClass = "auto"
    """Aggregation weights of the clients; auto: as in the method's paper. `norm`: as much as a client moved; `bound`:
    by a bound on its loss; `chebyshev`: more for clients with a large loss; or your own, `package.module:Class`. See
    docs/weights-and-channels.md. The section `weighting` has their options.
    """
    optimizer: Literal["auto", "fedavg", "sgd", "fedavgm", "fedadam", "adamw"] = "auto"
    """fedavg: add the mean update; sgd: add lr times the mean update; fedavgm: sgd with momentum; fedadam: Reddi et al.
    2021; adamw: torch AdamW, as in FLASC's code; auto: adamw for flasc, else fedavg.
    """
    lr: Live[Positive | None] = None
    """Server learning rate; null: 1 for sgd and fedavgm, 1e-3 for fedadam and adamw."""
    schedule: Schedule = section(Schedule)
    momentum: Live[Share] = 0.9
    """Momentum of fedavgm."""
    betas: Betas | None = None
    """Decay of the two moments; null: (0.9, 0.999) for adamw, (0.9, 0.99) for fedadam."""
    eps: Positive | None = None
    """Epsilon of adamw (null: 1e-8), or tau, the degree of adaptivity, of fedadam (null: 1e-3)."""
    weight_decay: Live[NonNegative | None] = None
    """Decoupled weight decay, for adamw only; null: 0.01, torch's default."""

    def spent(self, total: int) -> bool:
        """Whether ``total`` bytes reach `max_mb`."""
        return self.max_mb is not None and total >= self.max_mb * 1e6


class Weighting(Section):
    """The options of the weighting that `server.weights` names, such as `weighting.eps`. docs/weights-and-channels.md
    lists them."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EarlyStop(Section):
    """Ends the run when the validation accuracy stops improving."""

    patience: Rounds
    """Evaluations in a row without improvement before the run ends."""
    min_delta: NonNegative = 0.0
    """Smallest gain in accuracy (0 to 1) that is an improvement."""


class Eval(Section):
    """Evaluation of the global model."""

    every: Rounds = 1
    """Rounds between evaluations. The last round is always evaluated."""
    subset: DecidesNothing[Batch | None] = None
    """Largest number of validation rows, drawn once, on which all other rounds are evaluated (`eval_subset/...`). They
    choose neither the best round nor an early stop. null: the other rounds are not evaluated.
    """
    batch_size: Batch = 64
    """Examples per forward pass."""
    masked: bool = True
    """Also evaluate the sparse model that clients download, if wire.down.density is below 1."""
    tiers: bool = False
    """Also evaluate the model that each tier of clients (rank, download density) would download."""
    tier_masks: Literal["next", "round"] = "next"
    """For `tiers`, where downloads are sparse: the mask that the tier would get `next`, cut from the new model; or the
    mask that the tier had in the `round` that led to it, as in FLASC's code and in `masked`.
    """
    clients: bool = False
    """Also measure the test accuracy of each client: its download, or its own model, on test rows weighted like the
    classes of the client. The mean and quantiles over the clients are recorded. Where every client has a model of its
    own, this takes one evaluation per client.
    """
    own_models: Clients | None = None
    """Where every client has a model of its own (topology.kind=graph, fedsa, local): the number of clients, drawn once,
    whose models are evaluated as well, on all rows; `eval/accuracy_own`, `test/loss_own` and such are means over them.
    null: none.
    """
    unseen: bool = False
    """Also measure the global model on the training rows of all clients that never took part so far, which are held out
    by that: `test/accuracy_unseen` and `test/loss_unseen`, over these rows together; null once every client with rows
    has taken part. It takes at most one evaluation of all training rows.
    """
    generate_rows: Batch | None = None
    """For data.task=instruction: the largest number of validation rows and of test rows, drawn once, to whose prompts
    the global model writes responses, greedily (`eval/exact_match`, `eval/rouge_l`). null: none.
    """
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 256
    """For `generate_rows`: most tokens of a response; fewer where the model has no positions for more."""
    controls: bool = False
    """At the end, also train only a head on the frozen base model, and measure it: once in the same rounds, and once
    centrally until convergence.
    """
    diagnostics: bool = False
    """In every round, also measure how far the global model is from the mean of the clients' products B A and from the
    product of the clients' mean factors, and how far what clients are sent next is from what they trained.
    """
    early_stop: EarlyStop | None = None
    """When to end the run early; null: run all rounds."""

    def full(self, round: int, rounds: int) -> bool:
        """Whether round ``round`` (from 1) of a run of ``rounds`` is evaluated on all rows."""
        return round % self.every == 0 or round == rounds
