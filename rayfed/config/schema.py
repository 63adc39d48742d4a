"""The settings of one run: a single validated schema. Every field says its unit, range and default.

A setting belongs here only if a user may want to change it. The classes are frozen: a run cannot change its own
settings half-way. ``Experiment.digest()`` names the settings that decide the result; where a run executes and how it
is watched (`engine.kind`, `engine.workers`, `tracking`, `checkpoint`, ...) cannot change the result and is left out.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Density = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Betas = Annotated[tuple[Share, Share], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Indices = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
Ranks = Annotated[tuple[PositiveInt, ...], Field(strict=False)]
Densities = Annotated[tuple[Density, ...], Field(strict=False)]
Weights = Annotated[tuple[PositiveFloat, ...], Field(strict=False)]
ValueFormat = Literal["fp32", "bf16", "fp16", "int8"]
WHERE_AND_HOW = {  # settings that decide where a run executes and who watches it, never what comes out
    "name": None,
    "engine": (
        "kind",
        "workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "gradient_checkpointing",
        "placement",
        "wait_for_nodes",
        "address",
        "retries",
    ),
    "tracking": None,
    "checkpoint": None,
    "export": None,
}


class Section(BaseModel):
    """What all sections share: unknown keys are refused, and nothing is converted: "3" is no number, 1 no `true`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, settings: Any) -> Any:
        """A section with nothing under its name is null in YAML and means its defaults."""
        if not isinstance(settings, dict):
            return settings
        sections = {name for name, field in cls.model_fields.items() if field.default_factory is not None}
        return {name: value for name, value in settings.items() if value is not None or name not in sections}


def _section(kind: type[Section], description: str) -> Any:
    """A field that holds a section, with its defaults unless settings are given."""
    return Field(default_factory=kind, description=description)


class Data(Section):
    """Where the labelled texts come from."""

    source: Literal["stdlib", "files", "hub", "lowrank"] = Field(
        "stdlib",
        description="`stdlib`: functions of Python's own standard library, label = module (needs no download); "
        "`files`: local JSONL, CSV or Parquet; `hub`: a Hugging Face data set by name; `lowrank`: a regression problem "
        "with a known answer, see the section `problem`.",
    )
    path: str | None = Field(
        None, description="For `files`: a folder with train.*, test.* and optionally validation.*, or one file."
    )
    name: str | None = Field(None, description="For `hub`: the data set's name, such as `PolyAI/banking77`.")
    subset: str | None = Field(None, description="For `hub`: the data set's configuration, if it has several.")
    text: str = Field("text", description="The column that holds the text.")
    label: str = Field("label", description="The column that holds the label: an integer or a string.")
    client: str | None = Field(None, description="The column that names the owner of a row (`natural` partition).")
    validation: Share = Field(
        0.1, description="Share of the training rows set aside for validation where the source has no such split."
    )
    test: Share = Field(0.2, description="Share of all rows set aside for the test where the source has no such split.")
    examples: PositiveInt | None = Field(None, description="Use only so many rows of the source; null: all.")
    max_tokens: PositiveInt = Field(
        128, description="Longer texts are cut to so many tokens. Shorter ones cost only what they are."
    )

    @model_validator(mode="after")
    def _source_is_named(self) -> Data:
        if self.source == "files" and not self.path:
            raise ValueError("data.path: got null, but data.source=files needs a folder or a file")
        if self.source == "hub" and not self.name:
            raise ValueError("data.name: got null, but data.source=hub needs the name of a data set")
        for field, source in (("path", "files"), ("name", "hub"), ("subset", "hub")):
            if getattr(self, field) is not None and self.source != source:
                raise ValueError(
                    f"data.{field}: got {getattr(self, field)!r}, but that belongs to data.source={source}, "
                    f"and the source is {self.source}"
                )
        return self


class Problem(Section):
    """The built-in problem with a known answer (`data.source: lowrank`): low-rank regression on one linear layer.

    Every client has a quadratic loss of its own and `partition.clients` says how many there are. Sections `data` and
    `eval` have nothing to add: the distance from the optimum is exact.
    """

    outputs: PositiveInt = Field(32, description="Outputs of the layer.")
    inputs: PositiveInt = Field(32, description="Inputs of the layer.")
    true_rank: PositiveInt = Field(12, description="Rank of the optimum.")
    rows: PositiveInt = Field(64, description="Rows of data a client; at least `inputs`.")
    condition: Annotated[float, Field(ge=1)] = Field(
        10.0, description="Largest over smallest curvature of a client's loss; at 1 all clients see alike."
    )
    shift: NonNegative = Field(
        0.5, description="How far the clients' own optima lie from the common one, as a share of its norm."
    )

    @model_validator(mode="after")
    def _problem_exists(self) -> Problem:
        if self.true_rank > min(self.outputs, self.inputs):
            raise ValueError(
                f"problem.true_rank: got {self.true_rank}, but a matrix of {self.outputs} x {self.inputs} has at most "
                f"rank {min(self.outputs, self.inputs)}"
            )
        if self.rows < self.inputs:
            raise ValueError(f"problem.rows: got {self.rows}, but at least problem.inputs={self.inputs} are needed")
        return self


