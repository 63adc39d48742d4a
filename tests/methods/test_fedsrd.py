"""FedSRD (our reading): importance decides what goes up, one factor's projected change comes down, pruned too."""

import pytest
import torch

from rayfed.methods.base import Profile
from rayfed.methods.fedsrd import FedSRD

SHAPES = {"tall": (7, 5), "wide": (4, 9)}
SCALE = 4.0
COHORTS = [
    [Profile(0, 2, SCALE, examples=3), Profile(1, 2, SCALE, density_up=0.3, examples=5)],
    [Profile(2, 2, SCALE, density_up=0.5, examples=1)],
    [Profile(1, 2, SCALE, density_up=0.3, examples=5), Profile(0, 2, SCALE, examples=3), Profile(3, 2, SCALE)],
    [Profile(3, 2, SCALE), Profile(2, 2, SCALE, density_up=0.5, examples=1)],
]


def noise(round_, parts=("A", "B", "head")):
    def train(client, start, adapter):
        rng = torch.Generator().manual_seed(100 * round_ + client.client)
        step = 0.3 * torch.randn(start.layout.size, generator=rng) * start.layout.mask(*parts)
        return start.layout.unflatten(adapter.flatten() + step)

    return train


def begin(method, random_adapter, zero_B=True):
    adapter = random_adapter(SHAPES, 2, SCALE, seed=1)
    for pair in adapter.layers.values():
        pair.B.mul_(0.0 if zero_B else 1.0)
    return method.init(adapter, seed=0)


def dense(pair):
    return pair.scale * pair.B.double() @ pair.A.double()


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("zero_B", [True, False])
def test_against_a_dense_oracle(play, random_adapter, zero_B, density):
    """D in full, the projection by pinv, the importance as norms of outer products, a stable sort for the choice."""
    method = FedSRD(density=density)
    state = begin(method, random_adapter, zero_B)
    for t, cohort in enumerate(COHORTS):
        factor, other = ("B", "A") if t % 2 == 0 else ("A", "B")
        before = state.layout.unflatten(state.vector)
        state, updates = play(method, state, cohort, noise(t))
        p = [u.weight / sum(v.weight for v in updates) for u in updates]
        change, score = {}, {}
        for name, pair in before.layers.items():
            D = sum(q * (dense(u.trained.layers[name]) - dense(u.sent.layers[name])) for q, u in zip(p, updates))
            inverse = torch.linalg.pinv(getattr(pair, other).double())
            change[name] = D @ inverse / SCALE if factor == "B" else inverse @ D / SCALE
            fixed = pair.A.double().norm(dim=1) if factor == "B" else pair.B.double().norm(dim=0)[:, None]
            score[name] = SCALE * change[name].abs() * fixed
        change["head"] = sum(q * u.layout.unflatten(u.change).head["head.weight"].double() for q, u in zip(p, updates))
        score["head"] = change["head"].abs()
        factors = torch.cat([score[name].flatten() for name in SHAPES])
        budget = int(density * (len(factors) + 15)) - int(density * 15)
        limit = factors.sort(descending=True).values[budget - 1]
        limit_head = score["head"].flatten().sort(descending=True).values[int(density * 15) - 1]
        for name, pair in before.layers.items():
            kept = change[name] * (score[name] >= limit)
            B = pair.B.double() + (kept if factor == "B" else 0)
            A = pair.A.double() + (kept if factor == "A" else 0)
            assert error(dense(method.delta(state, name)), SCALE * B @ A) < 1e-6
        kept = change["head"] * (score["head"] >= limit_head)
        assert error(method.head(state)["head.weight"].double(), before.head["head.weight"].double() + kept) < 1e-6
        energy = float(factors[factors >= limit].square().sum() + kept.square().sum())
        assert state.report["energy_kept"] == pytest.approx(
            energy / float(factors.square().sum() + change["head"].square().sum())
        )
        fixed = state.layout.mask(other)
        assert torch.equal(state.vector[fixed], before.flatten()[fixed])


