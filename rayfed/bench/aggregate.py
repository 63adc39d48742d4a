"""Aggregation: from the bytes of all uploads to the next global state, against a bare loop.

A is the server's own round: downlink, orders, ledger, checks, decoding, the method's sums, the server's step. The stub
leaves out training.

- FLASC and FedIT need only sums: clients come in packs, which are summed where they were trained. B adds the same
  values at the same indices to one fp32 vector by `index_add_`. B decodes nothing and knows no clients. "worker ms an
  upload" is the time in which a worker decodes and adds one upload.
- FedHL and FlexLoRA need every product: clients of ranks 4 to 32 send all entries. B adds each client's product to a
  float64 matrix a layer by `addmm_`, one client after the other. B decodes nothing and decomposes nothing.
- FedView decomposes what a client's view lacks, for each layer, and stores the views. A is a whole round of the
  server's loop, records and checkpoint included. B takes `torch.svd_lowrank` of as many matrices.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, PositiveInt

from rayfed import wire
from rayfed.bench.stub import LAYERS, RANK, WIDTH, StubExecutor, StubTask, Upload, add_all, make_uploads, stub_plan
from rayfed.bench.timing import Row, one_thread, paired, timed
from rayfed.clients.device_memory import forget_peak, peak
from rayfed.clients.plan import RunPlan
from rayfed.clients.transfer import Uploadable
from rayfed.errors import allowed
from rayfed.lora.adapter import LowRank
from rayfed.lora.algebra import OVERSAMPLE
from rayfed.methods import PackSum
from rayfed.server.base_updates import BaseUpdates
from rayfed.server.downlink import Downlink
from rayfed.server.loop import Server
from rayfed.server.optimizers import ServerOptimizer
from rayfed.server.star import RoundLog, train_round
from rayfed.tracking import open_sinks

METHODS = ("flasc", "fedit", "fedhl", "flexlora", "fedview")
PACKS = {"flasc": (32, 1), "fedit": (32,)}  # clients in a pack
MIXED = (4, 8, 16, 32)
FEW = 4  # different uploads of each rank: together larger than a core's cache
COHORT, ROUNDS = 10, 6  # clients of FedView in a round, and its rounds before the clock starts
POPULATIONS = (10_000, 2 * COHORT, COHORT)  # all clients are new; nearly all come again; all come in every round
CPU = torch.device("cpu")


@one_thread()
def measure(
    uploads: PositiveInt = 10_000, products: PositiveInt = 1_000, layers: PositiveInt = LAYERS,
    width: PositiveInt = WIDTH, pairs: PositiveInt = 3,
    methods: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = METHODS,
) -> list[Row]:  # fmt: skip
    """A round of each method: of so many uploads that are summed, of so many products, and of FedView.

    UserError for another method.
    """
    for name in methods:
        if name not in METHODS:
            raise allowed("methods", name, f"there are {', '.join(METHODS)}")
    task, rows = StubTask(layers, width), []
    for name in methods:
        if name in PACKS:
            rows += [_sums(name, pack, uploads, task, pairs) for pack in PACKS[name]]
        elif name == "fedview":
            rows += [_views(population, task, pairs) for population in POPULATIONS]
        else:
            rows.append(_products(name, products, task, pairs))
    return rows


class _Server:
    """A server whose clients answer at once; `round` is one round of all of them."""

    def __init__(self, plan: RunPlan, executor: StubExecutor, clients: int, pack: int) -> None:
        self.plan, self.executor, self.pack = plan, executor, pack
        self.optimizer = ServerOptimizer(plan.server_optimizer, plan.server)
        self.state = plan.method.init(plan.start(), plan.seed)
        self.clients = [plan.profiles.profile(k, 1, 0) for k in range(clients)]

    def round(self, clients: int | None = None) -> None:
        """A round of these clients. Its result is the new state."""
        plan, chosen = self.plan, self.clients[:clients]
        downlink = Downlink(plan, self.state, 0, self.executor)
        packs = [chosen[i : i + self.pack] for i in range(0, len(chosen), self.pack)]
        log = RoundLog(1, wire.Ledger(), BaseUpdates())
        self.state = train_round(plan, self.state, 0, packs, self.optimizer, downlink, self.executor, log)

    def against(self, name: str, what: str, bare: tuple[str, Callable[[], object]], pairs: int) -> Row:
        """The row of whole rounds against ``bare``, with the memory that a round takes."""
        self.round(1)  # the optimizer's moments exist from now on: they are state
        tensors = (*self.state.tensors().values(), *self.optimizer.state.values())
        megabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
        before = forget_peak(CPU)
        self.round()
        most = peak(CPU)
        facts = {"MB at the peak": (most - before) / 1e6, "allowed": 3 * megabytes + 200, "MB in all": most / 1e6}
        return paired(name, (what, self.round), bare, pairs, facts)


def _sums(name: str, pack: int, uploads: int, task: StubTask, pairs: int) -> Row:
    made = make_uploads(task.entries())
    executor = StubExecutor({task.entries(): made})
    server = _Server(stub_plan(name, task, uploads, uploads, 1, pack), executor, uploads, pack)
    bare = ("bare index_add_", partial(add_all, made, uploads))
    row = server.against(f"{name}, packs of {pack}", f"{uploads} uploads of {task.entries()} at 1/16", bare, pairs)
    row.facts["uploads/s"] = uploads / row.seconds_a
    row.facts["worker ms an upload"] = 1e3 * _worker_seconds(made, pack)
    return row


def _products(name: str, clients: int, task: StubTask, pairs: int) -> Row:
    made = {task.entries(rank): make_uploads(task.entries(rank), FEW, 1.0) for rank in MIXED}
    server = _Server(stub_plan(name, task, clients, clients, 1, 1, MIXED, 1.0), StubExecutor(made), clients, 1)
    layouts = [server.plan.method.broadcast(server.state, client).layout for client in server.clients[: len(MIXED)]]
    pairs_of = [
        layout.unflatten(upload.change.dense()).layers for i in range(FEW) for layout in layouts
        for upload in [made[layout.size][i]]
    ]  # fmt: skip
    bare = ("bare addmm_", partial(_add_products, pairs_of, clients))
    return server.against(name, f"{clients} clients, {task.layers} layers of {task.width} x {task.width}", bare, pairs)


def _add_products(uploads: Sequence[Mapping[str, LowRank]], count: int) -> dict[str, torch.Tensor]:
    """The bare loop: by layer, the float64 sum of the products of ``count`` clients, one at a time."""
    totals = {
        name: torch.zeros(pair.B.shape[0], pair.A.shape[1], dtype=torch.float64) for name, pair in uploads[0].items()
    }
    for layers in islice(cycle(uploads), count):
        for name, pair in layers.items():
            totals[name].addmm_(pair.B.double(), pair.A.double(), alpha=pair.scale)
    return totals


def _views(population: int, task: StubTask, pairs: int) -> Row:
    made = {task.entries(): make_uploads(task.entries(), density=1.0)}
    plan = stub_plan("fedview", task, COHORT, population, ROUNDS + pairs, 1, density=1.0)
    W = torch.randn(task.width, task.width, generator=torch.Generator().manual_seed(0))

    def decompose() -> None:
        for _ in range(COHORT * task.layers):
            torch.svd_lowrank(W, q=RANK + OVERSAMPLE, niter=2)

    with tempfile.TemporaryDirectory() as folder:
        sinks = open_sinks(plan.tracking, Path(folder))
        rounds = Server(plan, StubExecutor(made), Path(folder), sinks, resume=False).rounds()
        for _ in range(ROUNDS - 1):
            next(rounds)
        what = f"{COHORT} of {population} clients, {task.layers} layers of {task.width} x {task.width}"
        bare = (f"svd_lowrank of {COHORT * task.layers} matrices", decompose)
        row = paired("fedview", (what, partial(next, rounds)), bare, pairs)
        sinks.close()
    return row


def _worker_seconds(made: list[Upload], pack: int) -> float:
    """Seconds in which a worker decodes an upload and adds it to its pack's sum."""
    everything = Uploadable(made[0].change.n, None)
    size = min(pack, len(made))

    def added() -> None:
        for i in range(0, len(made), size):
            uploads = made[i : i + size]
            PackSum.of(((1.0, everything.placed(wire.decode(upload.payload))) for upload in uploads), everything.n)

    added()
    return timed(added)[0].wall / len(made)
