"""Client state on the disk: the tensors of single clients that a method stores between rounds.

A method's state maps client ids to tensors. After every round `ClientStore.save` writes what is new to
`clients/<client>/round-<t>.safetensors` and puts `StoredTensors` in its place, which read the file on access. What an
objective stores for clients is in `clients/<client>/objective-<t>.safetensors`, by a store of its own. A checkpoint
names the files that it needs; files that no checkpoint names are removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import ItemsView, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from rayfed.files import atomic_write, regular


class StoredTensors(Mapping[str, Tensor]):
    """One client's tensors, read from the file on access. ``checksum``: SHA-256 of the file, 64 hex digits.

    Clients whose tensors have the same bits are equal.
    """

    def __init__(self, path: Path, round: int, checksum: str) -> None:
        self.path, self.round, self.checksum = path, round, checksum

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118 (no mapping)
                raise KeyError(name)
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        with safe_open(self.path, framework="pt") as file:
            return iter(sorted(file.keys()))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def items(self) -> ItemsView[str, Tensor]:
        """All tensors, read at once."""
        return load_file(self.path).items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredTensors) and self.checksum == other.checksum

    def __hash__(self) -> int:
        return hash(self.checksum)


class ClientStore:
    """The client state files of one run whose names begin with ``kind``."""

    def __init__(self, folder: Path, kind: str = "round") -> None:
        self.folder, self.kind = folder, kind

    def save(self, clients: Mapping[int, Mapping[str, Tensor]], round: int) -> dict[int, StoredTensors]:
        """Writes the tensors that are not on the disk yet; returns the same mapping, backed by files.

        Clients that share one mapping have equal files, which are made once.
        """
        stored: dict[int, StoredTensors] = {}
        sharing: dict[int, list[int]] = {}  # clients by the identity of their mapping
        for client, tensors in clients.items():
            if isinstance(tensors, StoredTensors):
                stored[client] = tensors
            else:
                sharing.setdefault(id(tensors), []).append(client)
        for together in sharing.values():
            tensors = clients[together[0]]
            data = save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())})
            checksum = hashlib.sha256(data).hexdigest()
            for client in together:
                path = self._path(client, round)
                atomic_write(path, data)
                stored[client] = StoredTensors(path, round, checksum)
        return {client: stored[client] for client in clients}

    def to_json(self, clients: Mapping[int, StoredTensors]) -> list[list[Any]]:
        """[client, round, checksum] of every client, for a checkpoint."""
        return [[client, tensors.round, tensors.checksum] for client, tensors in clients.items()]

    def restore(self, rows: list[list[Any]]) -> dict[int, StoredTensors]:
        """The mapping that `to_json` described; OSError or ValueError where a file is not the one that was written."""
        found = {}
        for client, round, checksum in rows:
            path = self._path(client, round)
            if hashlib.sha256(regular(path).read_bytes()).hexdigest() != checksum:
                raise ValueError(f"clients/{client}/{path.name} is not the file that was written")
            found[client] = StoredTensors(path, round, checksum)
        return found

    def prune(self, checkpoints: list[list[list[Any]]]) -> None:
        """Removes the files that none of these checkpoints' rows name."""
        needed = {self._path(int(client), int(round)) for rows in checkpoints for client, round, _ in rows}
        for path in self.folder.glob(f"*/{self.kind}-*.safetensors"):
            if path not in needed:
                path.unlink()

    def _path(self, client: int, round: int) -> Path:
        return self.folder / str(client) / f"{self.kind}-{round:06d}.safetensors"


def digest_of(clients: Mapping[int, StoredTensors]) -> str:
    """The clients' part of the state digest (64 hex digits); empty where no client has state."""
    text = "|".join(f"{client}:{clients[client].checksum}" for client in sorted(clients))
    return hashlib.sha256(text.encode()).hexdigest() if text else ""