class Partition(Section):
    """Who holds which training rows."""

    kind: Literal["iid", "dirichlet", "flasc", "pathological", "natural"] = Field(
        "dirichlet",
        description="`iid`; `dirichlet`: label shares per client drawn from Dirichlet(alpha); `flasc`: the recipe of "
        "FLASC's code; `pathological`: few classes per client; `natural`: the column `data.client`.",
    )
    clients: PositiveInt = Field(
        100, description="Clients in the population. Ignored by `natural`, but for data.source=lowrank."
    )
    alpha: PositiveFloat = Field(0.1, description="Dirichlet concentration; small means unlike clients.")
    classes: PositiveInt = Field(2, description="Classes per client for `pathological`.")


class Model(Section):
    """The frozen base model."""

    name: str = Field(
        "minilm",
        description="`minilm`: the packaged all-MiniLM-L6-v2 (extra `minilm`); else a local folder or a hub name that "
        "AutoModelForSequenceClassification can load. Ignored by data.source=lowrank, whose model is one layer.",
    )
    pooling: Literal["stock", "mean"] = Field(
        "stock",
        description="`stock`: the model's own classification head; `mean`: mean over the real tokens, L2-normalised "
        "where `normalize`, then one linear layer.",
    )
    normalize: bool = Field(True, description="Scale mean-pooled features to unit length times sqrt(width).")
    head: Literal["trained", "frozen"] = Field(
        "trained",
        description="`trained`: with the adapters, and sent. `frozen`: every weight matrix of the head stays at random "
        "orthonormal rows, keyed by `seed`; then all that can be learnt is in the adapters, which tells methods apart.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Number format of the frozen base and of what passes through it, in training and evaluation alike. "
        "Adapters, head, loss, optimizer states and messages are float32 in any case. bfloat16 halves the base's "
        "memory and is fast where a device computes in it; a client's trained change differs by a percent or two.",
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with a hub model. Off unless you trust it.")


class Lora(Section):
    """The adapters, in PEFT's words."""

    rank: PositiveInt = Field(16, description="Rank r of every adapter.")
    alpha: PositiveFloat = Field(16.0, description="A layer's change is alpha / r * B A (alpha / sqrt(r) with rslora).")
    rslora: bool = Field(False, description="Rank-stabilised scale alpha / sqrt(r).")
    dropout: Share = Field(0.0, description="Dropout on the adapter's input while training, keyed per client.")
    target_modules: str | Names | None = Field(
        None, description="PEFT's target_modules: names, a regular expression or `all-linear`; null: PEFT's choice."
    )
    layers_to_transform: Indices | None = Field(
        None, description="Only these layer indices, from 0, get adapters; null: all. Needs target_modules as a list."
    )
    train: Literal["all", "head"] = Field(
        "all", description="`all`: adapters and head train; `head`: only the head does (the frozen-base baseline)."
    )

    @model_validator(mode="after")
    def _layers_of_named_modules(self) -> Lora:
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"lora.layers_to_transform: got {list(self.layers_to_transform)}, but PEFT takes it only with "
                f"target_modules as a list of names, not the string {self.target_modules!r}"
            )
        return self


