"""The plan of a run: everything that a run consists of, built and checked once by `rayfed.api.prepare`.

Server, trainers and executors receive the plan, or the parts of it that they need. Nothing below `rayfed.api` knows the
whole settings (`Experiment`), builds a method again, or loads the base model only to describe it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from rayfed.channels import Channel
from rayfed.config.execution import Checkpoint, Engine, Export, Tracking
from rayfed.config.marks import settings_digest
from rayfed.config.method import Lora, Wire
from rayfed.config.training import Client, Eval, Server
from rayfed.device import capability
from rayfed.lora.adapter import Adapter, fresh_adapter, scale_of
from rayfed.methods import Method
from rayfed.objectives import Objective
from rayfed.privacy import Privacy
from rayfed.profiles.client_profiles import ClientProfiles
from rayfed.tasks.base import Task
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.models.spec import ModelSpec
from rayfed.topologies import Gossip
from rayfed.weighting import Weighting

if TYPE_CHECKING:
    from rayfed.clients.messages import SplitName


@dataclass(frozen=True)
class RunPlan:
    """One run. The first group of fields was built from the settings; the second group holds sections of the settings.

    A plan is pickled to the driver and the workers. ``settings`` are the resolved settings as JSON values: what
    config.yaml and W&B get, and what the digest is computed from. ``pack`` is None until `engine.pack: auto` is chosen.
    """

    task: Task
    federation: Federation
    model: ModelSpec
    method: Method
    objective: Objective
    weighting: Weighting
    channel: Channel
    profiles: ClientProfiles
    server_optimizer: str
    pack: int | None
    seed: int
    settings: Mapping[str, Any]

    lora: Lora
    wire: Wire
    client: Client
    server: Server
    eval: Eval
    engine: Engine
    tracking: Tracking
    checkpoint: Checkpoint
    export: Export

    topology: Gossip | None = None
    """The graph of a run without a server, whose method is `OwnModels` then; None: the run is a star."""
    privacy: Privacy | None = None
    """Clipping and noise; None: the run is not private."""
    initial: Adapter | None = None
    """The adapter that `model.adapter` names, at the run's rank; None: the run starts from a new one."""
    notes: tuple[str, ...] = ()
    """Lines for the log of a run that begins."""

    @property
    def name(self) -> str:
        """The run's name, as in the settings."""
        return str(self.settings["name"])

    @cached_property
    def digest(self) -> str:
        """The settings' digest: 16 hex digits over all settings that decide the result."""
        return settings_digest(self.settings)

    @property
    def rounds(self) -> int:
        """The rounds of the run: `server.rounds`, or as many as `privacy.target_epsilon` allows."""
        return self.server.rounds if self.privacy is None else self.privacy.rounds

    @property
    def trained_shapes(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of the layers whose adapters train, by name: none where only the head trains."""
        return {} if self.lora.train == "head" else self.model.shapes

    @property
    def lora_compute(self) -> str:
        """Number format of the operands in products with adapters: `lora.compute`, where auto is the base's format."""
        return self.model.dtype if self.lora.compute == "auto" else self.lora.compute

    @property
    def capability(self) -> str:
        """That of this process's device, see `rayfed.device.capability`."""
        return capability(self.engine.device)

    @cached_property
    def one_mask(self) -> bool:
        """Whether all clients of a round receive one sparse model: one rank and one download density below 1."""
        mix = self.profiles.tier_mix(self.federation.sizes, self.server.empty_clients)
        tiers = {(tier.rank, tier.density_down) for tier in mix}
        return len(tiers) == 1 and not self.method.personal and self.profiles.may_be_sparse("down", self.server.rounds)

    def candidates(self, t: int) -> np.ndarray:
        """The clients of which the cohort of round ``t`` (from 0) is drawn: those with rows, or all
        (`server.empty_clients`)."""
        federation = self.federation_at(t)
        return np.arange(federation.clients) if self.server.empty_clients else federation.holders

    def experience(self, t: int) -> int | None:
        """The experience (from 0) to which round ``t`` (from 0) belongs; None without `partition.sequence`."""
        experiences = self.federation.experiences
        return None if experiences is None else t * len(experiences) // self.server.rounds

    def begins_experience(self, t: int) -> bool:
        """Whether round ``t`` (from 0) is the first one of another experience than the first."""
        return t > 0 and self.experience(t) != self.experience(t - 1)

    def federation_at(self, t: int) -> Federation:
        """The federation of round ``t`` (from 0): with `partition.sequence` clients have that experience's rows."""
        experience = self.experience(t)
        return self.federation if experience is None else self.federation.by_experience[experience]

    def seen_classes(self, t: int) -> tuple[int, ...] | None:
        """The classes among which models choose after round ``t`` (from 0), ascending; None: all."""
        own, experience = self.federation.experiences, self.experience(t)
        return None if own is None or experience is None else self._proper(own.seen(experience))

    def seen_rows(self, t: int) -> dict[SplitName, np.ndarray] | None:
        """The rows, by split, on which models are evaluated after round ``t`` (from 0) in a sequence of domains.

        None: the seen classes say it.
        """
        own, experience = self.federation.experiences, self.experience(t)
        if own is None or experience is None or not own.domains:
            return None
        splits: tuple[SplitName, ...] = ("validation", "test")
        return {s: np.flatnonzero((own.of_rows[s] >= 0) & (own.of_rows[s] <= experience)) for s in splits}

    def compared_classes(self, t: int) -> tuple[int, ...] | None:
        """The classes that the training loss of round ``t`` (from 0) compares, ascending; None: all."""
        own, experience = self.federation.experiences, self.experience(t)
        return None if own is None or experience is None else self._proper(own.compared(experience))

    def _proper(self, classes: tuple[int, ...]) -> tuple[int, ...] | None:
        return None if len(classes) == len(self.federation.classes) else classes

    def fully_evaluated(self, t: int) -> bool:
        """Whether round ``t`` (from 0) is evaluated on all rows: by `eval.every`, or as an experience's last."""
        return self.eval.full(t + 1, self.rounds) or self.begins_experience(t + 1)

    def start(self) -> Adapter:
        """The adapter that the run starts from: the given one, or B = 0, A random, and the head's initial values."""
        if self.initial is not None:
            return self.initial
        lora = self.lora
        scale = scale_of(lora.rank, lora.alpha, lora.rslora)
        return fresh_adapter(self.trained_shapes, self.model.head, lora.rank, scale, self.seed)

    def fresh(self, rank: int) -> Adapter:
        """A fresh pair of that rank for every adapted layer, whether it trains or not; no head."""
        scale = scale_of(rank, self.lora.alpha, self.lora.rslora)
        return fresh_adapter(self.model.shapes, {}, rank, scale, self.seed)

    def with_pack(self, size: int) -> RunPlan:
        """The same run with packs of that size."""
        settings = {**self.settings, "engine": {**self.settings["engine"], "pack": size}}
        return replace(self, pack=size, settings=settings)

    def with_gpus(self, gpus: float) -> RunPlan:
        """The same run on a cluster of so many GPUs: `engine.gpus_per_worker: auto` becomes a number."""
        return replace(self, engine=self.engine.with_gpus(gpus))
