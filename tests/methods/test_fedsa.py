"""FedSA: A is averaged; B and the head stay with their client, and nothing of them reaches anybody else."""

import pytest
import torch

from rayfed.methods.base import Profile
from rayfed.methods.fedsa import FedSA

SHAPES = {"tall": (7, 5), "wide": (4, 9)}
COHORTS = [
    [Profile(0, 2, 4.0, examples=3), Profile(1, 2, 4.0, density_up=0.3, examples=5)],
    [Profile(2, 2, 4.0, density_down=0.5, examples=1), Profile(0, 2, 4.0, examples=3)],
    [Profile(1, 2, 4.0, density_up=0.3, examples=5)],
]


def noise(round_):
    def train(client, start, adapter):
        rng = torch.Generator().manual_seed(100 * round_ + client.client)
        return start.layout.unflatten(adapter.flatten() + 0.3 * torch.randn(start.layout.size, generator=rng))

    return train


def begin(method, random_adapter, zero_B=True):
    adapter = random_adapter(SHAPES, 2, 4.0, seed=1)
    for pair in adapter.layers.values():
        pair.B.mul_(0.0 if zero_B else 1.0)
    return method.init(adapter, seed=0)


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("zero_B", [True, False])
def test_against_an_oracle_with_a_model_per_client(play, random_adapter, zero_B):
    method = FedSA()
    state = begin(method, random_adapter, zero_B)
    first = state.layout.unflatten(state.vector)
    A = {name: pair.A.double() for name, pair in first.layers.items()}
    day_one = {name: pair.B.double() for name, pair in first.layers.items()}, first.head["head.weight"].double()
    own = {}  # client: ({layer: B}, head)
    for t, cohort in enumerate(COHORTS):
        state, updates = play(method, state, cohort, noise(t))
        total = sum(u.weight for u in updates)
        for u in updates:
            k = u.client.client
            rng = torch.Generator().manual_seed(100 * t + k)  # what `noise` does to this client
            moved = state.layout.unflatten(0.3 * torch.randn(state.layout.size, generator=rng))
            B, head = own.get(k, day_one)
            own[k] = ({n: B[n] + moved.layers[n].B.double() for n in SHAPES}, head + moved.head["head.weight"].double())
        for name in SHAPES:
            A[name] = A[name] + sum(
                u.weight / total * u.layout.unflatten(u.change).layers[name].A.double() for u in updates
            )
            mean_B = sum(B[name] for B, _ in own.values()) / len(own)
            assert error(method.delta(state, name).dense(), 4.0 * mean_B @ A[name]) < 1e-6
            for k, (B, _) in own.items():
                assert error(method.own(state, k).layers[name].dense(), 4.0 * B[name] @ A[name]) < 1e-6
        for k, (_, head) in own.items():
            assert error(method.own(state, k).head["head.weight"], head) < 1e-6
        assert error(method.head(state)["head.weight"], sum(h for _, h in own.values()) / len(own)) < 1e-6
        assert state.report == {"clients_seen": len(own)}


def test_nothing_leaks_from_client_to_client(play, random_adapter):
    method, personal = FedSA(), ("B", "head")
    state = begin(method, random_adapter)
    first, layout = state.vector, state.layout
    mine = layout.mask(*personal)
    state, updates = play(method, state, COHORTS[0], noise(0))
    assert all(not u.change[mine].any() for u in updates)  # what is personal never goes up
    starts = {k: method.broadcast(state, Profile(k, 2, 4.0)).vector for k in range(3)}
    assert torch.equal(starts[2][mine], first[mine])  # never seen: as on the first day
    assert not torch.equal(starts[0][mine], starts[1][mine])
    later, _ = play(method, state, [Profile(1, 2, 4.0)], noise(1))
    again = method.broadcast(later, Profile(0, 2, 4.0))
    assert torch.equal(again.vector[mine], starts[0][mine])
    assert torch.equal(again.known, mine)
    again.vector.fill_(7.0)  # storage of its own: writing into a start reaches no state
    assert torch.equal(method.broadcast(later, Profile(0, 2, 4.0)).vector[mine], starts[0][mine])
    assert torch.equal(later.vector[mine], first[mine])


def test_the_server_step_moves_a_alone(play, random_adapter):
    method = FedSA()
    state = begin(method, random_adapter)
    after, _ = play(method, state, COHORTS[0], noise(0), advance=lambda name, value, change: value + change + 1)
    assert torch.equal(after.vector != state.vector, state.layout.mask("A"))


def test_an_update_without_its_personal_parts_is_refused(play, random_adapter):
    method = FedSA()
    state = begin(method, random_adapter)
    _, updates = play(method, state, COHORTS[0], noise(0))
    object.__setattr__(updates[0], "personal_values", None)
    with pytest.raises(ValueError, match="personal"):
        method.aggregate(state, updates)
