"""LoRA-A2: the best ranks of the whole model go up, whole ones only, and their mean stays exact."""

import itertools
from dataclasses import replace

import pytest
import torch

from rayfed.methods.base import Profile
from rayfed.methods.lora_a2 import LoRAA2

SHAPES = {"tall": (7, 5), "wide": (4, 9)}
HEADS = {"head.weight": (3, 4)}
COHORTS = [
    [Profile(0, 3, 2.0, examples=3), Profile(1, 3, 2.0, density_up=0.5, examples=5)],
    [Profile(2, 3, 2.0, density_up=0.3, examples=1)],
    [
        Profile(1, 3, 2.0, density_up=0.5, examples=5),
        Profile(0, 3, 2.0, examples=3),
        Profile(3, 3, 2.0, density_up=0.7),
    ],
]


def noise(round_):
    def train(client, start, adapter):
        rng = torch.Generator().manual_seed(100 * round_ + client.client)
        return start.layout.unflatten(adapter.flatten() + 0.3 * torch.randn(start.layout.size, generator=rng))

    return train


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def greedy(start, change, room):
    """Ranks by the norm of the product's change, formed in full; lines are told by layer, part and j."""
    ranks = []
    for name, pair in start.layers.items():
        B, A = pair.B.double(), pair.A.double()
        dB, dA = change.layers[name].B.double(), change.layers[name].A.double()
        for j in range(pair.rank):
            product = torch.outer(dB[:, j], A[j]) + torch.outer(B[:, j], dA[j])
            part = "B" if dB.any() else "A"
            ranks.append((float(pair.scale * product.norm()), name, part, j))
    chosen = set()
    for score, name, part, j in sorted(ranks, key=lambda r: -r[0]):
        size = SHAPES[name][0 if part == "B" else 1]
        if score > 0 and size <= room:
            chosen.add((name, part, j))
            room -= size
    return chosen


def lines(adapter):
    """Which whole ranks are marked in an adapter of zeros and ones; fails where a rank is marked in part."""
    found = set()
    for name, pair in adapter.layers.items():
        for j, (part, line) in itertools.product(range(pair.rank), (("B", pair.B.T), ("A", pair.A))):
            assert line[j].any() == line[j].all()
            if line[j].any():
                found.add((name, part, j))
    return found


@pytest.mark.parametrize("head_budget", ["share", "whole"])
@pytest.mark.parametrize("part", ["B", "A"])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_the_best_ranks_that_fit_go_up_whole(random_adapter, part, density, head_budget):
    method = LoRAA2(head_budget=head_budget)
    start = random_adapter(SHAPES, 3, 2.0, seed=1, heads=HEADS)
    start.layers["wide"] = replace(
        start.layers["wide"], scale=6.0
    )  # of two ranks that move alike, this one counts more
    layout = start.layout
    allowed = layout.mask(part, "head")
    change = torch.randn(layout.size, generator=torch.Generator().manual_seed(2)) * allowed
    budget = int(density * int(allowed.sum()))
    chosen = method.select(start.flatten(), change, layout, budget, density)
    assert len(chosen) <= budget
    assert (chosen.diff() > 0).all()
    marks = torch.zeros(layout.size)
    marks[chosen] = 1.0
    marked = layout.unflatten(marks)
    head = int(marked.head["head.weight"].sum())
    assert head == min(budget, 12 if head_budget == "whole" else int(density * 12))
    assert lines(marked) == greedy(start, layout.unflatten(change), budget - head)
    sent, left = change[layout.mask("head") & (marks == 1)], change[layout.mask("head") & (marks == 0)]
    assert not len(sent) or not len(left) or sent.abs().min() >= left.abs().max()


def test_ranks_that_did_not_change_are_not_sent(random_adapter):
    start = random_adapter(SHAPES, 3, 2.0, seed=1, heads=HEADS)
    change = torch.zeros(start.layout.size)
    assert LoRAA2().select(start.flatten(), change, start.layout, 30, 0.9).numel() == 0
    start.layout.unflatten(change).layers["wide"].B[2, 1] = 1.0  # a view
    chosen = LoRAA2().select(start.flatten(), change, start.layout, 30, 0.9)
    marks = start.layout.unflatten(torch.zeros(start.layout.size).index_fill(0, chosen, 1.0))
    assert lines(marks) == {("wide", "B", 1)}


def test_where_no_rank_fits_the_largest_entries_go_up(random_adapter):
    start = random_adapter(SHAPES, 3, 2.0, seed=1, heads=HEADS)
    change = torch.randn(start.layout.size, generator=torch.Generator().manual_seed(2)) * start.layout.mask("B")
    for budget in (1, 3):  # a rank of B has 4 entries or more
        chosen = LoRAA2().select(start.flatten(), change, start.layout, budget, 0.01)
        assert chosen.tolist() == sorted(change.abs().argsort(descending=True)[:budget].tolist())


@pytest.mark.parametrize("zero_B", [True, False])
def test_every_round_is_the_mean_of_the_products_that_arrived(play, random_adapter, zero_B):
    method, adapter = LoRAA2(), random_adapter(SHAPES, 3, 2.0, seed=1, heads=HEADS)
    for pair in adapter.layers.values():
        pair.B.mul_(0.0 if zero_B else 1.0)
    state = method.init(adapter, seed=0)
    for t, cohort in enumerate(COHORTS):
        state, updates = play(method, state, cohort, noise(t))
        total = sum(u.weight for u in updates)
        for name in SHAPES:
            wanted = torch.zeros(SHAPES[name], dtype=torch.float64)
            for u in updates:
                pair = u.trained.layers[name]
                wanted += u.weight / total * 2.0 * (pair.B.double() @ pair.A.double())
            assert error(method.delta(state, name).dense(), wanted) < 1e-6
        head = sum(u.weight / total * u.trained.head["head.weight"].double() for u in updates)
        assert error(method.head(state)["head.weight"], head) < 1e-6
        marked = [lines(u.layout.unflatten((u.change != 0).float())) for u in updates]
        assert state.report["ranks_sent"] == pytest.approx(sum(len(m) / 6 for m in marked) / len(marked))
        assert all(part == "BA"[t % 2] for m in marked for _, part, _ in m)


def test_b_learns_faster(random_adapter):
    state = LoRAA2().init(random_adapter(SHAPES, 3, 2.0, seed=1), seed=0)
    assert LoRAA2().trainable(state, COHORTS[0][0]).rates == {"B": 5.0}
    assert LoRAA2(rate_B=2.0).trainable(state, COHORTS[0][0]).parts == ("B", "head")
