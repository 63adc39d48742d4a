"""FLASC's baselines and tiers against a dense float64 reference with a mask for every client, as in the authors' code.

The reference keeps one vector of the largest rank. What a client lacks is masked to zero at its start, and every client
trains a PEFT model of the largest rank and its scale. tests/methods/peft_reference.py says what else it shares.
"""

from __future__ import annotations

import math

import pytest
import torch
from peft_reference import ROUNDS, PeftClient, random_start, run, sgd, top

import rayfed
from rayfed.clients.local_training import batches
from rayfed.clients.plan import RunPlan
from rayfed.errors import UserError
from rayfed.server.sampling import cohort
from rayfed.tasks.models.base import load_base

EMPTY = ("server.empty_clients=true", "partition.clients=16", "partition.alpha=0.05")  # some clients hold no rows
EPS = 1e-3  # of the server's AdamW: the default, 1e-8, makes whole steps of the rounding of the smallest gradients
TIERS = ("profiles.kind=tiers", "server.cohort=4")


def reference(experiment, plan, P, train, down, up=lambda t, c, delta: 1.0, masked=False):
    """P (n,) after the rounds. ``down(t, c, P)`` and ``up(t, c, delta)`` are the masks of client c in round t."""
    federation, settings = plan.federation, experiment.server
    server = torch.nn.Parameter(P.double().clone())
    adamw = torch.optim.AdamW([server], lr=1e-3, eps=EPS)
    drawn_from = range(federation.clients) if settings.empty_clients else federation.holders
    empty = 0
    for t in range(ROUNDS):
        P, total = server.detach().clone(), torch.zeros_like(server)
        for c in (drawn := cohort(drawn_from, settings.cohort, experiment.seed, t)):
            rows, mask = federation.rows_of(c), down(t, c, P)
            empty += not len(rows)
            steps = batches(rows, experiment.client, experiment.seed, t, c)
            begin = P * mask
            delta = train(begin, steps, federation, experiment.client, mask if masked else None) - begin
            total += delta * up(t, c, delta)
        server.grad = -total / len(drawn)
        adamw.step()
    assert (empty > 0) == settings.empty_clients
    return server.detach()


@pytest.fixture
def compared(tiny, tmp_path, monkeypatch):
    """compared(overrides, masks): runs both; ``masks(layout)`` gives ``down``, ``up`` and ``masked`` of `reference`."""
    fresh = RunPlan.start
    monkeypatch.setattr(RunPlan, "start", lambda plan: random_start(fresh(plan)))

    def compare(overrides, masks, values=lambda tensors, layout: tensors["vector"]):
        experiment = tiny(f"server.rounds={ROUNDS}", f"eval.every={ROUNDS}", f"server.eps={EPS}", *overrides)
        tensors, plan = run(experiment, tmp_path / "run"), rayfed.prepare(experiment)
        start = plan.start()
        client = PeftClient(experiment, plan, start, torch.float64)
        P = start.flatten()
        theirs = reference(experiment, plan, P, client.train, **masks(start.layout))
        assert_close(values(tensors, start.layout), theirs, P)

    return compare


def assert_close(ours, theirs, start):
    moved = (theirs - start).norm()
    assert moved > 1e-3  # five rounds did something
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    assert (ours - theirs).norm() <= 1e-4 * moved


def largest(values, density):
    return top(values, math.floor(density * len(values)))


def by_factor(vector, layout, ranks, head=torch.ones_like):
    """1 on the rows of each A and the columns of each B that ``ranks(norms)`` picks; on the head, ``head(values)``."""
    parts = []
    for entry in layout.entries:
        if entry.part == "head":  # it comes last
            break
        values = vector[entry.start : entry.start + entry.numel].view(entry.shape)
        rows = values if entry.part == "A" else values.T
        mask = ranks(torch.stack([row.norm() for row in rows]))[:, None] * torch.ones_like(rows)
        parts.append(mask if entry.part == "A" else mask.T)
    return torch.cat([*(part.flatten() for part in parts), head(vector[layout.mask("head")])])


@pytest.mark.parametrize("mask", [pytest.param("refresh", marks=pytest.mark.slow), "fixed"])
def test_masked_training_under_a_decay(compared, mask):
    """Adapter LTH cuts the mask anew. SparseAdapter sends the first download dense, though not the first uploads, and
    its mask keeps the density of the second round.
    """

    def masks(layout):
        fixed = []

        def down(t, c, P):
            if mask == "refresh":
                return largest(P, 0.9 * 0.8**t)
            if t == 0:
                return torch.ones_like(P)
            if not fixed:
                fixed.append(largest(P, 0.9 * 0.8))
            return fixed[0]

        return {"down": down, "up": lambda t, c, delta: largest(delta, 0.5 * 0.9**t), "masked": True}

    decays = ("wire.down.density=0.9", "wire.down.decay=0.8", "wire.up.density=0.5", "wire.up.decay=0.9")
    compared((f"method.mask={mask}", "method.train=masked", *decays), masks)


