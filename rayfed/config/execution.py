"""The sections that say where a run executes, who watches it, what it leaves: engine, tracking, checkpoint, export."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from rayfed.config.types import Names, NonNegative, Section


class Engine(Section):
    """Where clients train. `pack`, `threads` and `padding` decide bits (rounding); the rest does not."""

    kind: Literal["ray", "local"] = Field("ray", description="`ray`: actors; `local`: in this process, same bits.")
    workers: PositiveInt = Field(2, description="Worker actors.")
    cpus_per_worker: NonNegative = Field(1.0, description="Ray CPUs a worker holds; may be a fraction.")
    gpus_per_worker: NonNegative | Literal["auto"] = Field(
        "auto",
        description="Ray GPUs a worker holds: a fraction of one, or whole ones. auto: with device=cuda an equal share "
        "of the cluster's, at most one, and in a sweep one; on a CPU none. `pack: auto` fits packs to that share.",
    )
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
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where clients train.")
    deterministic: bool = Field(
        True,
        description="On a GPU: only algorithms that give the same bits every time; an operation that has none ends "
        "the run. false: whatever is fastest.",
    )
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
        if self.gpus > 1 and not self.gpus.is_integer():
            raise ValueError(f"engine.gpus_per_worker: got {self.gpus}, but above 1 Ray takes whole GPUs only")
        for field, amount in (("cpus_per_worker", self.cpus_per_worker), ("gpus_per_worker", self.gpus)):
            if 0 < amount < 1e-4:
                raise ValueError(f"engine.{field}: got {amount}, but Ray takes 0 or at least 0.0001")
        return self

    @property
    def gpus(self) -> float:
        """`gpus_per_worker` as a number; auto, before the cluster is known: a whole GPU where one is needed."""
        if self.gpus_per_worker == "auto":
            return 1.0 if self.device == "cuda" else 0.0
        return self.gpus_per_worker

    def with_gpus(self, gpus: float) -> Engine:
        """The same on a cluster of so many GPUs: each worker holds the largest share of one that all of them can have.

        In steps that Ray knows (1/10000), and at most a whole one.
        """
        share = math.floor(1e4 / math.ceil(self.workers / gpus)) / 1e4 if gpus else 0.0
        return self.model_copy(update={"gpus_per_worker": share})


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
