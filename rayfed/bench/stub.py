"""A run without a model: its clients answer at once, so a benchmark measures everything but training.

The adapter has 590,000 entries by default. Clients send one of a few uploads that are made before the clock starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice
from typing import NamedTuple

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
LAYERS, WIDTH = 24, 768


@dataclass(frozen=True)
class StubTask(Task):
    """A model of ``layers`` square linear layers of ``width`` without memory and without a head. Nothing is trained."""

    layers: int = LAYERS
    width: int = WIDTH

    def entries(self, rank: int = RANK) -> int:
        """Entries of an adapter that has a pair of this rank in every layer."""
        return 2 * rank * self.layers * self.width

    def load_base(self, federation: Federation) -> FrozenBase:
        side = self.width
        layers = {f"layer{i:03}": nn.Linear(side, side, bias=False, device="meta") for i in range(self.layers)}
        return FrozenBase(nn.ModuleDict(layers), ())


def stub_plan(
    method: str, task: StubTask, cohort: int, population: int, rounds: int, pack: int,
    ranks: Sequence[int] = (RANK,), density: float = DENSITY,
) -> RunPlan:  # fmt: skip
    """The plan of a run of ``method`` at this density both ways, on data with one row a client and no test rows.

    Client k has the rank ``ranks[k % len(ranks)]``.
    """
    experiment = validate(
        {
            "method": {"name": method},
            "lora": {"rank": max(ranks), "target_modules": "all-linear"},
            "profiles": {"kind": "tiers", "ranks": list(ranks)},
            "wire": {"down": {"density": density}, "up": {"density": density}},
            "server": {"cohort": cohort, "rounds": rounds},
            "engine": {"pack": pack},
            "tracking": {"console": "off", "wandb": "off"},
        }
    )
    rows, nothing = (NumberRows(empty, empty) for empty in (np.zeros((n, 0), np.float32) for n in (population, 0)))
    each = np.arange(population + 1)
    federation = Federation(rows, nothing, nothing, ("a", "b"), each[:-1], each)
    return prepare(experiment, task=task, federation=federation)


class Upload(NamedTuple):
    """A vector's largest entries, and the payload that carries them."""

    change: Sparse
    payload: bytes


def make_uploads(entries: int, count: int = DISTINCT, density: float = DENSITY) -> list[Upload]:
    """So many different uploads of normal entries at this density; the same in every run."""
    made = []
    for k in range(count):
        x = torch.randn(entries, generator=torch.Generator().manual_seed(k))
        indices = wire.top_k(x, wire.keep_count(entries, density))
        payload = wire.encode(x, indices=None if density == 1 else indices)
        made.append(Upload(Sparse(entries, indices, x[indices]), payload))
    return made


def add_all(uploads: Sequence[Upload], count: int) -> Tensor:
    """The bare loop: the sum (entries,) of ``count`` uploads by `index_add_`, without decoding anything."""
    total = torch.zeros(uploads[0].change.n)
    for upload in islice(cycle(uploads), count):
        total.index_add_(0, upload.change.indices, upload.change.values)
    return total


@dataclass
class StubExecutor(Executor):
    """Answers every training job with uploads from its lists. There is nothing to evaluate.

    ``uploads`` lists uploads by the number of entries of a client's adapter; the client's id selects one of them. A
    pack that is to be summed gets a sum that was made before the clock starts: of one upload, or of all in the list.
    """

    uploads: Mapping[int, Sequence[Upload]]

    @cached_property
    def sums(self) -> dict[int, list[PackSum]]:
        """By number of entries, the sums of all uploads and of each upload alone.

        To add the sum of a pack costs the server the same, whatever the size of the pack.
        """
        parts = {n: [made, *([upload] for upload in made)] for n, made in self.uploads.items()}
        return {n: [PackSum.of([(1.0, own.change) for own in part], n) for part in parts[n]] for n in parts}

    def run(self, submissions: Sequence[Submission]) -> Iterator[SubmissionResult]:
        for index, submission in enumerate(submissions):
            assert isinstance(submission.job, TrainJob)  # there are no rows to evaluate on
            orders = submission.job.orders
            k, n = len(orders), orders[0].layout.size
            places = [order.client % len(self.uploads[order.layout.size]) for order in orders]
            payloads = tuple(self.uploads[order.layout.size][i].payload for order, i in zip(orders, places))
            sizes = tuple(map(wire.inspect, payloads))
            sums: tuple[PackSum, ...] = ()
            if submission.job.summed:
                sums = (replace(self.sums[n][0 if k > 1 else 1 + places[0]], weight=float(k)),)
            result = TrainResult(
                () if sums else payloads, (None,) * k, (0.0,) * k, (1,) * k, (1,) * k, (RANK,) * k, 0.0, (k,), sizes,
                sums,
            )  # fmt: skip
            yield SubmissionResult(index, result)
