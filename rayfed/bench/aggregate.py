"""Aggregation: from the bytes of all uploads to the next global state, against bare `index_add_`.

A is the server's own round: orders, ledger, checks, decoding, the sums of FLASC and FedIT, the server's step. Clients
come in packs, which are summed where they were trained; one row has packs of one client, which the server decodes
itself. B adds the same values at the same indices to one fp32 vector. B decodes nothing and knows no clients.

"worker ms an upload" is the time in which a worker decodes and adds one upload. The stub leaves out training.
"""

from __future__ import annotations

from functools import partial

import torch

from rayfed import wire
from rayfed.bench.stub import Shape, StubExecutor, Upload, add_all, make_uploads, stub_plan
from rayfed.bench.timing import Row, one_thread, paired, timed
from rayfed.clients.device_memory import forget_peak, peak
from rayfed.clients.transfer import Uploadable
from rayfed.methods import PackSum, Profile
from rayfed.server.base_updates import BaseUpdates
from rayfed.server.downlink import Downlink
from rayfed.server.optimizers import ServerOptimizer
from rayfed.server.star import RoundLog, train_round

CASES = (("flasc", 32), ("fedit", 32), ("flasc", 1))  # methods, and clients in a pack
CPU = torch.device("cpu")


@one_thread
def measure(uploads: int = 10_000, shape: Shape | None = None, pairs: int = 3) -> list[Row]:
    """A round of FLASC in packs, one of FedIT, and one of FLASC without packs, of so many uploads each."""
    shape = shape or Shape()
    made = make_uploads(shape.entries)
    return [_method(name, uploads, pack, shape, made, pairs) for name, pack in CASES]


def _method(name: str, uploads: int, pack: int, shape: Shape, made: list[Upload], pairs: int) -> Row:
    plan = stub_plan(name, shape, uploads, uploads, 1, pack)
    executor, optimizer = StubExecutor(made), ServerOptimizer(plan.server_optimizer, plan.server)
    state = plan.method.init(plan.start(), plan.seed)
    clients = [plan.profiles.profile(k, 1, 0) for k in range(uploads)]

    def server(clients: list[Profile]) -> None:
        downlink = Downlink(plan.method, state, plan.wire.down.values, plan.channel, executor)
        packs = [clients[i : i + pack] for i in range(0, len(clients), pack)]
        log = RoundLog(1, wire.Ledger(), BaseUpdates())
        train_round(plan, state, 0, packs, optimizer, downlink, executor, log)

    server(clients[:1])  # the optimizer's moments exist from now on: they are state
    tensors = (*state.tensors().values(), *optimizer.state.values())
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
    before = forget_peak(CPU)
    server(clients)
    most = peak(CPU)
    facts = {"MB at the peak": (most - before) / 1e6, "allowed": 3 * megabytes + 200, "MB in all": most / 1e6}
    ours = (f"{uploads} uploads of {shape.entries} at 1/16", partial(server, clients))
    bare = ("bare index_add_", partial(add_all, made, uploads, shape.entries))
    row = paired(f"{name}, packs of {pack}", ours, bare, pairs, facts)
    row.facts["uploads/s"] = uploads / row.seconds_a
    if pack > 1:
        row.facts["worker ms an upload"] = 1e3 * _worker_seconds(made)
    return row


def _worker_seconds(made: list[Upload]) -> float:
    """Seconds in which a worker decodes an upload and adds it to a pack's sum."""
    n = wire.inspect(made[0].payload).n
    everything = Uploadable(n, None)

    def added() -> PackSum:
        return PackSum.of([(1.0, everything.placed(wire.decode(upload.payload))) for upload in made], n)

    added()
    return timed(added)[0].wall / len(made)
