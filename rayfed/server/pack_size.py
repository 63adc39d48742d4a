"""`engine.pack: auto`: how many clients train together, chosen once, before the first round, from measurements.

The model: a step of a pack with x tokens lasts a + b x seconds and needs c + d x bytes. The lines are fitted to the
measurements of a worker (`rayfed.clients.pack_timing`). For packs of k clients,

    packs = ceil(cohort / k),  round = ceil(packs / workers) (a + b tokens cohort / packs)      (up to a factor: steps)

Candidates are the sizes up to the largest measured one that fit into 80 % of the free memory. The choice is the
smallest size whose round is at most 3 % longer than the shortest. So no worker is left without a pack. The choice is a
function of the measurements. Measurements are noisy, so both are written down, and the run is resumed and repeated with
the number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from rayfed.clients.messages import MeasureJob, MeasureResult, PackTiming
from rayfed.clients.pack_timing import PAYS
from rayfed.clients.plan import RunPlan
from rayfed.server.executor import Executor, Submission
from rayfed.server.sampling import client_costs, cohort

LARGEST = 64  # clients of the largest pack that is measured
SHARE = 0.8  # of the memory that is free: later rounds have longer texts


@dataclass(frozen=True)
class LinearFit:
    """``fixed + slope x``."""

    fixed: float
    slope: float

    def at(self, x: float) -> float:
        return self.fixed + self.slope * x


@dataclass(frozen=True)
class Choice:
    """The size of packs, and what it was chosen from, as in `pack.json`. ``tokens``: the most of a client in a step."""

    size: int
    cohort: int
    workers: int
    memory: int  # free bytes of one worker
    tokens: float
    seconds: LinearFit
    bytes: LinearFit
    measured: tuple[PackTiming, ...]

    def time_model(self) -> str:
        """The duration of a step, in words."""
        return f"{1e3 * self.seconds.fixed:.1f} ms, and {1e3 * self.seconds.slope * self.tokens:.1f} ms a client"

    def memory_model(self) -> str:
        """The memory of a step, in words."""
        fixed, each = self.bytes.fixed / 2**20, self.bytes.slope * self.tokens / 2**20
        return f"{fixed:.0f} MiB, and {each:.1f} MiB a client; {self.memory / 2**30:.1f} GiB are free for a worker"


def measure_job(plan: RunPlan) -> MeasureJob:
    """What a worker measures: clients of the first round, those with most tokens a step first, in packs of 1, 2, 4, ...

    The largest size leaves no worker without a pack, and is at most 64.
    """
    most = min(-(-plan.server.cohort // plan.engine.processes), LARGEST)
    sizes = tuple(sorted({*(2**i for i in range(most.bit_length()) if 2**i < most), most}))
    federation = plan.federation_at(0)
    drawn = cohort(federation.holders, plan.server.cohort, plan.seed, 0)
    tokens = client_costs(federation, plan.client.model_copy(update={"steps": 1}))
    return MeasureJob(tuple(sorted(map(int, drawn), key=lambda c: (-tokens[c], c))[:most]), sizes)


def choose_pack(plan: RunPlan, executor: Executor) -> Choice:
    """Lets a worker measure, and chooses. RunError where not even one client fits into its memory."""
    (done,) = executor.run([Submission(measure_job(plan))])
    found = cast(MeasureResult, done.result)
    return choose_size(found.measured, plan.server.cohort, plan.engine.processes, found.memory)


def choose_size(measured: Sequence[PackTiming], cohort: int, workers: int, memory: int) -> Choice:
    """The choice for rounds of ``cohort`` clients on ``workers`` that have ``memory`` bytes each; see the module."""
    x = [m.tokens for m in measured]
    seconds, space = line(x, [m.seconds for m in measured]), line(x, [m.bytes for m in measured])
    # The line is raised over all measurements: memory must not be underestimated.
    above = max(m.bytes - space.at(m.tokens) for m in measured)
    space = LinearFit(space.fixed + max(above, 0.0), space.slope)
    tokens = max(m.tokens / m.size for m in measured)

    def length(size: int) -> float:
        packs = -(-cohort // size)
        return -(-packs // workers) * seconds.at(tokens * cohort / packs)

    most = max(m.size for m in measured)
    sizes = [k for k in range(1, most + 1) if k == 1 or space.at(k * tokens) <= SHARE * memory]
    shortest = min(map(length, sizes))
    size = next(k for k in sizes if length(k) <= shortest * (1 + PAYS))
    return Choice(size, cohort, workers, memory, tokens, seconds, space, tuple(measured))


def line(x: Sequence[float], y: Sequence[float]) -> LinearFit:
    """The line with the least squared relative errors whose two numbers are not negative; through 0 for one point."""
    one = 1 / np.maximum(np.asarray(y, dtype=float), 1e-12)
    run = np.asarray(x, dtype=float) * one
    fixed, slope = np.linalg.lstsq(np.stack([one, run], 1), np.ones(len(one)), rcond=None)[0]
    if len(one) == 1 or fixed < 0:
        return LinearFit(0.0, float(run.sum() / run.dot(run)))
    if slope < 0:
        return LinearFit(float(one.sum() / one.dot(one)), 0.0)
    return LinearFit(float(fixed), float(slope))
