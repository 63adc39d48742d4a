"""The section `partition.sequence`: clients meet classes or domains one group after the other."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayfed.config.types import Section


class ClassSequence(Section):
    """Continual learning: classes or domains are cut into groups, and each group is an experience of some rounds.

    In an experience, clients have only the rows of its classes or domains. See docs/class-sequences.md.
    """

    decides = ("data",)

    experiences: Annotated[int, Field(ge=1, le=10_000)]
    """Experiences, each with as many classes or domains as the others, give or take one. `server.rounds` must be a
    multiple: all experiences have equally many rounds. 1: all at once.
    """
    of: Literal["classes", "domains"] = "classes"
    """What is cut into groups: `classes`, or `domains`, which the column `data.client` names (also in the test rows).
    Domains may share classes.
    """
    order: Literal["shuffled", "given"] = "shuffled"
    """The order in which they come. `shuffled`: drawn from `seed`; `given`: that of the classes in the data, or of the
    domains' names.
    """
    loss: Literal["current", "seen"] = "current"
    """The classes that the training loss compares: those of the `current` experience, or all that clients have `seen`
    so far. Head rows of all other classes do not train. Evaluation compares all seen classes.
    """

    def depends_on_rounds(self, before: int, after: int) -> str | None:
        return "experiences" if self.experiences > 1 else None
