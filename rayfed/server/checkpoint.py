"""Checkpoints: everything that the next round depends on, written whole or not at all, and checked before it is used.

`checkpoints/round-000012/` holds `state.safetensors` (method state under `method.`, server-optimizer moments under
`optimizer.`, the server half of an objective under `objective.`) and `checkpoint.json`. The latter is the manifest of
the run directory: it has the checksums of the tensors (the state digest), the client state files, the ledger's parts
and the lines of metrics.jsonl, and a checksum of itself. There are no pickles. `restore` uses the newest checkpoint
whose files are all as they were written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayfed.errors import UserError, first_line
from rayfed.files import atomic_path, regular
from rayfed.server.client_state import ClientStore, StoredTensors, digest_of
from rayfed.wire import Ledger

VERSION = 4


class Damaged(Exception):
    """A file of a checkpoint, or one that it vouches for, is not as it was written. The message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``round`` rounds of the run whose settings have ``experiment`` as digest."""

    round: int
    experiment: str
    digest: str
    """The state digest, see `state_digest`."""
    chain: str
    """The hash chain up to this round, see `rayfed.server.chain`."""
    facts: dict[str, Any]
    progress: dict[str, Any]
    base_updates: dict[str, Any]
    clients: list[list[Any]]
    """[client, round, checksum] of every client state file that this state needs."""
    ledger: str = ""
    """`Ledger.checksum` of the parts up to this round."""
    metrics: str = ""
    """`metrics_checksum` of this round."""
    capability: str = ""
    """`Executor.capability`: a resume on devices of another one is told."""
    objective_clients: list[list[Any]] = field(default_factory=list)
    """As ``clients``, for the files of the objective."""
    version: int = VERSION


@dataclass(frozen=True)
class Restored:
    """A checkpoint with everything that it vouches for, read and checked."""

    checkpoint: Checkpoint
    method: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    clients: dict[int, StoredTensors]
    ledger: Ledger
    objective: dict[str, Tensor]
    objective_clients: dict[int, StoredTensors]


def state_digest(
    round: int, method: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], clients: str = "",
    objective: Mapping[str, Tensor] | None = None,
) -> str:  # fmt: skip
    """SHA-256 (64 hex digits) over the round and every tensor's name, type, shape and bytes: equal iff the bits are.

    ``clients`` is the digest of the client state, see `rayfed.server.client_state`: that of the method, followed by
    that of the objective.
    """
    digest = hashlib.sha256((str(round) + clients).encode())
    for prefix, tensors in (("method", method), ("optimizer", optimizer), ("objective", objective or {})):
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"|{prefix}.{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def metrics_checksum(out: Path, rounds: int) -> str:
    """SHA-256 (64 hex digits) of the first ``rounds`` lines of the run's metrics.jsonl; of nothing where it is missing.

    ValueError where the file has fewer whole lines, OSError where it is no regular file.
    """
    path = out / "metrics.jsonl"
    lines = regular(path).read_bytes().splitlines(keepends=True)[:rounds] if os.path.lexists(path) else []
    if lines and (len(lines) < rounds or not lines[-1].endswith(b"\n")):
        raise ValueError(f"{path.name} has no whole line for round {rounds}")
    return hashlib.sha256(b"".join(lines)).hexdigest()


def save(
    folder: Path, checkpoint: Checkpoint, method: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], keep: int,
    objective: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Writes the checkpoint under ``folder`` and removes all but the newest ``keep``."""
    tensors = {f"method.{k}": v for k, v in method.items()} | {f"optimizer.{k}": v for k, v in optimizer.items()}
    tensors |= {f"objective.{k}": v for k, v in (objective or {}).items()}
    with atomic_path(folder / f"round-{checkpoint.round:06d}") as path:
        path.mkdir()
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, path / "state.safetensors")
        values = asdict(checkpoint)
        text = json.dumps({**values, "checksum": _checksum(values)}, indent=2, sort_keys=True)
        (path / "checkpoint.json").write_text(text + "\n")
    for old in folders(folder)[keep:]:
        shutil.rmtree(old)


