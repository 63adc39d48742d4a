"""The settings of one run: one validated schema. Every field says its unit, range and default.

A setting belongs here only if a user may want to change it. The classes are frozen: a run cannot change its own
settings. `Experiment.digest()` names the settings that decide the result. Settings that only say where a run executes
and how it is tracked (`engine.kind`, `engine.workers`, `tracking`, `checkpoint`, ...) decide nothing and are left out;
each is marked so at its field, see `rayfed.config.types`.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from rayfed.config.execution import Checkpoint, Engine, Export, Tracking
from rayfed.config.method import Lora, Method, Profiles, Wire
from rayfed.config.task import Data, Model, Partition, Problem
from rayfed.config.training import Client, Eval, Server
from rayfed.config.types import DecidesData, DecidesNothing, Section, section


class Experiment(Section):
    """All settings of one run."""

    name: DecidesNothing[str] = "run"
    """Name of the run in the console, in W&B and in reports."""
    seed: DecidesData[Annotated[int, Field(ge=0)]] = 0
    """The key of every random draw of the run."""
    data: Data = section(Data)
    problem: Problem = section(Problem)
    partition: Partition = section(Partition)
    model: Model = section(Model)
    lora: Lora = section(Lora)
    method: Method = section(Method)
    wire: Wire = section(Wire)
    profiles: Profiles = section(Profiles)
    client: Client = section(Client)
    server: Server = section(Server)
    eval: Eval = section(Eval)
    engine: Engine = section(Engine)
    tracking: Tracking = section(Tracking)
    checkpoint: Checkpoint = section(Checkpoint)
    export: Export = section(Export)

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
        if self.engine.kind == "ray" and self.engine.device == "cuda" and not self.engine.gpus:
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
        """The same run with packs of ``size`` clients."""
        return self.model_copy(update={"engine": self.engine.model_copy(update={"pack": size})})

    def with_gpus(self, gpus: float) -> Experiment:
        """The same run with ``gpus`` GPUs shared by all workers.

        Each worker gets the largest share that all of them can have: at most one GPU, in Ray's steps of 1/10000.
        """
        share = math.floor(1e4 / math.ceil(self.engine.workers / gpus)) / 1e4 if gpus else 0.0
        return self.model_copy(update={"engine": self.engine.model_copy(update={"gpus_per_worker": share})})

    def digest(self) -> str:
        """SHA-256 (first 16 hex digits) of the settings that decide the result; see the module docstring."""
        from rayfed.config.marks import settings_digest  # reads this schema

        return settings_digest(self.model_dump(mode="json"))
