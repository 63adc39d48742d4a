"""Scale: what a client costs the server besides its training, in a population of a million.

A is a whole round of the server's own loop: cohort, profiles, orders, ledger, decoding, aggregation, metrics,
checkpoint. The clients answer at once, so all of it is overhead. B is a bare loop of `index_add_` over the same
uploads.

The adapter is small (60,000 entries), so that the cost of the clients themselves is visible. Two more rows have the
590,000 entries of `bench aggregate`, to measure what grows with the adapter: one with packs of one client, one with
packs of 32. The state's digest and checkpoint cost the same in every round: they are most of what
a small cohort costs.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, PositiveInt

from rayfed.bench import Sizes
from rayfed.bench.stub import LAYERS, WIDTH, StubExecutor, StubTask, add_all, make_uploads, stub_plan
from rayfed.bench.timing import Row, one_thread, paired
from rayfed.clients.device_memory import forget_peak
from rayfed.server.loop import Server
from rayfed.tracking import open_sinks

PACK = 32
SMALL = StubTask(layers=10, width=188)


@one_thread()
def measure(
    cohorts: Sizes = (10, 100, 1_000, 10_000), population: PositiveInt = 1_000_000,
    rounds: Annotated[int, Field(ge=2)] = 20, layers: PositiveInt = LAYERS, width: PositiveInt = WIDTH,
) -> list[Row]:  # fmt: skip
    """So many rounds of FLASC for each size of cohort; and for one of up to 1,000 of the large adapter, twice.

    ``layers`` and ``width`` are those of the large adapter.
    """
    cases = [(size, SMALL, 1) for size in cohorts]
    some, large = min(1_000, max(cohorts)), StubTask(layers, width)
    cases += [(some, large, 1), (some, large, PACK)]
    return [_cohort(size, population, rounds, task, pack) for size, task, pack in cases]


def _cohort(size: int, population: int, rounds: int, task: StubTask, pack: int) -> Row:
    plan, made = stub_plan("flasc", task, size, population, rounds, pack), make_uploads(task.entries())
    resident: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        sinks = open_sinks(plan.tracking, Path(folder))
        stream = Server(plan, StubExecutor({task.entries(): made}), Path(folder), sinks, resume=False).rounds()

        def one() -> None:
            next(stream)
            resident.append(forget_peak(torch.device("cpu")) / 1e6)

        ours = (f"a round, adapter of {task.entries()}, packs of {pack}", one)
        bare = ("bare index_add_", partial(add_all, made, size))
        row = paired(f"cohort {size} of {population}", ours, bare, rounds - 1)
        sinks.close()
    early = resident[min(3, rounds) - 1]
    row.facts.update(
        {
            "ms a client": 1e3 * row.seconds_a / size,
            "ms a client, cpu": 1e3 * (row.cpu_a or row.seconds_a) / size,
            "MB after round 3": early,
            f"after {rounds}": resident[-1],
            "times that": resident[-1] / early,
            "most": max(resident),
        }
    )
    return row