def restore(out: Path, experiment: str) -> tuple[Restored | None, list[str]]:
    """The newest whole checkpoint of the run directory ``out``, and a line about each newer one that is damaged.

    What the run wrote after that checkpoint is removed: damaged checkpoints and parts of the ledger. None where there
    is no checkpoint yet. UserError where the checkpoints belong to other settings or none of them is whole.
    """
    damaged: dict[Path, Damaged] = {}
    found = None
    for folder in folders(out / "checkpoints"):
        try:
            found = read(out, folder, experiment)
            break
        except Damaged as error:
            damaged[folder] = error
    if damaged and found is None:
        folder, why = next(iter(damaged.items()))
        raise UserError(f"--resume: {folder} is damaged ({why}), and no other checkpoint is whole; start the run anew")
    for folder in damaged:
        shutil.rmtree(folder)
    used = found.checkpoint.round if found else 0
    Ledger.truncate(out / "ledger.parquet", used)
    return found, [f"{path.name} is damaged ({why}); round-{used:06d} is used instead" for path, why in damaged.items()]


def read(out: Path, folder: Path, experiment: str) -> Restored:
    """The checkpoint in ``folder`` of the run directory ``out``, with every file that it vouches for.

    Damaged where a file is not as it was written. UserError where the checkpoint is whole, but of another version or of
    other settings.
    """
    checkpoint = read_manifest(folder, experiment)
    with _damage():
        clients = ClientStore(out / "clients").restore(checkpoint.clients)
        objective_clients = ClientStore(out / "clients", "objective").restore(checkpoint.objective_clients)
        split: dict[str, dict[str, Tensor]] = {"method": {}, "optimizer": {}, "objective": {}}
        for name, tensor in load_file(regular(folder / "state.safetensors")).items():
            prefix, _, rest = name.partition(".")
            split.setdefault(prefix, {})[rest] = tensor
        own = digest_of(clients) + digest_of(objective_clients)
        digest = state_digest(checkpoint.round, split["method"], split["optimizer"], own, split["objective"])
        if len(split) != 3 or digest != checkpoint.digest:
            raise Damaged("its tensors do not have the digest that it records")
        if metrics_checksum(out, checkpoint.round) != checkpoint.metrics:
            raise Damaged("metrics.jsonl does not have the lines that it vouches for")
        ledger = Ledger.read(out / "ledger.parquet", checkpoint.round)
        if ledger.checksum != checkpoint.ledger:
            raise Damaged("ledger.parquet does not have the parts that it vouches for")
    return Restored(
        checkpoint, split["method"], split["optimizer"], clients, ledger, split["objective"], objective_clients
    )


def read_manifest(folder: Path, experiment: str | None = None) -> Checkpoint:
    """`checkpoint.json` alone; errors as in `read`. ``experiment``: None allows any settings."""
    with _damage():
        values = json.loads(regular(folder / "checkpoint.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise Damaged("checkpoint.json is not as it was written")
        checksum, version = values.pop("checksum", None), values.get("version")
        if checksum is None and version in range(1, VERSION):
            raise UserError(f"--resume: {folder} has version {version}, but this rayfed reads {VERSION}")
        if checksum != _checksum(values) or _round_of(folder) != values["round"]:
            raise Damaged("checkpoint.json is not as it was written")
    checkpoint = Checkpoint(**values)
    if experiment not in (None, checkpoint.experiment):
        raise UserError(
            f"--resume: {folder} was made with other settings (digest {checkpoint.experiment}, these have "
            f"{experiment}); resume with the settings in config.yaml or choose another --out"
        )
    return checkpoint


def manifests(folder: Path) -> list[Checkpoint]:
    """The checkpoints under ``folder`` whose `checkpoint.json` is whole, newest first. Nothing else is read."""
    whole = []
    for path in folders(folder):
        with suppress(Damaged):
            whole.append(read_manifest(path))
    return whole


def prune_clients(folder: Path, store: ClientStore, objective: ClientStore) -> None:
    """Removes the client state files that no checkpoint under ``folder`` names."""
    whole = manifests(folder)
    store.prune([own.clients for own in whole])
    objective.prune([own.objective_clients for own in whole])


def folders(folder: Path) -> list[Path]:
    """The checkpoints under ``folder``, newest first. Temporary folders, other names and links are left out."""
    found = [path for path in folder.glob("round-*") if re.fullmatch(r"round-\d{6,}", path.name)]
    return sorted((p for p in found if p.is_dir() and not p.is_symlink()), key=_round_of, reverse=True)


@contextmanager
def _damage() -> Iterator[None]:
    """Every error that a changed file can cause becomes Damaged, in one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise Damaged(first_line(error)) from None


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _round_of(folder: Path) -> int:
    return int(folder.name.removeprefix("round-"))
