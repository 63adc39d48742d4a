"""Random rounding (`wire.*.values: qsgd4`) is keyed: by run, direction, round and client, and by nothing else."""

from __future__ import annotations

from dataclasses import replace

import torch
from small_runs import lowrank

import rayfed
from rayfed import wire
from rayfed.api import prepare
from rayfed.clients.messages import ClientOrder, TrainJob
from rayfed.clients.trainer import Trainer
from rayfed.engine.local_executor import LocalExecutor
from rayfed.methods import Trainable
from rayfed.seeding import derive_seed
from rayfed.server.downlink import Downlink


def test_uploads_are_rounded_by_a_key_of_round_and_client():
    plan = prepare(lowrank())
    trainer, adapter = Trainer(plan), plan.start()
    payload, n = [wire.encode(adapter.flatten())], adapter.layout.size
    seen = set()
    for t, client in ((0, 1), (0, 2), (1, 1)):
        order = ClientOrder(client, adapter.layout, 0, Trainable(), n, 1.0, "fp32")
        uploads = [
            trainer.execute(TrainJob(t, 0.05, (replace(order, values=values),)), payload).uploads[0]
            for values in ("fp32", "qsgd4", "qsgd4")
        ]
        change, seed = wire.decode(uploads[0]).dense(), derive_seed(plan.seed, "rounding.up", t, client)
        assert uploads[1] == uploads[2] == wire.encode(change, values="qsgd4", seed=seed)
        seen.add(seed)
    assert len(seen) == 3


def test_downloads_are_rounded_by_a_key_of_round_and_tier():
    mixed = ("method.name=flexlora", "profiles.kind=tiers", "profiles.ranks=[1,2]")
    plan = prepare(lowrank(*mixed, "wire.down.values=qsgd4"))
    layout = plan.start().layout
    values = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    state, executor = plan.method.init(layout.unflatten(values), 0), LocalExecutor(plan)

    def payload(t: int, client: int) -> bytes:
        return Downlink(plan, state, t, executor).of(plan.profiles.profile(client, 8, t)).payloads[0]

    assert payload(0, 0) == payload(0, 2)  # of one tier
    assert payload(0, 0) != payload(1, 0)
    assert wire.decode(payload(0, 1)).n > wire.decode(payload(0, 0)).n
    executor.close()


def test_a_run_in_packs_sends_the_same_bytes_again(tmp_path):
    coarse = ("wire.up.values=qsgd4", "wire.up.density=0.5", "wire.down.values=qsgd6", "engine.pack=2")
    chains = [
        [record["state/chain"] for record in rayfed.run(lowrank(*coarse, more), out=tmp_path / name).metrics]
        for name, more in (("one", "seed=0"), ("two", "seed=0"), ("three", "seed=1"))
    ]
    assert chains[0] == chains[1] != chains[2]
