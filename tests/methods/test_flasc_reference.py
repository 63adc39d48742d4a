"""FLASC against a dense reference written from the paper's equations on a real PEFT model: masks and loops.

The reference shares with rayfed only what the equations leave open: who is drawn, in which order a client sees its
rows, and the start values. It trains a PEFT model with torch's own optimizers, one client at a time, and keeps the
global model as a plain vector.
"""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model

import rayfed
from rayfed.clients.local_training import batches
from rayfed.clients.plan import RunPlan
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.peft import lora_config
from rayfed.server.checkpoint import restore
from rayfed.server.sampling import cohort
from rayfed.tasks.models.base import load_base

ROUNDS = 5


def top(values: torch.Tensor, k: int) -> torch.Tensor:
    """1 where an entry is among the k largest magnitudes, the lower index winning ties; sorted in plain Python."""
    order = sorted(range(len(values)), key=lambda i: (-abs(float(values[i])), i))
    mask = torch.zeros(len(values))
    mask[order[:k]] = 1.0
    return mask


class PeftClient:
    """A PEFT model whose trainable parameters can be set from, and read as, the flat vector."""

    def __init__(self, experiment, plan, start):
        base = load_base(experiment.model, len(plan.federation.classes), experiment.seed)
        self.model = get_peft_model(
            base.model, lora_config(**experiment.lora.model_dump(exclude={"train", "compute"}), head=base.head)
        ).eval()
        named = dict(self.model.named_parameters())
        self.parameters = []
        for entry in start.layout.entries:
            prefix = f"base_model.model.{entry.name}"
            if entry.part == "head":
                module, _, kind = prefix.rpartition(".")
                self.parameters.append(named[f"{module}.modules_to_save.default.{kind}"])
            else:
                self.parameters.append(named[f"{prefix}.lora_{entry.part}.default.weight"])

    def train(self, start, steps, federation, settings):
        with torch.no_grad():
            offset = 0
            for parameter in self.parameters:
                parameter.copy_(start[offset : offset + parameter.numel()].view_as(parameter))
                offset += parameter.numel()
        optimizer = torch.optim.SGD(self.parameters, lr=settings.lr, momentum=settings.momentum)
        for rows in steps:
            batch = federation.train.batch(rows, padded=True)
            labels = batch.pop("labels")
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(self.model(**batch).logits, labels).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in self.parameters])


def reference(experiment, plan, start: Adapter) -> torch.Tensor:
    """P after ROUNDS rounds, step for step as FLASC's algorithm box gives them."""
    federation = plan.federation
    client = PeftClient(experiment, plan, start)
    P = start.flatten()
    n = len(P)
    server = torch.nn.Parameter(P.clone())
    adamw = torch.optim.AdamW([server], lr=1e-3)
    m, v = torch.zeros(n), torch.full((n,), 1e-6)
    for t in range(ROUNDS):
        sparse = P * top(P, math.floor(experiment.wire.down.density * n))
        total = torch.zeros(n, dtype=torch.float64)
        drawn = cohort(federation.holders, experiment.server.cohort, experiment.seed, t)
        for c in drawn:
            steps = batches(federation.rows_of(c), experiment.client, experiment.seed, t, c)
            delta = client.train(sparse, steps, federation, experiment.client) - sparse
            total += delta * top(delta, math.floor(experiment.wire.up.density * n))
        mean = (total / len(drawn)).float()
        if experiment.server.optimizer == "adamw":
            server.grad = -mean
            adamw.step()
            P = server.detach().clone()
        else:  # FedAdam, Reddi et al. 2021
            m = 0.9 * m + 0.1 * mean
            v = 0.99 * v + 0.01 * mean**2
            P = P + 1e-3 * m / (torch.sqrt(v) + 1e-3)
    return P


def random_start(adapter: Adapter) -> Adapter:
    """B = 0 would leave A's first changes at rounding level, and a comparison of them would say nothing."""
    draw = torch.Generator().manual_seed(7)
    layers = {
        name: LowRank(0.1 * torch.randn(pair.B.shape, generator=draw), pair.A, pair.scale)
        for name, pair in sorted(adapter.layers.items())
    }
    return Adapter(layers, adapter.head)


def run(experiment, out) -> torch.Tensor:
    rayfed.run(experiment, out=out)
    found, _ = restore(out, experiment.digest())
    assert found is not None
    assert found.checkpoint.round == ROUNDS
    return found.method["vector"]


@pytest.mark.parametrize("optimizer", ["adamw", "fedadam"])
@pytest.mark.parametrize("density", [1, 0.25, 0.0625])
def test_all_rounds_agree_with_the_reference(tiny, tmp_path, monkeypatch, density, optimizer):
    experiment = tiny(
        f"server.rounds={ROUNDS}", f"server.optimizer={optimizer}", f"eval.every={ROUNDS}",
        f"wire.down.density={density}", f"wire.up.density={density}",
    )  # fmt: skip
    fresh = RunPlan.start
    monkeypatch.setattr(RunPlan, "start", lambda plan: random_start(fresh(plan)))
    ours = run(experiment, tmp_path / "run")
    plan = rayfed.prepare(experiment)
    start = plan.start()
    theirs = reference(experiment, plan, start)
    moved = (theirs - start.flatten()).norm()
    assert moved > 1e-3  # five rounds did something
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    assert (ours - theirs).norm() <= 1e-4 * moved


def test_density_one_is_the_dense_run_to_the_bit(tiny, tmp_path):
    """FedIT sends everything and knows no masks; with the same weights and server step FLASC at density 1 is it."""
    same = ("server.rounds=3", "server.weights=uniform", "server.optimizer=adamw")
    flasc = rayfed.run(tiny(*same), out=tmp_path / "flasc")
    dense = rayfed.run(tiny(*same, "method.name=fedit"), out=tmp_path / "dense")
    for ours, theirs in zip(flasc.metrics, dense.metrics, strict=True):
        assert ours["state/digest"] == theirs["state/digest"]
        assert ours["bytes/total"] == theirs["bytes/total"]
