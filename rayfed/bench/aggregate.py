"""Aggregation: uploads as the driver takes them, from bytes to the next global state, against bare `index_add_`.

The driver's side is its own code: orders, ledger, checks, decode, FLASC's and FedIT's sums, the server's step. Clients
come in packs, summed where they were trained; one row shows packs of one, which the driver decodes itself. The bare
loop adds the same values at the same indices to one fp32 vector; it decodes nothing and knows no clients.

"worker ms an upload" is what a worker spends on decoding and adding, beside the training that the stub leaves out.
"""

from __future__ import annotations

from functools import partial

import torch

from rayfed import wire
from rayfed.bench.stub import Shape, StubExecutor, Upload, forget_peak, make_uploads, memory, settings
from rayfed.bench.timing import Row, one_thread, paired, timed
from rayfed.clients.transfer import Uploadable
from rayfed.methods import PackSum, Profile
from rayfed.profiles.client_profiles import profile
from rayfed.server.axes import resolve
from rayfed.server.base_updates import BaseUpdates
from rayfed.server.downlink import Downlink
from rayfed.server.star import RoundLog, RoundStats, updates
from rayfed.wire import Ledger

DENSITY = 1 / 16
CASES = (("flasc", 32), ("fedit", 32), ("flasc", 1))  # methods, and clients in a pack


@one_thread
def measure(uploads: int = 10_000, shape: Shape | None = None, pairs: int = 3) -> list[Row]:
    """A round of FLASC in packs, one of FedIT, and one of FLASC without packs, of so many uploads each."""
    shape = shape or Shape()
    made = make_uploads(shape.entries, DENSITY)
    return [_method(name, uploads, pack, shape, made, pairs) for name, pack in CASES]


def _method(name: str, uploads: int, pack: int, shape: Shape, made: list[Upload], pairs: int) -> Row:
    experiment = settings(name, DENSITY, uploads, uploads, rounds=1)
    axes, executor = resolve(experiment), StubExecutor(made)
    state = axes.method.init(shape.model_spec().start(experiment), experiment.seed)
    clients = [profile(k, 1, experiment, 0) for k in range(uploads)]

    def driver(clients: list[Profile]) -> None:
        downlink = Downlink(axes.method, state, experiment.wire.down.values, executor)
        books = RoundLog(Ledger(), BaseUpdates(), RoundStats())
        packs = [clients[i : i + pack] for i in range(0, len(clients), pack)]
        stream = updates(axes.method, state, 0, 1.0, packs, axes.weights, experiment, executor.run, downlink, books)
        axes.method.aggregate(state, stream, axes.optimizer.advance)

    def bare() -> None:
        total = torch.zeros(shape.entries)
        for k in range(uploads):
            upload = made[k % len(made)]
            total.index_add_(0, upload.indices, upload.values)

    driver(clients[:1])  # the optimizer's moments are there from now on: they are state
    tensors = (*state.tensors().values(), *axes.optimizer.state.values())
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
    before = memory("VmRSS")
    forget_peak()
    driver(clients)
    facts = {"MB at the peak": memory("VmHWM") - before, "allowed": 3 * held + 200, "MB in all": memory("VmHWM")}
    ours = (f"{uploads} uploads of {shape.entries} at 1/16", partial(driver, clients))
    row = paired(f"{name}, packs of {pack}", ours, ("bare index_add_", bare), pairs, facts)
    row.facts["uploads/s"] = uploads / row.seconds_a
    if pack > 1:
        row.facts["worker ms an upload"] = 1e3 * _worker_seconds(made)
    return row


def _worker_seconds(made: list[Upload]) -> float:
    """How long it takes to decode an upload and add it to a pack's sum."""
    n = wire.inspect(made[0].payload).n
    everything = Uploadable(n, None)

    def added() -> PackSum:
        return PackSum.of([(1.0, everything.placed(wire.decode(upload.payload))) for upload in made], n)

    added()
    return timed(added)[0].wall / len(made)
