"""A run without a model: its clients answer at once, so a benchmark measures everything but training.

The adapter has 600,000 entries by default. Clients send one of a few uploads that are made before the clock starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from rayfed import wire
from rayfed.api import prepare
from rayfed.clients.messages import TrainJob, TrainResult
from rayfed.clients.plan import RunPlan
from rayfed.config import validate
from rayfed.methods import PackSum
from rayfed.methods.base import Sparse
from rayfed.server.executor import Executor, Submission, SubmissionResult
from rayfed.tasks.base import Task
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.low_rank_regression import NumberRows
from rayfed.tasks.models.base import FrozenBase

RANK = 16
DENSITY = 1 / 16
DISTINCT = 16  # different uploads: together larger than a core's cache


@dataclass(frozen=True)
class Shape:
    """``layers`` square layers of ``width``, each with a pair of rank 16."""

    layers: int = 25
    width: int = 750

    @property
    def entries(self) -> int:
        """Entries of the adapter."""
        return 2 * RANK * self.layers * self.width


@dataclass(frozen=True)
class StubTask(Task):
    """A model of linear layers without memory and without a head. Nothing is trained or evaluated."""

    shape: Shape

    def load_base(self, federation: Federation) -> FrozenBase:
        side = self.shape.width
        layers = {f"layer{i:03}": nn.Linear(side, side, bias=False, device="meta") for i in range(self.shape.layers)}
        return FrozenBase(nn.ModuleDict(layers), ())


def stub_plan(method: str, shape: Shape, cohort: int, population: int, rounds: int, pack: int) -> RunPlan:
    """The plan of a run of ``method`` at density 1/16 both ways, on data with one row a client and no test rows."""
    experiment = validate(
        {
            "method": {"name": method},
            "lora": {"rank": RANK, "target_modules": "all-linear"},
            "wire": {"down": {"density": DENSITY}, "up": {"density": DENSITY}},
            "server": {"cohort": cohort, "rounds": rounds},
            "engine": {"pack": pack},
            "tracking": {"console": "off", "wandb": "off"},
        }
    )
    rows, nothing = (NumberRows(empty, empty) for empty in (np.zeros((n, 0), np.float32) for n in (population, 0)))
    each = np.arange(population + 1)
    federation = Federation(rows, nothing, nothing, ("a", "b"), each[:-1], each)
    return prepare(experiment, task=StubTask(shape), federation=federation)


@dataclass(frozen=True)
class Upload:
    """A vector's largest entries, and the payload that carries them."""

    indices: Tensor
    values: Tensor
    payload: bytes


def make_uploads(entries: int, count: int = DISTINCT) -> list[Upload]:
    """Different uploads of normal entries at density 1/16; the same in every run."""
    made = []
    for k in range(count):
        x = torch.randn(entries, generator=torch.Generator().manual_seed(k))
        indices = wire.top_k(x, wire.keep_count(entries, DENSITY))
        made.append(Upload(indices, x[indices], wire.encode(x, indices=indices)))
    return made


def add_all(uploads: Sequence[Upload], count: int, entries: int) -> Tensor:
    """The bare loop: the sum (entries,) of ``count`` uploads by `index_add_`, without decoding anything."""
    total = torch.zeros(entries)
    for k in range(count):
        upload = uploads[k % len(uploads)]
        total.index_add_(0, upload.indices, upload.values)
    return total


@dataclass
class StubExecutor(Executor):
    """Answers every training job with uploads from its list, by client id. There is nothing to evaluate.

    A pack that is to be summed always gets the sum of the same uploads, made before the clock starts.
    """

    uploads: Sequence[Upload]

    @cached_property
    def sum(self) -> PackSum:
        """A pack's sum. To add it costs the server the same, whatever the size of the pack."""
        n = wire.inspect(self.uploads[0].payload).n
        return PackSum.of([(1.0, Sparse(n, made.indices, made.values)) for made in self.uploads], n)

    def run(self, submissions: Sequence[Submission]) -> Iterator[SubmissionResult]:
        for index, submission in enumerate(submissions):
            assert isinstance(submission.job, TrainJob)  # there are no rows to evaluate on
            orders = submission.job.orders
            k, nothing = len(orders), (None,) * len(orders)
            payloads = tuple(self.uploads[order.client % len(self.uploads)].payload for order in orders)
            sizes = tuple(map(wire.inspect, payloads))
            sums = (replace(self.sum, weight=float(k)),) if submission.job.summed else ()
            result = TrainResult(
                () if sums else payloads, nothing, (0.0,) * k, (1,) * k, (1,) * k, (RANK,) * k, 0.0, (k,), sizes, sums
            )
            yield SubmissionResult(index, result)
