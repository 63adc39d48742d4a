"""What does not go together with the settings of classification alone: `partition.sequence` and the clients' loss."""

from __future__ import annotations

from rayfed.config import Experiment
from rayfed.config.class_sequence import ClassSequence
from rayfed.errors import UserError, allowed
from rayfed.objectives import Objective, Stateful
from rayfed.server.optimizers import ServerOptimizer
from rayfed.tasks.base import Task
from rayfed.tasks.data.federation import Federation


def check_classification(experiment: Experiment, task: Task, objective: Objective, optimizer: ServerOptimizer) -> None:
    """UserError where a setting of classification does not go with the task, or with another setting."""
    _check_loss(experiment, task, objective)
    _check_sequence(experiment, task, objective, optimizer)


def _check_loss(experiment: Experiment, task: Task, objective: Objective) -> None:
    client = experiment.client
    if not client.changes_loss:
        return
    field = "label_smoothing" if client.label_smoothing else "class_weights"
    name, value = f"client.{field}", getattr(client, field)
    if not task.cross_entropy:
        what = (
            "it changes the cross-entropy of one class a row: allowed with data.task=text_classification and "
            "image_classification, without a loss_fn of your own"
        )
        raise allowed(name, value, what)
    if objective.replaces_loss:
        raise allowed(name, value, f"objective.name={experiment.objective.name} has a loss of its own; leave one out")
    if experiment.privacy.kind == "example":
        raise allowed(name, value, "with privacy.kind=example every row has the task's own loss; leave it out")


def _check_sequence(experiment: Experiment, task: Task, objective: Objective, optimizer: ServerOptimizer) -> None:
    sequence, evaluation = experiment.partition.sequence, experiment.eval
    if sequence is None:
        return
    if not task.cross_entropy:
        what = (
            "a sequence is one of classes, one a row: allowed with data.task=text_classification and "
            "image_classification, without a loss_fn of your own"
        )
        raise allowed("partition.sequence.experiences", sequence.experiences, what)
    if experiment.privacy.kind != "none":
        what = "with partition.sequence clients come and go with their rows, which no accounting here covers; use none"
        raise allowed("privacy.kind", experiment.privacy.kind, what)
    if isinstance(objective, Stateful):
        what = "what it stores belongs to the loss of past experiences; with partition.sequence use plain or fedprox"
        raise allowed("objective.name", experiment.objective.name, what)
    for name, value, why in (
        ("server.max_mb", experiment.server.max_mb is not None, "a run would end before its last classes"),
        ("eval.early_stop", evaluation.early_stop is not None, "a run would end before its last classes"),
        ("eval.unseen", evaluation.unseen, "clients have other rows in each experience"),
        ("eval.controls", evaluation.controls, "the baselines know no experiences"),
        ("eval.clients", sequence.of == "domains" and evaluation.clients, "of domains there is none by class"),
    ):
        if value:
            raise UserError(f"{name}: with partition.sequence {why}; leave it out")
    if optimizer.kind == "adamw" and optimizer.weight_decay:
        what = "adamw's decay would move the head rows of classes that nobody has seen; with partition.sequence use 0"
        raise allowed("server.weight_decay", optimizer.weight_decay, what)


def by_experience(sequence: ClassSequence | None, federation: Federation) -> list[tuple[str, Federation]]:
    """(where, federation) of each population from which cohorts are drawn: the only one, or each experience's.

    UserError where there is a ``sequence`` and a task of the user's own has made a federation without.
    """
    if sequence is None:
        return [("", federation)]
    if federation.experiences is None:
        what = "Federation.experiences is None: load_data of this task makes no sequence"
        raise allowed("partition.sequence.experiences", sequence.experiences, what)
    return [(f" in experience {i}", own) for i, own in enumerate(federation.by_experience, 1)]


def describe_sequence(rounds: int, federation: Federation) -> list[str]:
    """A line for the log of a run of so many ``rounds`` with a sequence; none for another run."""
    if federation.experiences is None:
        return []
    found = federation.experiences
    sizes = sorted({len(own) for own in found.domains or found.classes})
    count, each = len(found), " or ".join(map(str, sizes))
    what = "domains" if found.domains else "classes"
    return [f"partition.sequence: {count} experiences of {each} {what}, {rounds // count} rounds each"]
