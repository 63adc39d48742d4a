"""Scale: what a client costs beside its training, in a population of a million.

Whole rounds of the server's own loop: the draw, profiles, orders, ledger, decode, aggregation, metrics, checkpoint. The
clients answer at once, so all of it is overhead. Against it: a bare loop of `index_add_` over the same uploads.

The adapter is small (60,000 entries), so that the clients' own cost shows; two more rows have the 600,000 entries of
`bench aggregate`, which measures what grows with the adapter: decoded by the server, and in packs that come as sums.
The state's digest and checkpoint are paid once a round, whoever takes part: they are most of what a small cohort costs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from rayfed.bench.stub import Shape, StubExecutor, make_uploads, memory, settings
from rayfed.bench.timing import Row, one_thread, paired
from rayfed.server.loop import Server
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.known_answer.regression import Regression
from rayfed.tracking import open_sinks

DENSITY = 1 / 16
COHORTS = (10, 100, 1_000, 10_000)
PACK = 32
SMALL, LARGE = Shape(layers=10, width=188), Shape()


@one_thread
def measure(
    cohorts: tuple[int, ...] = COHORTS, population: int = 1_000_000, rounds: int = 20, large: Shape = LARGE
) -> list[Row]:
    """So many rounds of FLASC for each size of cohort; and for one of up to 1,000 of the large adapter, twice."""
    cases = [(size, SMALL, 1) for size in cohorts]
    some = min(1_000, max(cohorts))
    cases += [(some, large, 1), (some, large, PACK)]
    return [_cohort(size, population, rounds, shape, pack) for size, shape, pack in cases]


def one_row_each(population: int) -> Federation:
    """Every client holds one row of data, and there is none to evaluate on."""
    nothing = Regression(np.zeros((0, 1), np.float32), np.zeros((0, 1), np.float32))
    rows = Regression(np.zeros((population, 0), np.float32), np.zeros((population, 0), np.float32))
    each = np.arange(population + 1)
    return Federation(rows, nothing, nothing, ("a", "b"), each[:-1], each, pad_id=0)


def _cohort(size: int, population: int, rounds: int, shape: Shape, pack: int) -> Row:
    experiment = settings("flasc", DENSITY, size, population, rounds).with_pack(pack)
    made = make_uploads(shape.entries, DENSITY)
    resident: list[float] = []

    def bare() -> None:
        total = torch.zeros(shape.entries)
        for k in range(size):
            upload = made[k % len(made)]
            total.index_add_(0, upload.indices, upload.values)

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        sinks = open_sinks(experiment.tracking, out)
        server = Server(
            experiment, one_row_each(population), shape.model_spec(), StubExecutor(made), out, sinks, resume=False
        )
        stream = server.rounds()

        def one() -> None:
            next(stream)
            resident.append(memory("VmRSS"))

        ours = (f"a round, adapter of {shape.entries}, packs of {pack}", one)
        row = paired(f"cohort {size} of {population}", ours, ("bare index_add_", bare), rounds - 1)
        sinks.close()
    row.facts["ms a client"] = 1e3 * row.seconds_a / size
    row.facts["ms a client, cpu"] = 1e3 * (row.cpu_a or row.seconds_a) / size
    early = resident[min(3, rounds) - 1]
    row.facts["MB after round 3"] = early
    row.facts[f"after {rounds}"] = resident[-1]
    row.facts["times that"] = resident[-1] / early
    row.facts["most"] = max(resident)
    return row
