"""FLASC against a dense reference written from the paper's equations on a real PEFT model: masks and loops.

tests/methods/peft_reference.py says what the reference shares with rayfed.
"""

from __future__ import annotations

import math

import pytest
import torch
from peft_reference import ROUNDS, PeftClient, random_start, run, top

import rayfed
from rayfed.clients.local_training import batches
from rayfed.clients.plan import RunPlan
from rayfed.lora.adapter import Adapter
from rayfed.server.sampling import cohort


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


@pytest.mark.parametrize("optimizer", ["adamw", "fedadam"])
@pytest.mark.parametrize("density", [1, 0.25, 0.0625])
def test_all_rounds_agree_with_the_reference(tiny, tmp_path, monkeypatch, density, optimizer):
    experiment = tiny(
        f"server.rounds={ROUNDS}", f"server.optimizer={optimizer}", f"eval.every={ROUNDS}",
        f"wire.down.density={density}", f"wire.up.density={density}",
    )  # fmt: skip
    fresh = RunPlan.start
    monkeypatch.setattr(RunPlan, "start", lambda plan: random_start(fresh(plan)))
    ours = run(experiment, tmp_path / "run")["vector"]
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
