"""A run without a model: clients that answer at once, so that all the time there is goes into everything else.

The adapter has 600,000 entries by default. Its clients send one of a few uploads that were made before the clock runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rayfed import wire
from rayfed.clients.messages import TrainJob, TrainResult
from rayfed.config import Experiment
from rayfed.methods import PackSum
from rayfed.methods.base import Sparse
from rayfed.server.executor import Handle, Submission, SubmissionResult
from rayfed.tasks.models.spec import ModelSpec
from rayfed.tasks.models.unpadded import Padded

RANK = 16
DISTINCT = 16  # uploads that differ: more than a core's cache holds


@dataclass(frozen=True)
class Shape:
    """``layers`` square layers of ``width``, each with a pair of rank 16."""

    layers: int = 25
    width: int = 750

    @property
    def entries(self) -> int:
        """Entries of the adapter."""
        return 2 * RANK * self.layers * self.width

    def model_spec(self) -> ModelSpec:
        """As if a model had been looked at; there is no head."""
        shapes = {f"layer{i:03}": (self.width, self.width) for i in range(self.layers)}
        return ModelSpec(shapes, {}, {}, {}, 0, Padded("nothing trains"))


@dataclass(frozen=True)
class Upload:
    """A vector's largest entries, and the payload that carries them."""

    indices: Tensor
    values: Tensor
    payload: bytes


def make_uploads(entries: int, density: float, count: int = DISTINCT) -> list[Upload]:
    """Different uploads of a density, each of normal entries; the same in every run."""
    made = []
    for k in range(count):
        x = torch.randn(entries, generator=torch.Generator().manual_seed(k))
        indices = wire.top_k(x, wire.keep_count(entries, density))
        made.append(Upload(indices, x[indices], wire.encode(x, indices=indices)))
    return made


def settings(method: str, density: float, cohort: int, population: int, rounds: int) -> Experiment:
    """A run's settings; what concerns data and model is never asked for."""
    return Experiment.model_validate(
        {
            "method": {"name": method},
            "lora": {"rank": RANK},
            "wire": {"down": {"density": density}, "up": {"density": density}},
            "partition": {"clients": population},
            "server": {"cohort": cohort, "rounds": rounds},
            "tracking": {"console": "off", "wandb": "off"},
        }
    )


@dataclass
class StubExecutor:
    """Answers every training job with uploads from its list, by client id; there is nothing to evaluate.

    Where a pack is to be summed, always the sum of the same uploads, made before the clock runs.
    """

    uploads: Sequence[Upload]

    @cached_property
    def sum(self) -> PackSum:
        """What a worker makes of its pack, whatever its size: to add it costs the driver the same."""
        n = wire.inspect(self.uploads[0].payload).n
        return PackSum.of([(1.0, Sparse(n, made.indices, made.values)) for made in self.uploads], n)

    def put(self, payload: bytes) -> Handle:
        return payload

    def run(self, tasks: Sequence[Submission]) -> Iterator[SubmissionResult]:
        for index, task in enumerate(tasks):
            assert isinstance(task.job, TrainJob)  # there are no rows to evaluate on
            orders = task.job.orders
            k, nothing = len(orders), (None,) * len(orders)
            payloads = tuple(self.uploads[order.client % len(self.uploads)].payload for order in orders)
            sizes = tuple(map(wire.inspect, payloads))
            sums = (replace(self.sum, weight=float(k)),) if task.job.summed else ()
            result = TrainResult(
                () if sums else payloads, nothing, (0.0,) * k, (1,) * k, (1,) * k, (RANK,) * k, 0.0, (k,), sizes, sums
            )
            yield SubmissionResult(index, result)

    def drain_events(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


def memory(name: str) -> float:
    """This process's memory in MB as Linux counts it: `VmRSS` now, `VmHWM` at its peak; nan on other systems."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return float("nan")


def forget_peak() -> None:
    """From now on `VmHWM` is the peak since now, where the system can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
