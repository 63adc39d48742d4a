"""The settings of one run: a single validated schema. Every field says its unit, range and default.

A setting belongs here only if a user may want to change it. The classes are frozen: a run cannot change its own
settings half-way. ``Experiment.digest()`` names the settings that decide the result; where a run executes and how it
is watched (`engine.kind`, `engine.workers`, `tracking`, `checkpoint`, ...) cannot change the result and is left out.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from pydantic import Field, model_validator

from rayfed.config.execution import Checkpoint, Engine, Export, Tracking
from rayfed.config.method import Lora, Method, Profiles, Wire
from rayfed.config.task import Data, Model, Partition, Problem
from rayfed.config.training import Client, Eval, Server
from rayfed.config.types import Section, section

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


class Experiment(Section):
    """One run, completely described."""

    name: str = Field("run", description="Shown in the console, W&B and reports.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Every random draw of the run is keyed by it.")
    data: Data = section(Data, "Labelled texts.")
    problem: Problem = section(Problem, "The problem with a known answer.")
    partition: Partition = section(Partition, "Who holds which rows.")
    model: Model = section(Model, "The frozen base.")
    lora: Lora = section(Lora, "The adapters.")
    method: Method = section(Method, "The federated method.")
    wire: Wire = section(Wire, "Sparsity and number formats.")
    profiles: Profiles = section(Profiles, "Ranks and densities of single clients.")
    client: Client = section(Client, "Local training.")
    server: Server = section(Server, "The rounds.")
    eval: Eval = section(Eval, "Evaluation.")
    engine: Engine = section(Engine, "Where clients train.")
    tracking: Tracking = section(Tracking, "Who watches.")
    checkpoint: Checkpoint = section(Checkpoint, "What `--resume` needs.")
    export: Export = section(Export, "What a finished run leaves.")

    @model_validator(mode="after")
    def _combinations(self) -> Experiment:
        if self.lora.train == "head" and self.model.head == "frozen":
            raise ValueError("lora.train: got 'head', but model.head=frozen leaves nothing to train; all is allowed")
        if self.engine.kind == "ray" and self.engine.device == "cuda" and not self.engine.gpus:
            raise ValueError("engine.gpus_per_worker: got 0, but engine.device=cuda needs more than 0")
        return self

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

    def digest(self) -> str:
        """SHA-256 (first 16 hex digits) of the settings that decide the result; see the module docstring."""
        settings = self.model_dump(mode="json")
        for name, fields in WHERE_AND_HOW.items():
            for field in fields or (None,):
                settings[name].pop(field) if field else settings.pop(name)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
