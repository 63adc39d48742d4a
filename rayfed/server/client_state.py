"""What single clients keep between rounds, off the heap: one safetensors file per client and change.

A method's state maps client ids to tensors. After every round `settle` writes what is new to
`clients/<client>/round-<t>.safetensors` and puts in its place a `StoredTensors`, which reads the file when it is asked. A
checkpoint names the files it needs; those that no kept checkpoint names are removed.
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
    """One client's tensors, each read from their file when it is asked for; equal digests are equal bits.

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
            if not self._checked:  # once: it takes longer than all the rest, and nobody writes into the file
                if hashlib.sha256(self.path.read_bytes()).hexdigest() != self.digest:
                    raise ValueError("its bytes are not those that were written")
                self._checked = True
            with safe_open(self.path, framework="pt") as file:
                yield file
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"--resume: {self.path} is damaged: {error}; start the run anew") from None


class ClientStore:
    """The files of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, clients: Mapping[int, Mapping[str, Tensor]], round: int) -> dict[int, StoredTensors]:
        """Writes what is not yet on the disk and returns the same mapping, backed by files."""
        settled: dict[int, StoredTensors] = {}
        for client, tensors in clients.items():
            if isinstance(tensors, StoredTensors):
                settled[client] = tensors
                continue
            data = save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())})
            path = self._path(client, round)
            atomic_write(path, data)
            settled[client] = StoredTensors(path, round, hashlib.sha256(data).hexdigest())
        return settled

    def to_json(self, clients: Mapping[int, Mapping[str, Tensor]]) -> list[list[Any]]:
        """[client, round, digest] of every client, for a checkpoint."""
        return [[client, kept.round, kept.digest] for client, kept in _kept(clients)]

    def restore(self, rows: list[list[Any]]) -> dict[int, StoredTensors]:
        """The mapping that `to_json` described; UserError where a file is missing."""
        found = {int(c): StoredTensors(self._path(int(c), int(r)), int(r), str(digest)) for c, r, digest in rows}
        for kept in found.values():
            if not kept.path.exists():
                raise UserError(f"--resume: {kept.path} is missing; start the run anew")
        return found

    def prune(self, named: list[list[list[Any]]]) -> None:
        """Removes the files that none of these checkpoints' rows name."""
        wanted = {self._path(int(client), int(round)) for rows in named for client, round, _ in rows}
        for path in self.folder.glob("*/round-*.safetensors"):
            if path not in wanted:
                path.unlink()

    def _path(self, client: int, round: int) -> Path:
        return self.folder / str(client) / f"round-{round:06d}.safetensors"


def digest_of(clients: Mapping[int, Mapping[str, Tensor]]) -> str:
    """What the state's digest takes up for its clients; empty where no client keeps anything."""
    if not clients:
        return ""
    text = "|".join(f"{client}:{kept.digest}" for client, kept in sorted(_kept(clients)))
    return hashlib.sha256(text.encode()).hexdigest()


def _kept(clients: Mapping[int, Mapping[str, Tensor]]) -> Iterator[tuple[int, StoredTensors]]:
    for client, tensors in clients.items():
        assert isinstance(tensors, StoredTensors), "settle the clients first"
        yield client, tensors
