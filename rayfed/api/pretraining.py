"""A small base model from the rows that no client has: `rayfed pretrain`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rayfed import seeding, tasks
from rayfed.api.plans import PRETRAINED, Settings, describe_objects, read_settings
from rayfed.config import Experiment
from rayfed.config.describe import digest
from rayfed.config.task import Model
from rayfed.device import prepare_process
from rayfed.errors import UserError, allowed
from rayfed.files import atomic_path, write_json
from rayfed.keywords import suggest_keywords
from rayfed.tasks._texts import SourceTask
from rayfed.tasks.base import Task
from rayfed.tasks.models.base import quiet
from rayfed.tasks.models.cache import forget_base
from rayfed.tasks.pretraining import train

DATA = ("task", "max_tokens", "packing", "prompt_template", "crop", "flip", "pretrain_share")
"""The settings of `data` that decide the model, given the rows."""
VERSION = 2  # of how a model is made: equal settings and versions, equal models


@suggest_keywords
def pretrain(
    experiment: Settings, *, task: Task | None = None, out: str | Path | None = None,
    report: Callable[[str], None] | None = print,
) -> Path:  # fmt: skip
    """Trains a small base model as the section `pretrain` says, and writes it as a folder of transformers.

    The model trains on the rows of `data.pretrain_share`, which no client of a run with the same share has. The folder
    is ``out``, by default `model.name`; it has the tokenizer or the image processor, and `pretrain.json` with the
    settings and what the model reaches on held-out rows. A folder that has a model of the same settings and rows is
    left as it is. ``task`` takes the place of the one that the settings name, as in `run`. ``report`` gets lines about
    the progress; None: nothing gets them.

    Returns the folder. Raises UserError where settings or data are wrong, or where the folder has something else.
    """
    settings, tell = describe_objects(read_settings(experiment), task, None), report or (lambda line: None)
    folder = _folder(settings.model, out)
    if not settings.data.pretrain_share:
        raise UserError("data.pretrain_share: got 0, but rayfed pretrain trains on the rows that no client has")
    if settings.engine.device == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device: got 'cuda', but torch finds no GPU here; allowed is cpu")
    threads = torch.get_num_threads()
    prepare_process(settings.engine.threads, settings.engine.device, settings.engine.deterministic)
    forget_base()
    try:
        with TemporaryDirectory() as temporary:
            return _pretrained(settings, task, Path(temporary), folder, tell)
    finally:
        forget_base()
        torch.set_num_threads(threads)


def _pretrained(
    settings: Experiment, task: Task | None, new: Path, folder: Path, report: Callable[[str], None]
) -> Path:
    """The folder with the pretrained model; ``new`` is an empty folder for one with random weights."""
    names = {name: getattr(settings, name) for name in ("data", "problem", "partition")}
    names["model"] = Model(name=str(new))
    # Not the run's own: a run of this seed would begin with the head for which the features below were trained.
    names["seed"] = seeding.derive_seed(settings.seed, "pretrain")
    task = task.configure(**names) if task else tasks.build(**names)
    if not isinstance(task, SourceTask):
        raise allowed("data.source", settings.data.source, "rayfed pretrain needs texts or images")
    task.write_new_base(settings.pretrain, new)
    federation, rows = task.load_pretraining()
    data = settings.data.model_dump(mode="json", include=set(DATA))
    pretrained = settings.pretrain.model_dump(mode="json")
    what = {"pretrain": pretrained, "data": data, "seed": settings.seed, "rows": rows, "version": VERSION}
    made_of = digest(what)
    if _has(folder, made_of):
        report(f"model {folder} is there already, of these settings and rows ({made_of})")
        return folder
    model = task.load_base(federation).model
    forget_base()  # so that nobody else has the weights, which change
    count = sum(parameter.numel() for parameter in model.parameters())
    report(f"{count} parameters, {len(federation.train)} rows that no client has")
    device = torch.device(settings.engine.device)
    found = train(task, model, federation, settings.pretrain, settings.seed, device, report)
    reached = {name: value for name, value in found.items() if isinstance(value, float)}
    if reached:
        report("held-out rows: " + ", ".join(f"{name} {value:.4f}" for name, value in reached.items()))
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        kept: Any = task.pretrained(model.cpu())
        if hasattr(kept.config, "use_cache"):
            kept.config.use_cache = True  # training has turned it off
        with quiet():
            kept.save_pretrained(temporary)
        task.save_tokenizer(temporary)
        write_json(temporary / PRETRAINED, {"digest": made_of, "parameters": count, "held_out": reached, **what})
    report(f"model {folder}")
    return folder


def _folder(model: Model, out: str | Path | None) -> Path:
    """Where the model is written. UserError where that is no name of a folder."""
    if out is None and model.name == "minilm":
        raise UserError("model.name: got 'minilm', but rayfed pretrain writes a folder: name one there, or as --out")
    folder = Path(out or model.name)
    if folder.exists() and not folder.is_dir():
        raise allowed("--out", str(folder), "that is a file")
    return folder


def _has(folder: Path, digest: str) -> bool:
    """Whether the folder has the model of this digest. UserError where it has something else."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    try:
        found = json.loads((folder / PRETRAINED).read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise allowed("--out", str(folder), f"this folder has something else than a model of {PRETRAINED}") from None
    if found != digest:
        what = f"its model is of other settings or rows ({found}, and these are {digest}): remove it, or name another"
        raise allowed("--out", str(folder), what)
    return True
