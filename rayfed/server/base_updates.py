"""What methods that change the base cost those who missed rounds.

After a round such a method has news: a vector that every client must receive to merge the round into its base. A client
gets the news of all rounds since it last took part, or, where that is smaller, the whole change of the base at once.
Only sizes are kept: the bytes of an old message are what they were when it was made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rayfed import wire


class BaseUpdates:
    """Who has merged what. ``whole`` is the number of entries of the whole change of the base."""

    def __init__(self) -> None:
        self.sizes: list[wire.Sizes] = []  # of each round's news, in order
        self.seen: dict[int, int] = {}  # client -> how many of them it has
        self.whole = 0

    def publish(self, news: Tensor | None, whole: int) -> None:
        """Encodes a round's news (m,), without its zeros where that is shorter; ``whole``: entries of the base."""
        if news is None:
            return
        some = wire.encode(news, indices=news.nonzero().squeeze(1))
        every = wire.encode(news)
        self.sizes.append(wire.inspect(min(some, every, key=len)))
        self.whole = whole

    def collect(self, client: int) -> list[wire.Sizes]:
        """The messages that ``client`` must receive before it trains; from now on it has them."""
        owed = self.sizes[self.seen.get(client, 0) :]
        if self.sizes:
            self.seen[client] = len(self.sizes)
        everything = wire.Sizes(self.whole, self.whole, wire.HEADER_BYTES, 0, 4 * self.whole)
        return [everything] if sum(map(_length, owed)) > _length(everything) else owed

    def to_json(self) -> dict[str, Any]:
        return {
            "sizes": [[s.n, s.count, s.bytes_header, s.bytes_indices, s.bytes_values] for s in self.sizes],
            "seen": [[client, count] for client, count in self.seen.items()],
            "whole": self.whole,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> BaseUpdates:
        """The state that `to_json` wrote; an empty mapping gives a fresh one."""
        base_updates = cls()
        base_updates.sizes = [wire.Sizes(*sizes) for sizes in value.get("sizes", [])]
        base_updates.seen = {int(client): int(count) for client, count in value.get("seen", [])}
        base_updates.whole = int(value.get("whole", 0))
        return base_updates


def _length(sizes: wire.Sizes) -> int:
    return sizes.bytes_header + sizes.bytes_indices + sizes.bytes_values