def test_exact_where_clients_move_the_projected_factor_only(play, random_adapter):
    method = FedSRD(density=1.0)
    state = begin(method, random_adapter)
    for t, factor in enumerate("BAB"):
        state, updates = play(method, state, COHORTS[t], noise(t, (factor, "head")))
        total = sum(u.weight for u in updates)
        for name in SHAPES:
            mean = sum(u.weight / total * dense(u.trained.layers[name]) for u in updates)
            assert error(dense(method.delta(state, name)), mean) < 1e-6


def test_uploads_keep_what_moves_the_weights_most(random_adapter):
    method, start = FedSRD(), random_adapter(SHAPES, 2, SCALE, seed=1)
    layout = start.layout
    change = torch.randn(layout.size, generator=torch.Generator().manual_seed(2))
    trained = layout.unflatten(start.flatten() + change)
    score = torch.zeros(layout.size, dtype=torch.float64)
    for entry in layout.entries:
        for i in range(entry.numel):
            x = abs(float(change[entry.start + i]))
            u, v = divmod(i, entry.shape[1])
            if entry.part == "B":
                x *= SCALE * float(start.layers[entry.name].A[v].double().norm())
            elif entry.part == "A":
                x *= SCALE * float(trained.layers[entry.name].B[:, u].double().norm())
            score[entry.start + i] = x
    in_head = layout.mask("head")
    head = torch.where(in_head, score, -1.0).sort(descending=True).indices[:3]  # 0.2 of 15
    factors = torch.where(in_head, -1.0, score).sort(descending=True).indices[:17]
    wanted = torch.cat([head, factors]).sort().values
    assert torch.equal(method.select(start.flatten(), change, layout, 20, 0.2), wanted)


def test_a_client_has_whatever_does_not_travel(play, random_adapter):
    """Each client remembers the model of its last round: what is held must be in that memory, to the bit."""
    method, memory = FedSRD(density=0.3), {}
    state = begin(method, random_adapter)
    for t, cohort in enumerate(COHORTS + COHORTS):
        for client in cohort:
            start = method.broadcast(state, client)
            if client.client not in memory:
                assert start.known is None
            else:
                known = memory[client.client]
                assert torch.equal(start.vector[start.known], known[start.known])
                assert torch.equal(~start.known, start.vector != known)  # by chance no entry came back to its value
            memory[client.client] = start.vector
        before = state.vector
        state, _ = play(method, state, cohort, noise(t))
        assert 0 < int((state.vector != before).sum()) <= int(0.3 * state.layout.mask("BA"[t % 2], "head").sum())


def test_a_loud_head_does_not_silence_the_factors(play, random_adapter):
    method = FedSRD(density=0.1)
    state = begin(method, random_adapter)

    def train(client, start, adapter):
        loud = torch.where(start.layout.mask("head"), 1e3, 1e-3)
        return start.layout.unflatten(adapter.flatten() + loud)

    state, updates = play(method, state, [Profile(0, 2, SCALE, density_up=0.2)], train)
    assert updates[0].change[state.layout.mask("A", "B")].any()
    assert any(method.delta(state, name).dense().any() for name in SHAPES)


def test_a_budget_beneath_one_entry_a_part_still_sends_one(play, random_adapter):
    method, head_only = FedSRD(density=0.001), random_adapter({}, 2, SCALE, seed=1)
    states = begin(method, random_adapter), method.init(head_only, seed=0)
    for state in states:
        change = torch.randn(state.layout.size, generator=torch.Generator().manual_seed(3))
        (chosen,) = method.select(state.vector, change, state.layout, 1, 0.001)
        assert bool(state.layout.mask("head")[chosen]) == (state is not states[0])  # the head takes its share at most
        after, _ = play(method, state, COHORTS[0], noise(0))
        assert int((after.vector != state.vector).sum()) == 1


def test_a_round_for_a_beneath_a_b_of_zero_is_finite(play, random_adapter):
    method = FedSRD(density=1.0)
    state, _ = play(method, begin(method, random_adapter), COHORTS[0])  # nobody learned: B is still 0
    state, _ = play(method, state, COHORTS[1], noise(1, ("A",)))
    assert torch.isfinite(state.vector).all()
    assert all(not method.delta(state, name).dense().any() for name in SHAPES)