@pytest.mark.parametrize("mask", ["refresh", "fixed"])
def test_density_tiers_with_a_dense_head_and_empty_clients(compared, mask):
    densities = (0.25, 0.5, 1.0)

    def masks(layout):
        lora, first = ~layout.mask("head"), []

        def down(t, c, P):
            if mask == "fixed" and t == 0:
                return torch.ones_like(P)
            first.extend([P] if not first else [])
            whole = torch.ones_like(P)
            whole[lora] = largest((first[0] if mask == "fixed" else P)[lora], densities[c % 3])
            return whole

        return {"down": down, "up": lambda t, c, delta: largest(delta, densities[c % 3])}

    both = [f"profiles.densities_{way}=[0.25,0.5,1.0]" for way in ("down", "up")]
    compared((*TIERS, *EMPTY, *both, "wire.down.head=dense", f"method.mask={mask}"), masks)


@pytest.mark.parametrize("down_alone", [True, False], ids=["as in the code", "both ways"])
def test_structured_sparsity_takes_rows_of_A_and_columns_of_B_by_their_norms(compared, down_alone):
    def masks(layout):
        def ranks(density):
            return lambda norms: largest(norms, density)

        if down_alone:
            return {"down": lambda t, c, P: by_factor(P, layout, ranks((0.25, 0.5, 1.0)[c % 3]))}
        return {
            "down": lambda t, c, P: by_factor(P, layout, ranks(0.5), ranks(0.5)),
            "up": lambda t, c, delta: by_factor(delta, layout, ranks(0.75), ranks(0.75)),
        }

    tiers = (*TIERS, "profiles.densities_down=[0.25,0.5,1.0]", "wire.down.head=dense")
    both = ("wire.down.density=0.5", "wire.up.density=0.75")
    compared(("method.sparsity=structured", *(tiers if down_alone else both)), masks)


def in_order(tensors, layout):
    """The tensors of a state by layer as one flat vector."""
    names = [f"{entry.part}.{entry.name}" for entry in layout.entries]
    return torch.cat([tensors[name].flatten() for name in names])


def test_rank_tiers_average_padded_changes(compared):
    def masks(layout):
        def down(t, c, P):
            first = torch.arange(4) < (1, 2, 4)[c % 3]
            return by_factor(P, layout, lambda norms: first.double())

        return {"down": down}

    tiers = (*TIERS, "profiles.ranks=[1,2,4]", "profiles.scale=server", *EMPTY)
    compared(("method.name=padded_changes", *tiers), masks, in_order)


def test_full_finetuning_trains_the_weights_themselves(tiny, tmp_path):
    experiment = tiny(
        f"server.rounds={ROUNDS}", f"eval.every={ROUNDS}", f"server.eps={EPS}", "method.name=full_finetuning"
    )
    tensors, plan = run(experiment, tmp_path / "run"), rayfed.prepare(experiment)
    layers, head = sorted(plan.trained_shapes), plan.start().head
    model = load_base(experiment.model, len(plan.federation.classes), experiment.seed).model
    model.double().eval().requires_grad_(True)
    named = dict(model.named_parameters())
    parameters = [named[f"{layer}.weight"] for layer in layers] + [named[name] for name in sorted(head)]
    before = torch.cat([named[f"{layer}.weight"].detach().flatten() for layer in layers])
    pretrained = torch.cat([before, torch.zeros(sum(map(torch.numel, head.values())))])

    def train(start, *others):
        return sgd(model, parameters, pretrained + start, *others) - pretrained

    P = torch.cat([torch.zeros_like(before), *(head[name].flatten() for name in sorted(head))])
    theirs = reference(experiment, plan, P, train, lambda t, c, P: 1.0)
    names = [f"W.{layer}" for layer in layers] + [f"head.{name}" for name in sorted(head)]
    assert_close(torch.cat([tensors[name].flatten() for name in names]), theirs, P)


def test_empty_clients_need_weights_that_count_them(tiny):
    with pytest.raises(UserError, match=r"^server\.empty_clients: got true, but the weights are 'examples'"):
        rayfed.prepare(tiny("server.empty_clients=true", "server.weights=examples"))
    users = ("partition.kind=natural", "data.client=owner")
    with pytest.raises(UserError, match=r"^server\.cohort: got 13, but only 7 of 7 clients exist"):
        rayfed.prepare(tiny("server.empty_clients=true", "server.cohort=13", *users))
