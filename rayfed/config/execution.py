"""The sections that say where a run executes and what it leaves: engine, tracking, checkpoint, export."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from rayfed.config.describe import mistake
from rayfed.config.types import (
    UNSIGNED,
    DecidesModel,
    DecidesNothing,
    Fraction,
    Name,
    Rank,
    Rounds,
    Seconds,
    Section,
    Tag,
    Text,
    TextMistake,
    Workers,
)

_WORD = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL = re.compile(rf"({_WORD}/)?{_WORD}")
_CONDITION = re.compile(rf"!?({_WORD}|in\({_WORD}(, ?{_WORD})*\))")


def _label_selector(labels: dict[str, str]) -> dict[str, str]:
    """Refuses what Ray would refuse after it has started: names and conditions that are not written its way."""
    for label, condition in labels.items():
        if not _LABEL.fullmatch(label):
            raise TextMistake(f"{label!r} is no name of a label, such as ray.io/accelerator-type")
        if not _CONDITION.fullmatch(condition):
            raise TextMistake(f"{label} allows a value, !value, in(value, value) and !in(value, value)")
    return labels


LabelSelector = Annotated[dict[str, str], Field(max_length=20), AfterValidator(_label_selector)]


class Engine(Section):
    """Where and how clients train."""

    kind: DecidesNothing[Literal["ray", "local"]] = "ray"
    """`ray`: worker actors on a Ray cluster; `local`: this process, with the same results."""
    workers: DecidesNothing[Workers] = 2
    """Worker actors."""
    cpus_per_worker: DecidesNothing[Annotated[float, Field(ge=0, le=10_000), UNSIGNED]] = 1.0
    """Ray CPUs that each worker reserves, at most those of one machine; fractions are allowed."""
    gpus_per_worker: DecidesNothing[Fraction | Literal["auto"]] = "auto"
    """Share of a GPU that each worker reserves from Ray; a worker uses one device. auto: with device=cuda an equal
    share of the GPUs of the cluster, and exactly 1 in a sweep; with device=cpu 0. `pack: auto` fits packs into the
    share.
    """
    memory_per_worker: DecidesNothing[Annotated[float, Field(ge=0, le=100_000), UNSIGNED]] = 0.25
    """GiB of its node's memory that each worker reserves from Ray; 0: none. The default is what a worker holds without
    model and data; `rayfed doctor CONFIG` measures what it holds at its peak.
    """
    threads: Annotated[int, Field(ge=1, le=1000)] = 1
    """Torch threads per worker. CPU kernels add up in an order that depends on the threads."""
    pack: Annotated[int, Field(ge=1, le=10_000)] | Literal["auto"] = 1
    """Clients trained together in one batch. auto: measured on a worker before the first round, and written to the
    run's config.yaml and pack.json. Two runs with auto may differ in the size of packs, and so in the rounding of their
    results.
    """
    gradient_checkpointing: DecidesNothing[bool] = False
    """Store only the input of each layer of the model, and compute the rest again in the backward pass. Needs a
    fraction of the memory and up to 1.5 times the time; results are the same bits.
    """
    padding: DecidesModel[Literal["auto", "never", "batch"]] = "auto"
    """batch: texts are padded to the longest text of their batch. never: a batch is one row of tokens without padding;
    refused if the model cannot compute on it. auto: never if the model can, else batch.
    """
    device: Literal["cpu", "cuda"] = "cpu"
    """Device on which clients train."""
    deterministic: bool = True
    """On a GPU, use only algorithms that always give the same bits; an operation without one ends the run. false: use
    the fastest algorithms.
    """
    placement: DecidesNothing[Literal["spread", "pack"]] = "spread"
    """Workers on as many nodes of the cluster as possible (spread), or as few (pack)."""
    labels: DecidesNothing[LabelSelector | None] = None
    """Labels of the nodes on which workers run, such as {ray.io/accelerator-type: H200}; null: any node. Ray's
    conditions on a value: H200, !H200, in(H100, H200), !in(H100, H200).
    """
    wait_for_nodes: DecidesNothing[bool] = False
    """true: wait for new nodes of an autoscaling cluster while workers lack room; false: refuse."""
    address: DecidesNothing[Text | None] = None
    """Address of the Ray cluster; null: the address in RAY_ADDRESS, else a new cluster on this machine."""
    dashboard: DecidesNothing[bool] = False
    """true: start Ray's dashboard with a new cluster on this machine, and print the address of the cluster's dashboard.
    """
    retries: DecidesNothing[Annotated[int, Field(ge=0, le=1000)]] = 3
    """How often a pack runs again, at least, after its worker died or hung. The run ends after more such losses, unless
    other packs lose their workers so often that it may be chance (p >= 1e-6), as under frequent evictions.
    """
    deadline: DecidesNothing[Seconds | Literal["auto"] | None] = "auto"
    """Seconds after which a pack's worker counts as hung, is killed and replaced. auto: 10 times the slowest pack or
    evaluation so far, by clients or rows, and at least 60; 1800 before the first; 4 times as much after each miss.
    The time to load the model is not a pack's: it has a deadline by the rule of auto. null: no deadlines.
    """
    stall_s: DecidesNothing[Seconds] = 900.0
    """Seconds after which the run ends: without a finished pack or evaluation since the first failure of a worker, or
    without a place for any worker. The deadlines of what runs are waited for, and with wait_for_nodes also a place.
    """

    def mistakes(self) -> Iterator[str]:
        for field, amount in (("cpus_per_worker", self.cpus_per_worker), ("gpus_per_worker", self.gpus)):
            if 0 < amount < 1e-4:
                yield mistake(f"engine.{field}", amount, "Ray takes 0 or at least 0.0001")

    @property
    def gpus(self) -> float:
        """`gpus_per_worker` as a number. auto, as long as the cluster is unknown: 1 with device=cuda, else 0."""
        if self.gpus_per_worker == "auto":
            return 1.0 if self.device == "cuda" else 0.0
        return self.gpus_per_worker

    @property
    def memory(self) -> int:
        """`memory_per_worker` in bytes."""
        return int(self.memory_per_worker * 2**30)

    @property
    def processes(self) -> int:
        """The processes that train at the same time."""
        return self.workers if self.kind == "ray" else 1

    def with_gpus(self, gpus: float) -> Engine:
        """The same on a cluster of so many GPUs: each worker holds the largest share of one that all of them can have.

        In steps that Ray knows (1/10000), and at most a whole one.
        """
        share = math.floor(1e4 / math.ceil(self.workers / gpus)) / 1e4 if gpus else 0.0
        return self.model_copy(update={"gpus_per_worker": share})


class Tracking(Section):
    """Where metrics go, besides `metrics.jsonl`, which is always written."""

    decides = ()

    console: Literal["auto", "rich", "plain", "off"] = "auto"
    """Output on the console; auto: rich on a terminal, else plain."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """W&B; auto: online if you are logged in, else offline."""
    project: Name = "rayfed"
    """W&B project."""
    entity: Name | None = None
    """W&B entity; null: your default entity."""
    group: Name | None = None
    """W&B group; null: none, and in a sweep the name of the sweep."""
    tags: Annotated[tuple[Tag, ...], Field(strict=False, max_length=100)] = ()
    """W&B tags; W&B takes at most 64 characters."""
    artifact: bool = True
    """Also upload the adapter and the files of the finished run (settings, metrics, ledger) to W&B, as artifacts."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into the folder `tensorboard` of the run directory."""


class Checkpoint(Section):
    """What `--resume` continues from."""

    decides = ()

    every: Rounds = 1
    """Rounds between checkpoints. The last round always has a checkpoint."""
    keep: Rounds = 2
    """How many of the newest checkpoints stay on the disk."""


class Export(Section):
    """What a finished run exports."""

    decides = ()

    adapter_rank: Rank | None = None
    """Rank of the PEFT adapter; null: lora.rank. The error of a smaller rank is reported."""
    merged: bool = False
    """Also save the base model with all changes merged into its weights."""
