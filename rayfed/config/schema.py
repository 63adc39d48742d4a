"""The settings of one run: one validated schema. Every field says its unit, range and default.

A setting belongs here only if a user may want to change it. The classes are frozen: a run cannot change its own
settings. `Experiment.digest()` names the settings that decide the result. Settings that only say where a run executes
and how it is tracked (`engine.kind`, `engine.workers`, `tracking`, `checkpoint`, ...) decide nothing and are left out;
each is marked so at its field, see `rayfed.config.types`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from rayfed.config.channel import Channel
from rayfed.config.describe import mistake
from rayfed.config.execution import Checkpoint, Engine, Export, Tracking
from rayfed.config.method import Lora, Method, Profiles, Wire
from rayfed.config.pretrain import Pretrain
from rayfed.config.privacy import Privacy
from rayfed.config.task import Data, Model, Partition, Problem
from rayfed.config.topology import Topology
from rayfed.config.training import Client, Eval, Objective, Server, Weighting
from rayfed.config.types import DecidesData, DecidesNothing, Name, Section, section

MOST_NUMBERS = 100_000_000  # of the problem with a known answer; making it takes about 25 bytes for each


class _Refuses(type(Section)):  # type: ignore[misc]  # the metaclass of pydantic
    """`Experiment(...)` raises UserError, one line per mistake. (An `__init__` would also be called by validation.)"""

    def __call__(cls, **settings: Any) -> Any:
        try:
            return super().__call__(**settings)
        except ValidationError as error:
            from rayfed.config.load import refusal  # reads this schema

            raise refusal(error, settings, Experiment) from None


class Experiment(Section, metaclass=_Refuses):
    """All settings of one run."""

    name: DecidesNothing[Name] = "run"
    """Name of the run in the console, in W&B and in reports."""
    seed: DecidesData[Annotated[int, Field(ge=0, le=2**63 - 1)]] = 0
    """The key of every random draw of the run; a signed 64-bit integer."""
    data: Data = section(Data)
    problem: Problem = section(Problem)
    partition: Partition = section(Partition)
    model: Model = section(Model)
    pretrain: Pretrain = section(Pretrain)
    lora: Lora = section(Lora)
    method: Method = section(Method)
    wire: Wire = section(Wire)
    profiles: Profiles = section(Profiles)
    client: Client = section(Client)
    objective: Objective = section(Objective)
    server: Server = section(Server)
    weighting: Weighting = section(Weighting)
    channel: Channel = section(Channel)
    topology: Topology = section(Topology)
    privacy: Privacy = section(Privacy)
    eval: Eval = section(Eval)
    engine: Engine = section(Engine)
    tracking: Tracking = section(Tracking)
    checkpoint: Checkpoint = section(Checkpoint)
    export: Export = section(Export)

    @model_validator(mode="after")
    def _chosen_dtype(self) -> Experiment:
        if self.model.dtype == "auto":
            # The settings of a run never say auto, so their digest names the choice. (Frozen: no plain assignment.)
            object.__setattr__(self, "model", self.model.model_copy(update={"dtype": self._dtype()}))
        return self

    def _dtype(self) -> str:
        """`model.dtype`; for auto, the choice."""
        if self.model.dtype != "auto":
            return self.model.dtype
        from rayfed.device import multiplies_bfloat16  # takes a second to import

        exact = self.data.source == "lowrank"  # computes in float32 alone
        return "bfloat16" if not exact and multiplies_bfloat16(self.engine.device) else "float32"

    def mistakes(self) -> Iterator[str]:
        if self.lora.compute == "bfloat16" and (dtype := self._dtype()) != "bfloat16":
            needs = f"that needs model.dtype=bfloat16, and the dtype is {dtype}; auto and float32 are allowed"
            yield mistake("lora.compute", "bfloat16", needs)
        if self.model.load_in_4bit and self.engine.device != "cuda":
            what = f"engine.device={self.engine.device} does not compute with 4 bits; allowed with engine.device=cuda"
            yield mistake("model.load_in_4bit", True, what)
        if self.lora.train == "head" and self.model.head == "frozen":
            yield mistake("lora.train", "head", "model.head=frozen leaves nothing to train; all is allowed")
        if self.engine.kind == "ray" and self.engine.device == "cuda" and not self.engine.gpus:
            yield mistake("engine.gpus_per_worker", 0, "engine.device=cuda needs more than 0")
        if self.lora.train == "head" and self.model.adapter is not None:
            yield mistake("lora.train", "head", "model.adapter has layers, which would not train; use all")
        if (sequence := self.partition.sequence) is not None and self.server.rounds % sequence.experiences:
            multiple = f"a multiple of partition.sequence.experiences={sequence.experiences} is allowed"
            yield mistake("server.rounds", self.server.rounds, f"all experiences have equally many rounds: {multiple}")
        clients, each = self.partition.clients, self.problem.numbers_per_client
        if self.data.source == "lowrank" and clients * each > MOST_NUMBERS:
            size = f"{each} numbers each (problem.inputs * (problem.rows + problem.outputs))"
            most = f"these are {clients * each} numbers, and at most {MOST_NUMBERS} are allowed"
            yield mistake("partition.clients", clients, f"with {size} {most}")
        yield from self._profile_mistakes()

    def _profile_mistakes(self) -> Iterator[str]:
        own, largest = self.profiles, self.lora.rank
        first = next((rank for rank in own.ranks or () if rank > largest), 0)
        for field, rank in (("ranks", first), ("low", own.low), ("high", own.high or 1)):
            if rank > largest:
                yield mistake(f"profiles.{field}", rank, f"no rank may exceed lora.rank={largest}, the server's")
        high = own.high or largest
        if largest >= own.low > high:
            yield mistake("profiles.low", own.low, f"it may not exceed profiles.high={high}")
        elif own.mean is not None and not own.low <= own.mean <= high:
            yield mistake("profiles.mean", own.mean, f"it should be from low={own.low} to high={high}")
        if own.kind == "list" and self.partition.kind != "natural" and own.entries != self.partition.clients:
            has = f"the population has {self.partition.clients} clients (partition.clients)"
            yield f"profiles.{next(iter(own.lists))}: got {own.entries} values, but {has}"

    def with_(self, *overrides: str | Mapping[str, Any]) -> Experiment:
        """These settings with changes: `with_("server.rounds=5")` as on the command line, or `with_({"seed": 1})`.

        A mapping has dotted names and values. UserError, one line per mistake, where a change is wrong.
        """
        from rayfed.config.load import changed  # reads this schema

        return changed(self, overrides)

    def digest(self) -> str:
        """SHA-256 (first 16 hex digits) of the settings that decide the result; see the module docstring."""
        from rayfed.config.marks import settings_digest  # reads this schema

        return settings_digest(self.model_dump(mode="json"))
