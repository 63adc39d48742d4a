"""`model.adapter`: the folder that it names, and the digest of the files that a run reads there."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from rayfed.config.schema import Experiment
from rayfed.errors import allowed, first_line
from rayfed.files import regular

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS, "head.safetensors", "classes.json")


def adapter_folder(adapter: str) -> Path:
    """The folder in PEFT's format: that of a run directory, or the folder itself.

    UserError where there is no such folder, or it has no adapter as safetensors.
    """
    try:
        given = Path(adapter).expanduser()
        folder = next((path for path in (given, given / "adapter") if (path / CONFIG).exists()), None)
        found = given.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL character, no such user
        raise allowed("model.adapter", adapter, f"that is no name of a folder ({first_line(error)})") from None
    if not found:
        raise allowed("model.adapter", adapter, "there is no such folder")
    if folder is None:
        raise allowed("model.adapter", adapter, f"the folder has no {CONFIG}: it is no adapter, and no finished run")
    if not (folder / WEIGHTS).exists():
        raise allowed("model.adapter", adapter, f"the folder has no {WEIGHTS}; pickled weights are not read")
    return folder


def adapter_digest(adapter: str) -> str:
    """SHA-256 (first 16 hex digits) of the files that a run reads of `model.adapter`. UserError as `adapter_folder`."""
    folder = adapter_folder(adapter)
    stats = [(name, (folder / name).stat()) for name in FILES if (folder / name).exists()]
    try:
        return _digest(folder, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
    except OSError as error:
        raise allowed("model.adapter", adapter, f"it cannot be read ({first_line(error)})") from None


@lru_cache(maxsize=8)  # a sweep validates the settings of each of its trials
def _digest(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, size, _ in files:
        digest.update(f"|{name}|{size}|".encode())
        with regular(folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def with_digest(experiment: Experiment) -> Experiment:
    """The settings with `model.adapter_digest`, where `model.adapter` is given without it.

    A folder that is not on this machine has no digest: a job may be submitted to another one. UserError as above.
    """
    model = experiment.model
    if (
        model.adapter is None
        or model.adapter_digest is not None
        or not os.path.exists(os.path.expanduser(model.adapter))
    ):
        return experiment
    model = model.model_copy(update={"adapter_digest": adapter_digest(model.adapter)})
    return experiment.model_copy(update={"model": model})
