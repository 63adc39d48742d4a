"""Client state on the disk: the tensors of single clients that a method stores between rounds.

A method's state maps client ids to tensors. After every round `ClientStore.save` writes what is new to
`clients/<client>/round-<t>.safetensors` and puts `StoredTensors` in its place, which read the file on access. A
checkpoint names the files that it needs; files that no checkpoint names are removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rayfed.errors import UserError
from rayfed.files import atomic_write


class StoredTensors(Mapping[str, Tensor]):
    """One client's tensors, each read from the file on access. Equal digests are equal bits.

    UserError, at the first access, where the file is not the one that was written.
    """

    def __init__(self, path: Path, round: int, digest: str) -> None:
        self.path, self.round, self.digest = path, round, digest
        self._checked = False

    def __getitem__(self, name: str) -> Tensor:
        with self._opened() as file:
            if name not in file.keys():  # noqa: SIM118 (no mapping)
                raise KeyError(name)
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        with self._opened() as file:
            return iter(sorted(file.keys()))

    def __len__(self) -> int:
        with self._opened() as file:
            return len(file.keys())

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            if not self._checked:  # once: it takes longer than all the rest, and nothing writes into the file
                if hashlib.sha256(self.path.read_bytes()).hexdigest() != self.digest:
                    raise ValueError("its bytes are not those that were written")
                self._checked = True
            with safe_open(self.path, framework="pt") as file:
                yield file
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"--resume: {self.path} is damaged: {error}; start the run anew") from None


class ClientStore:
    """The client state files of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, clients: Mapping[int, Mapping[str, Tensor]], round: int) -> dict[int, StoredTensors]:
        """Writes the tensors that are not on the disk yet; returns the same mapping, backed by files."""
        stored: dict[int, StoredTensors] = {}
        for client, tensors in clients.items():
            if isinstance(tensors, StoredTensors):
                stored[client] = tensors
                continue
            data = save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())})
            path = self._path(client, round)
            atomic_write(path, data)
            stored[client] = StoredTensors(path, round, hashlib.sha256(data).hexdigest())
        return stored

    def to_json(self, clients: Mapping[int, Mapping[str, Tensor]]) -> list[list[Any]]:
        """[client, round, digest] of every client, for a checkpoint."""
        return [[client, tensors.round, tensors.digest] for client, tensors in _stored(clients)]

    def restore(self, rows: list[list[Any]]) -> dict[int, StoredTensors]:
        """The mapping that `to_json` described; UserError where a file is missing."""
        found = {int(c): StoredTensors(self._path(int(c), int(r)), int(r), str(digest)) for c, r, digest in rows}
        for tensors in found.values():
            if not tensors.path.exists():
                raise UserError(f"--resume: {tensors.path} is missing; start the run anew")
        return found

    def prune(self, checkpoints: list[list[list[Any]]]) -> None:
        """Removes the files that none of these checkpoints' rows name."""
        needed = {self._path(int(client), int(round)) for rows in checkpoints for client, round, _ in rows}
        for path in self.folder.glob("*/round-*.safetensors"):
            if path not in needed:
                path.unlink()

    def _path(self, client: int, round: int) -> Path:
        return self.folder / str(client) / f"round-{round:06d}.safetensors"


def digest_of(clients: Mapping[int, Mapping[str, Tensor]]) -> str:
    """The clients' part of the state digest (64 hex digits); empty where no client has state."""
    if not clients:
        return ""
    text = "|".join(f"{client}:{tensors.digest}" for client, tensors in sorted(_stored(clients)))
    return hashlib.sha256(text.encode()).hexdigest()


def _stored(clients: Mapping[int, Mapping[str, Tensor]]) -> Iterator[tuple[int, StoredTensors]]:
    for client, tensors in clients.items():
        assert isinstance(tensors, StoredTensors), "save the clients first"
        yield client, tensors