class Method(Section):
    """What is sent to clients, what trains, and how uploads become the next global state."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str = Field("flasc", description="One of `rayfed methods`. Further keys are the method's own options.")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Direction(Section):
    """How much travels in one direction, and how its values are written."""

    density: Density = Field(1.0, description="Share of the entries that travel, in (0, 1].")
    decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Density of round t is density * decay^(t // every), t from 0."
    )
    every: PositiveInt = Field(1, description="Rounds between two steps of the decay.")
    values: ValueFormat = Field("fp32", description="How values are written: fp32 (lossless), bf16, fp16 or int8.")

    def density_at(self, t: int, first: float | None = None) -> float:
        """The density of round ``t`` (0 is the first), in (0, 1]. ``first``: a client's own, in place of `density`."""
        return (self.density if first is None else first) * self.decay ** (t // self.every)


class Wire(Section):
    """Sparsity and number format, per direction."""

    down: Direction = _section(Direction, "Server to client.")
    up: Direction = _section(Direction, "Client to server.")


class Profiles(Section):
    """What each client's device and link allow: its rank, and how much of it travels. The same in every round.

    FLASC's system tiers are `tiers` with ranks [1, 4, 16, 64] at lora.rank 64, or with densities [1/64, 1/16, 1/4, 1].
    """

    kind: Literal["same", "list", "tiers", "uniform", "heavy_tailed", "normal", "function"] = Field(
        "same",
        description="`same`: lora.rank and the wire's densities for all; `list`: one entry a client; `tiers`: a few "
        "kinds of clients; `uniform`: any rank from low to high; `heavy_tailed`: of `ranks`, the large ones rare; "
        "`normal`: a rounded normal variable, cut to [low, high]; `function`: yours. Draws are keyed per client.",
    )
    ranks: Ranks | None = Field(
        None,
        description="Rank by client (`list`) or tier (`tiers`), or the ranks to draw from (`heavy_tailed`). None may "
        "exceed lora.rank, the server's; null: lora.rank for all, where densities are given.",
    )
    densities_down: Densities | None = Field(
        None,
        description="Aligned with ranks: share of the entries that travel to such a client, in place of "
        "wire.down.density; the wire's decay still applies. null: the wire's.",
    )
    densities_up: Densities | None = Field(None, description="The same for wire.up.density.")
    weights: Weights | None = Field(
        None, description="For `tiers`: their shares of the clients, to any sum; null: client id modulo tiers, no draw."
    )
    exponent: Annotated[float, Field(ge=-10, le=10)] = Field(
        1.0,
        description="For `heavy_tailed`: the share of rank r falls as r^-exponent; below 0 the small ranks are rare.",
    )
    low: PositiveInt = Field(1, description="For `uniform` and `normal`: the smallest rank.")
    high: PositiveInt | None = Field(None, description="For `uniform` and `normal`: the largest rank; null: lora.rank.")
    mean: PositiveFloat | None = Field(
        None, description="For `normal`: mean before it is cut, within [low, high]; null: their middle."
    )
    std: PositiveFloat | None = Field(
        None, description="For `normal`: standard deviation before it is cut; null: a quarter of high - low."
    )
    function: str | None = Field(
        None,
        description="For `function`: `package.module:function`, called by name with client (its id), examples (rows it "
        "holds) and seed (the run's); returns a rank or (rank, density_down, density_up), the same at every call. "
        "The digest of the settings has its name, not its code.",
    )

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> Profiles:
        for field, kinds in PROFILE_FIELDS.items():
            value = getattr(self, field)
            if self.kind not in kinds and value != Profiles.model_fields[field].default:
                shown = list(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"profiles.{field}: got {reprlib.repr(shown)}, but that belongs to profiles.kind="
                    f"{' or '.join(kinds)}, and the kind is {self.kind}"
                )
        if self.kind in PROFILE_FIELDS["ranks"]:
            self._lists_are_aligned()
        if self.kind == "function":
            module, _, name = (self.function or "").partition(":")
            if not all(part.isidentifier() for part in (*module.split("."), name)):
                got = "null" if self.function is None else repr(self.function)
                raise ValueError(f"profiles.function: got {got}, but it is written package.module:function")
        return self

    def _lists_are_aligned(self) -> None:
        given = self.lists
        if "ranks" not in given and (self.kind == "heavy_tailed" or given.keys() <= {"weights"}):
            needs = "ranks" if self.kind == "heavy_tailed" else "ranks or densities"
            raise ValueError(f"profiles.ranks: got null, but profiles.kind={self.kind} needs {needs}")
        first, *others = given
        if not given[first]:
            raise ValueError(f"profiles.{first}: got [], but it needs at least one value")
        for name in others:
            if len(given[name]) != len(given[first]):
                raise ValueError(
                    f"profiles.{name}: got {len(given[name])} values, but profiles.{first} has {len(given[first])}, "
                    "and they go together one by one"
                )

    @property
    def lists(self) -> dict[str, tuple[float, ...]]:
        """The lists that are given, by name. They go together one by one: an entry a client (`list`) or tier."""
        return {name: own for name in ALIGNED if (own := getattr(self, name)) is not None}

    @property
    def entries(self) -> int:
        """How many entries these lists have; 0 where none is given."""
        return len(next(iter(self.lists.values()), ()))


ALIGNED = ("ranks", "densities_down", "densities_up", "weights")
PROFILE_FIELDS = {  # the kinds that each field of `profiles` belongs to
    "ranks": ("list", "tiers", "heavy_tailed"),
    "densities_down": ("list", "tiers", "heavy_tailed"),
    "densities_up": ("list", "tiers", "heavy_tailed"),
    "weights": ("tiers",),
    "exponent": ("heavy_tailed",),
    "low": ("uniform", "normal"),
    "high": ("uniform", "normal"),
    "mean": ("normal",),
    "std": ("normal",),
    "function": ("function",),
}


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
    schedule: Schedule = _section(Schedule, "How lr changes over the rounds.")
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
    schedule: Schedule = _section(Schedule, "How lr changes over the rounds.")
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


class Engine(Section):
    """Where clients train. `pack`, `threads`, `padding` and `cache_gb` decide bits (rounding); the rest does not."""

    kind: Literal["ray", "local"] = Field("ray", description="`ray`: actors; `local`: in this process, same bits.")
    workers: PositiveInt = Field(2, description="Worker actors.")
    cpus_per_worker: NonNegative = Field(1.0, description="Ray CPUs a worker holds; may be a fraction.")
    gpus_per_worker: NonNegative = Field(0.0, description="Ray GPUs a worker holds: a fraction of one, or whole ones.")
    threads: PositiveInt = Field(
        1, description="Torch threads per worker; CPU kernels sum in an order that follows it."
    )
    pack: PositiveInt | Literal["auto"] = Field(
        1,
        description="Clients trained together in one batch. auto: measured on a worker before the first round, as "
        "many as pay; the run's own config.yaml has the number, and pack.json what it was chosen from. Two runs may "
        "choose differently, and then differ in bits.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep only the input of each of the model's layers, and compute the rest anew on the way back: a "
        "fraction of the memory, up to half as much time again, the same bits.",
    )
    padding: Literal["auto", "never", "batch"] = Field(
        "auto",
        description="batch: texts are padded to the longest of their batch. never: a batch is one row of real tokens; "
        "refused where the model cannot take it. auto: never where the model can, else batch.",
    )
    cache_gb: NonNegative = Field(
        1.0,
        description="Where the lowest blocks of a text model have no adapters, their outputs are computed once for "
        "every text and kept in Ray's object store, if the run needs them twice or more: of at most so many GB. 0: "
        "never.",
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where clients train; `cuda` needs gpus_per_worker > 0.")
    placement: Literal["spread", "pack"] = Field(
        "spread", description="Workers on as many of the cluster's nodes as there are, or on as few as hold them."
    )
    wait_for_nodes: bool = Field(
        False,
        description="For a cluster that grows when it is asked to: wait for nodes where workers find no room. false: "
        "refuse.",
    )
    address: str | None = Field(None, description="Ray cluster to join; null: RAY_ADDRESS or a cluster of its own.")
    retries: Annotated[int, Field(ge=0)] = Field(3, description="How often one pack may be re-run when workers die.")

    @model_validator(mode="after")
    def _amounts_that_ray_takes(self) -> Engine:
        if self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            raise ValueError(
                f"engine.gpus_per_worker: got {self.gpus_per_worker}, but above 1 Ray takes whole GPUs only"
            )
        for field in ("cpus_per_worker", "gpus_per_worker"):
            if 0 < getattr(self, field) < 1e-4:
                raise ValueError(f"engine.{field}: got {getattr(self, field)}, but Ray takes 0 or at least 0.0001")
        return self


class Tracking(Section):
    """Who watches. `metrics.jsonl` is always written."""

    console: Literal["auto", "rich", "plain", "off"] = Field(
        "auto", description="auto: rich on a terminal, else plain."
    )
    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="auto: online when logged in, else offline."
    )
    project: str = Field("rayfed", description="W&B project.")
    entity: str | None = Field(None, description="W&B entity; null: your default.")
    group: str | None = Field(None, description="W&B group.")
    tags: Names = Field((), description="W&B tags.")
    artifact: bool = Field(True, description="Also give W&B the finished run's adapter, as an artifact.")


class Checkpoint(Section):
    """What `--resume` continues from."""

    every: PositiveInt = Field(1, description="Rounds between checkpoints; the last round always has one.")
    keep: PositiveInt = Field(2, description="Newest checkpoints kept.")


class Export(Section):
    """What a finished run leaves for others to use."""

    adapter_rank: PositiveInt | None = Field(
        None, description="Rank of the exported PEFT adapter; null: lora.rank. What it cannot hold is stated."
    )
    merged: bool = Field(False, description="Also save the base model with all changes merged into its weights.")


class Experiment(Section):
    """One run, completely described."""

    name: str = Field("run", description="Shown in the console, W&B and reports.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Every random draw of the run is keyed by it.")
    data: Data = _section(Data, "Labelled texts.")
    problem: Problem = _section(Problem, "The problem with a known answer.")
    partition: Partition = _section(Partition, "Who holds which rows.")
    model: Model = _section(Model, "The frozen base.")
    lora: Lora = _section(Lora, "The adapters.")
    method: Method = _section(Method, "The federated method.")
    wire: Wire = _section(Wire, "Sparsity and number formats.")
    profiles: Profiles = _section(Profiles, "Ranks and densities of single clients.")
    client: Client = _section(Client, "Local training.")
    server: Server = _section(Server, "The rounds.")
    eval: Eval = _section(Eval, "Evaluation.")
    engine: Engine = _section(Engine, "Where clients train.")
    tracking: Tracking = _section(Tracking, "Who watches.")
    checkpoint: Checkpoint = _section(Checkpoint, "What `--resume` needs.")
    export: Export = _section(Export, "What a finished run leaves.")

    @model_validator(mode="after")
    def _combinations(self) -> Experiment:
        counted = self.partition.kind != "natural" or self.data.source == "lowrank"
        if counted and self.server.cohort > self.partition.clients:
            raise ValueError(
                f"server.cohort: got {self.server.cohort}, but the population has only "
                f"{self.partition.clients} clients (partition.clients)"
            )
        if self.data.source == "lowrank":
            self._fits_the_known_answer()
        elif self.partition.kind == "natural" and self.data.client is None:
            raise ValueError("data.client: got null, but partition.kind=natural needs the column that names the client")
        if self.lora.train == "head" and self.model.head == "frozen":
            raise ValueError("lora.train: got 'head', but model.head=frozen leaves nothing to train; all is allowed")
        if self.engine.kind == "ray" and self.engine.device == "cuda" and self.engine.gpus_per_worker == 0:
            raise ValueError("engine.gpus_per_worker: got 0, but engine.device=cuda needs more than 0")
        if self.eval.early_stop and self.data.source == "stdlib" and self.data.validation == 0:
            raise ValueError("data.validation: got 0, but eval.early_stop needs a validation split")
        return self

    def _fits_the_known_answer(self) -> None:
        if self.engine.gradient_checkpointing:
            raise ValueError(
                "engine.gradient_checkpointing: got true, but the model of data.source=lowrank is one layer; allowed "
                "is false"
            )
        if self.model.dtype != "float32":
            raise ValueError(
                f"model.dtype: got {self.model.dtype!r}, but data.source=lowrank measures distances that are finer; "
                "allowed is float32"
            )
        if self.partition.kind != "natural":
            raise ValueError(
                f"partition.kind: got {self.partition.kind!r}, but in data.source=lowrank every client has its own "
                "rows: natural (partition.clients says how many)"
            )
        for field, value, allowed in (
            ("lora.train", self.lora.train, "all"),
            ("eval.controls", self.eval.controls, False),
            ("eval.clients", self.eval.clients, False),
            ("eval.early_stop", self.eval.early_stop, None),
        ):
            if value != allowed:
                raise ValueError(f"{field}: got {value!r}, but data.source=lowrank has no head and no validation data")

    @model_validator(mode="after")
    def _profiles_fit(self) -> Experiment:
        own, largest = self.profiles, self.lora.rank
        for field, rank in (*(("ranks", rank) for rank in own.ranks or ()), ("low", own.low), ("high", own.high or 1)):
            if rank > largest:
                raise ValueError(
                    f"profiles.{field}: got {rank}, but no rank may exceed lora.rank={largest}, the server's"
                )
        high = own.high or largest
        if own.low > high:
            raise ValueError(f"profiles.low: got {own.low}, but it may not exceed profiles.high={high}")
        if own.mean is not None and not own.low <= own.mean <= high:
            raise ValueError(f"profiles.mean: got {own.mean}, but it should be from low={own.low} to high={high}")
        if own.kind == "list" and self.partition.kind != "natural" and own.entries != self.partition.clients:
            raise ValueError(
                f"profiles.{next(iter(own.lists))}: got {own.entries} values, but the population has "
                f"{self.partition.clients} clients (partition.clients)"
            )
        return self

    def with_pack(self, size: int) -> Experiment:
        """The same run with packs of that size."""
        return self.model_copy(update={"engine": self.engine.model_copy(update={"pack": size})})

    def digest(self) -> str:
        """SHA-256 (first 16 hex digits) of the settings that decide the result; see the module docstring."""
        settings = self.model_dump(mode="json")
        for section, fields in WHERE_AND_HOW.items():
            for field in fields or (None,):
                settings[section].pop(field) if field else settings.pop(section)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
