"""The base class of objectives. docs/architecture.md says where its functions are called, and where further ones go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rayfed.errors import allowed
from rayfed.tasks.base import Task

if TYPE_CHECKING:
    from rayfed.config.method import Lora


ONE_CLASS = "allowed with data.task=text_classification and image_classification, without a loss_fn of your own"
"""The end of a refusal of tasks whose loss is not the cross-entropy of one class a row."""


@dataclass(frozen=True)
class RowContext:
    """What `Objective.rows` knows of the K clients of a pack. Counts are whole numbers in float32."""

    class_counts: Tensor
    """(K, classes): the training rows of each class that a client has."""
    batch_counts: Tensor
    """(K, classes): the rows of each class in a client's batch of this step; zeros for a client that has no batch."""
    targets: Tensor | None = None
    """(K, classes, m): see `rayfed.objectives.Stateful.targets`. None: the objective has none, or not in this round."""


class Objective:
    """What a client minimises: by default the task's loss alone. A subclass is a frozen dataclass of its options.

    The name of a file here is what `objective.name` is set to. A client's term may depend on this client alone: its own
    rows, values and start. Then its training is the same in any pack. Functions compute for all clients of a pack at
    once, and on a GPU they wait for nothing.
    """

    def check(self, name: str, *, task: Task, lora: Lora) -> None:
        """Raises UserError where other settings do not fit the objective ``name``. Called before any data are read."""
        if self.replaces_loss and not task.cross_entropy:
            raise allowed(
                "objective.name", name, f"its loss takes the place of the cross-entropy of one class a row: {ONE_CLASS}"
            )

    @property
    def replaces_loss(self) -> bool:
        """Whether `rows` takes the place of the task's loss in training."""
        return type(self).rows is not Objective.rows

    @property
    def changes_gradient(self) -> bool:
        """Whether `gradient` is added to the gradients."""
        return type(self).gradient is not Objective.gradient

    @property
    def adds_penalty(self) -> bool:
        """Whether `penalty` is added to the loss of a client."""
        return type(self).penalty is not Objective.penalty

    def rows(self, logits: Tensor, labels: Tensor, slots: Tensor, context: RowContext) -> Tensor:
        """Each row's loss (rows,), in place of the cross-entropy of ``logits`` (rows, classes).

        ``labels`` (rows,) int64 are the rows' classes. ``slots`` (rows,) int64 say which of the K clients in
        ``context`` a row belongs to. The loss of a row depends on this row and on its own client's counts. Evaluation
        uses the task's loss.
        """
        raise NotImplementedError

    def gradient(self, values: Tensor, start: Tensor) -> Tensor:
        """What is added to the gradient before masks and clipping: the gradient of a term of the loss, (K, n).

        ``values`` (K, n) are the present values of one part of the adapters (A, B, core or head) of the pack's K
        clients, ``start`` (K, n) those with which they began the round. Entries that do not train get no gradient.
        """
        raise NotImplementedError

    def penalty(self, factors: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
        """A scalar that is added to the client's mean loss in every step, or None for no penalty.

        ``factors`` yields (B (out, r), A (r, in)) of every adapted layer, in model order; none where only a head
        trains. Gradients flow through both. In a pack of mixed ranks, r is the largest rank of the pack; ranks that the
        client lacks are zero.
        """
        return None
