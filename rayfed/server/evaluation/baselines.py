"""The baselines of an experiment (`eval.controls`): what the frozen base reaches when only a head on top of it is
trained.

Both figures need only the base's features, which are computed once:

- *same rounds*: the run's own federation, cohorts, batches, local and server optimizer, everything sent, but only the
head
  trains. The difference from the run is what the adapters did.
- *central*: the head trained to convergence on all rows at once, regularised by validation. It is harder to beat,
because
  it knows no federation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.clients.local_training import PackMember, TrainingContext, train_pack
from rayfed.clients.plan import RunPlan
from rayfed.lora.adapter import Adapter
from rayfed.lora.packed.segments import Segment
from rayfed.lora.packed.stack import Stack
from rayfed.methods import Update
from rayfed.methods.fedit import FedIT
from rayfed.server.evaluation.evaluate import features
from rayfed.server.evaluation.linear_probe import fit_probe
from rayfed.server.executor import Executor
from rayfed.server.optimizers import ServerOptimizer, scheduled
from rayfed.server.sampling import cohort_of


@dataclass(frozen=True)
class FeatureRows:
    """Features (n, width) and labels (n,) in the place of tokens: every row has one length."""

    features: Tensor
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self.labels), dtype=np.int64)

    def batch(self, rows: np.ndarray, padded: bool) -> dict[str, Tensor]:
        """``features`` (b, width) and ``labels`` (b,)."""
        return {"features": self.features[torch.as_tensor(rows)], "labels": torch.from_numpy(self.labels[rows])}


@dataclass(frozen=True)
class Baselines:
    """Test accuracies (0 to 1); ``same_rounds`` is None where the head is frozen or more than one linear layer."""

    same_rounds: float | None
    central: float


def measure_baselines(plan: RunPlan, rounds: int, executor: Executor) -> Baselines:
    """Both baselines, after so many rounds."""
    size, federation, head = plan.eval.batch_size, plan.federation, plan.model.head
    train, test = (features(executor, federation, split, size) for split in ("train", "test"))
    validation = features(executor, federation, "validation", size) if len(federation.validation) else None
    central = fit_probe(train, validation, test, len(federation.classes))
    modules = {name.rpartition(".")[0] for name in head}
    if len(modules) != 1:
        return Baselines(None, central)
    rows = FeatureRows(train[0], train[1].numpy())
    return Baselines(_same_rounds(plan, head, modules.pop(), rows, test, rounds), central)


def _same_rounds(
    plan: RunPlan, head: Mapping[str, Tensor], name: str, train: FeatureRows, test: tuple[Tensor, Tensor], rounds: int
) -> float:
    classes, width = head[f"{name}.weight"].shape
    model = nn.Sequential(OrderedDict(head=nn.Linear(width, classes, bias=f"{name}.bias" in head)))
    stack = Stack(model, (), ["head"])
    start = Adapter({}, {key.replace(name, "head", 1): tensor for key, tensor in head.items()})
    method, optimizer = FedIT(), ServerOptimizer(plan.server_optimizer, plan.server)
    state = method.init(start, plan.seed)
    everything = torch.ones(state.layout.size, dtype=torch.bool)

    def logits(inputs: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = model(inputs["features"])
        return outputs

    own = (plan.client, plan.seed, torch.device("cpu"))
    context = TrainingContext(stack, logits, plan.task, train, True, *own, objective=plan.objective)
    for t in range(rounds):
        optimizer.lr = scheduled(optimizer.base_lr, plan.server.schedule, t, plan.server.rounds)
        lr = scheduled(plan.client.lr, plan.client.schedule, t, plan.server.rounds)
        updates = []
        for c in cohort_of(plan, t):
            rows = plan.federation.rows_of(c)
            (trained,) = train_pack(context, [PackMember(c, state.layout, state.vector, everything, rows)], lr=lr, t=t)
            profile = plan.profiles.profile(c, len(rows), t)
            change = trained.vector - state.vector
            updates.append(Update(profile, plan.weighting.weight(profile), state.vector, change, state.layout))
        state = method.aggregate(state, updates, optimizer.advance) if updates else state
    stack.load([state.layout.unflatten(state.vector)])
    with torch.no_grad(), stack.using([Segment(0, len(test[1]))]):
        right = logits({"features": test[0]}).argmax(-1) == test[1]
    return float(right.double().mean())
