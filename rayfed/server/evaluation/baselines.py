"""The controls of an experiment: what the frozen base reaches when only a head on top of it is trained.

Two figures, both from the base's features, which need computing only once:

- *same rounds*: the run's own federation, cohorts, batches, local and server optimizer, everything sent, but only the
  head trains. Against it one sees what the adapters did.
- *central*: the head trained to convergence on all rows at once, regularised by validation. Harder to beat: it knows
  no federation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.clients.local_training import PackMember, train_pack
from rayfed.config import Experiment
from rayfed.lora.adapter import Adapter
from rayfed.lora.packed.segments import Segment
from rayfed.lora.packed.stack import Stack
from rayfed.methods import Update
from rayfed.methods.fedit import FedIT
from rayfed.profiles.client_profiles import profile
from rayfed.server.axes import rate, resolve
from rayfed.server.evaluation.linear_probe import fit_probe
from rayfed.server.sampling import cohort
from rayfed.tasks.federation import Federation


@dataclass(frozen=True)
class FeatureRows:
    """Features (rows, width) and labels (rows,) in the place of tokens: every row has one length."""

    features: Tensor
    labels: Tensor

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self.labels), dtype=np.int64)

    def batch(self, rows: np.ndarray, pad_id: int) -> dict[str, Tensor]:
        chosen = torch.as_tensor(rows)
        return {"features": self.features[chosen], "labels": self.labels[chosen]}


@dataclass(frozen=True)
class Controls:
    """Test accuracies (0 to 1); ``same_rounds`` is None where the head is frozen or more than one linear layer."""

    same_rounds: float | None
    central: float


def measure_controls(
    experiment: Experiment, federation: Federation, head: Mapping[str, Tensor], train: FeatureRows,
    validation: FeatureRows | None, test: FeatureRows, rounds: int,
) -> Controls:  # fmt: skip
    """Both controls. ``head``: the head's start values by parameter name; rows of ``train`` are the federation's."""
    pairs = [(split.features, split.labels) for split in (train, test)]
    chosen = None if validation is None else (validation.features, validation.labels)
    central = fit_probe(pairs[0], chosen, pairs[1], len(federation.classes))
    modules = {name.rpartition(".")[0] for name in head}
    if len(modules) != 1:
        return Controls(None, central)
    return Controls(_same_rounds(experiment, federation, head, modules.pop(), train, test, rounds), central)


def _same_rounds(
    experiment: Experiment, federation: Federation, head: Mapping[str, Tensor], name: str, train: FeatureRows,
    test: FeatureRows, rounds: int,
) -> float:  # fmt: skip
    classes, width = head[f"{name}.weight"].shape
    model = nn.Module()
    model.add_module("head", nn.Linear(width, classes, bias=f"{name}.bias" in head))
    stack = Stack(model, (), ["head"])
    start = Adapter({}, {key.replace(name, "head", 1): tensor for key, tensor in head.items()})
    axes, method = resolve(experiment), FedIT()
    state = method.init(start, experiment.seed)
    everything = torch.ones(state.layout.size, dtype=torch.bool)

    def logits(inputs: dict[str, Tensor]) -> Tensor:
        return model.get_submodule("head")(inputs["features"])

    for t in range(rounds):
        total = experiment.server.rounds
        axes.optimizer.lr = rate(axes.optimizer.base_lr, experiment.server.schedule, t, total)
        lr = rate(experiment.client.lr, experiment.client.schedule, t, total)
        updates = []
        for c in cohort(federation.holders, experiment.server.cohort, experiment.seed, t):
            rows = federation.rows_of(c)
            (trained,) = train_pack(
                stack, logits, train, 0, [PackMember(c, state.layout, state.vector, everything, rows)], experiment.client,
                lr=lr, t=t, seed=experiment.seed, device=torch.device("cpu"),
            )  # fmt: skip
            weight = float(len(rows)) if axes.weights == "examples" else 1.0
            change = trained.vector - state.vector
            updates.append(Update(profile(c, len(rows), experiment, t), weight, state.vector, change, state.layout))
        state = method.aggregate(state, updates, axes.optimizer.advance)
    stack.load([state.layout.unflatten(state.vector)])
    with torch.no_grad(), stack.batch.using([Segment(0, len(test.labels))]):
        right = logits({"features": test.features}).argmax(-1) == test.labels
    return float(right.double().mean())
