"""Aggregation: uploads as the driver takes them, from bytes to the next global state, against bare `index_add_`.

The driver's side is its own code: orders, ledger, checks, decode, FLASC's and FedIT's sums, the server's step. The bare
loop adds the same values at the same indices to one fp32 vector; it decodes nothing and knows no clients.
"""

from __future__ import annotations

from functools import partial

import torch

from rayfed.bench.stub import Shape, StubCrew, Upload, forget_peak, make_uploads, memory, settings
from rayfed.bench.timing import Row, one_thread, paired
from rayfed.clients.profiles import profile
from rayfed.methods import Profile
from rayfed.server.axes import resolve
from rayfed.server.catchup import CatchUp
from rayfed.server.downlink import Downlink
from rayfed.server.round import Books, Tally, updates
from rayfed.wire import Ledger

DENSITY = 1 / 16


@one_thread
def measure(uploads: int = 10_000, shape: Shape | None = None, pairs: int = 3) -> list[Row]:
    """A round of FLASC and one of FedIT, of so many uploads each."""
    shape = shape or Shape()
    made = make_uploads(shape.entries, DENSITY)
    return [_method(name, uploads, shape, made, pairs) for name in ("flasc", "fedit")]


def _method(name: str, uploads: int, shape: Shape, made: list[Upload], pairs: int) -> Row:
    experiment = settings(name, DENSITY, uploads, uploads, rounds=1)
    axes, crew = resolve(experiment), StubCrew(made)
    state = axes.method.init(shape.blueprint().start(experiment), experiment.seed)
    clients = [profile(k, 1, experiment, 0) for k in range(uploads)]

    def driver(clients: list[Profile]) -> None:
        downlink = Downlink(axes.method, state, experiment.wire.down.values, crew)
        books = Books(Ledger(), CatchUp(), Tally())
        packs = [[client] for client in clients]
        stream = updates(axes.method, state, 0, 1.0, packs, axes.weights, experiment, crew, downlink, books)
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
    row = paired(name, ours, ("bare index_add_", bare), pairs, facts)
    row.facts["uploads/s"] = uploads / row.seconds_a
    return row
