"""Checkpoints: everything that the next round depends on, written whole or not at all.

`checkpoints/round-000012/` holds `state.safetensors` (method state under `method.`, server-optimizer moments under
`optimizer.`) and `checkpoint.json` (round, settings digest, the method's facts, progress, base updates, client state
files, state digest). There are no pickles. A checkpoint whose tensors do not give its recorded digest is refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayfed.errors import UserError
from rayfed.files import atomic_path

VERSION = 3


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``round`` rounds of the run whose settings have ``experiment`` as digest."""

    round: int
    experiment: str
    digest: str
    facts: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    base_updates: dict[str, Any] = field(default_factory=dict)
    clients: list[list[Any]] = field(default_factory=list)
    version: int = VERSION


def state_digest(round: int, method: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], clients: str = "") -> str:
    """SHA-256 (64 hex digits) over the round and every tensor's name, type, shape and bytes: equal iff the bits are.

    ``clients`` is the digest of the client state, see `rayfed.server.client_state`.
    """
    digest = hashlib.sha256((str(round) + clients).encode())
    for prefix, tensors in (("method", method), ("optimizer", optimizer)):
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"|{prefix}.{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(
    folder: Path, checkpoint: Checkpoint, method: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], keep: int
) -> None:
    """Writes the checkpoint under ``folder`` and removes all but the newest ``keep``."""
    tensors = {f"method.{k}": v for k, v in method.items()} | {f"optimizer.{k}": v for k, v in optimizer.items()}
    with atomic_path(folder / f"round-{checkpoint.round:06d}") as path:
        path.mkdir()
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, path / "state.safetensors")
        (path / "checkpoint.json").write_text(json.dumps(asdict(checkpoint), indent=2, sort_keys=True) + "\n")
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)


def latest(folder: Path, experiment: str) -> Checkpoint | None:
    """The newest whole checkpoint's JSON part, or None. UserError where it belongs to other settings."""
    found = _all(folder)
    if not found:
        return None
    try:
        checkpoint = Checkpoint(**json.loads((found[-1] / "checkpoint.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--resume: {found[-1]} is damaged: {error}; remove it to resume from the one before") from None
    if checkpoint.version != VERSION:
        raise UserError(f"--resume: {found[-1]} has version {checkpoint.version}, this rayfed reads {VERSION}")
    if checkpoint.experiment != experiment:
        raise UserError(
            f"--resume: {found[-1]} was made with other settings (digest {checkpoint.experiment}, these have "
            f"{experiment}); resume with the settings in config.yaml or choose another --out"
        )
    return checkpoint


def client_rows(folder: Path) -> list[list[list[Any]]]:
    """The rows about client state files of every checkpoint in the folder."""
    return [json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))["clients"] for path in _all(folder)]


def load_tensors(
    folder: Path, checkpoint: Checkpoint, clients: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(method tensors, optimizer tensors) of the checkpoint. UserError where the bits are not those it recorded."""
    path = folder / f"round-{checkpoint.round:06d}"
    try:
        tensors = load_file(path / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"--resume: {path} is damaged: {error}; remove it to resume from the one before") from None
    split: dict[str, dict[str, Tensor]] = {"method": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        split[prefix][rest] = tensor
    if state_digest(checkpoint.round, split["method"], split["optimizer"], clients) != checkpoint.digest:
        raise UserError(
            f"--resume: {path} is damaged: its tensors do not have the digest it records; "
            "remove it to resume from the one before"
        )
    return split["method"], split["optimizer"]


def _all(folder: Path) -> list[Path]:
    # Temporary folders start with a dot; only whole checkpoints carry the plain name.
    return sorted(path for path in folder.glob("round-*") if path.is_dir())
