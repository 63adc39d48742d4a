"""Base updates: the traffic that methods which change the base cost those clients who missed rounds.

After a round, such a method has an update of the base (`Method.base_update`): a vector that every client must receive
to merge the round into its base. A client receives the updates of all rounds since it last took part, or, where that is
smaller, the whole change of the base at once. Only sizes are stored: an old message has the bytes that it had when it
was made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rayfed import wire


class BaseUpdates:
    """The sizes of all rounds' updates, and how many of them each client has merged."""

    def __init__(self) -> None:
        self.sizes: list[wire.Sizes] = []  # of each round's update, in order
        self.merged: dict[int, int] = {}  # client -> number of updates that it has
        self.entries = 0  # of the whole change of the base

    def publish(self, update: Tensor | None, entries: int) -> None:
        """Adds a round's update (m,), encoded without its zeros where that is shorter; None: the base did not change.

        ``entries``: number of entries of the whole change of the base.
        """
        if update is None:
            return
        sparse = wire.encode(update, indices=update.nonzero().squeeze(1))
        dense = wire.encode(update)
        self.sizes.append(wire.inspect(min(sparse, dense, key=len)))
        self.entries = entries

    def collect(self, client: int) -> list[wire.Sizes]:
        """The messages that ``client`` must receive before it trains; afterwards it counts as up to date."""
        missing = self.sizes[self.merged.get(client, 0) :]
        if self.sizes:
            self.merged[client] = len(self.sizes)
        everything = wire.Sizes(self.entries, self.entries, wire.HEADER_BYTES, 0, 4 * self.entries)
        return [everything] if sum(map(_length, missing)) > _length(everything) else missing

    def to_json(self) -> dict[str, Any]:
        """The state as JSON values, for a checkpoint."""
        return {
            "sizes": [[s.n, s.count, s.bytes_header, s.bytes_indices, s.bytes_values] for s in self.sizes],
            "merged": [[client, count] for client, count in self.merged.items()],
            "entries": self.entries,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> BaseUpdates:
        """The state that `to_json` wrote; an empty mapping gives a fresh one."""
        updates = cls()
        updates.sizes = [wire.Sizes(*sizes) for sizes in value.get("sizes", [])]
        updates.merged = {int(client): int(count) for client, count in value.get("merged", [])}
        updates.entries = int(value.get("entries", 0))
        return updates


def _length(sizes: wire.Sizes) -> int:
    return sizes.bytes_header + sizes.bytes_indices + sizes.bytes_values
