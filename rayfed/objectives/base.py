"""The base class of objectives. docs/architecture.md says where further hooks would be called."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class Objective:
    """What a client minimises in addition to its task's loss. A subclass is a frozen dataclass of its settings."""

    def penalty(self, factors: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
        """A scalar that is added to the client's mean loss in every step, or None for no penalty.

        ``factors`` yields (B (out, r), A (r, in)) of every adapted layer, in model order. Gradients flow through both.
        In a pack of mixed ranks, r is the largest rank of the pack; ranks that the client lacks are zero.
        """
        return None
