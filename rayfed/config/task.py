"""The sections that say what is learnt, and on what base: data, problem, partition, model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rayfed.config.types import NonNegative, Section, Share


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

    @property
    def task(self) -> str:
        """The task of these data: its file in `rayfed.tasks`."""
        return "low_rank_regression" if self.source == "lowrank" else "text_classification"

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
