"""Packs: every client once, packs of about equal cost, whatever the order of the cohort or the number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfed.api import prepare
from rayfed.config.training import Client
from rayfed.methods import Profile
from rayfed.server.sampling import client_costs, plan_packs


def profiles(ids):
    return [Profile(client=c, rank=4, scale=1.0) for c in ids]


def ids_of(packs):
    return [[client.client for client in pack] for pack in packs]


def test_by_hand():
    costs = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 9.0])
    # 9 | 5, then 4 beside 5 makes 9 = 9: the first lightest is 9's pack, which takes 3; then 2 and 1
    assert ids_of(plan_packs(profiles([0, 1, 2, 3, 4, 5]), 3, costs)) == [[1, 4, 5], [0, 2, 3]]
    assert ids_of(plan_packs(profiles([4, 0, 2]), 1, costs)) == [[0], [2], [4]]  # the heaviest first
    assert ids_of(plan_packs(profiles([4, 0, 2]), 8, costs)) == [[4, 0, 2]]  # as in the cohort


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 9), st.randoms())
def test_every_client_is_in_one_pack_and_packs_cost_about_the_same(costs, size, random):
    cohort = list(range(len(costs)))
    random.shuffle(cohort)
    packs = ids_of(plan_packs(profiles(cohort), size, np.array(costs, dtype=float)))
    assert sorted(client for pack in packs for client in pack) == sorted(cohort)
    assert len(packs) == -(-len(costs) // size)
    assert all(1 <= len(pack) <= size for pack in packs)
    loads = [sum(costs[c] for c in pack) for pack in packs]
    assert loads == sorted(loads, reverse=True)
    position = {client: i for i, client in enumerate(cohort)}
    assert all([position[c] for c in pack] == sorted(position[c] for c in pack) for pack in packs)
    for pack, load in zip(packs, loads):  # moving a pack's lightest client to one with room would not help
        roomy = [other for p, other in zip(packs, loads) if len(p) < size and p is not pack]
        assert all(load - min(costs[c] for c in pack) <= other for other in roomy)


def test_costs_are_the_tokens_of_a_round(tiny):
    federation = prepare(tiny()).federation
    lengths = federation.train.lengths
    whole = [sum(int(lengths[row]) for row in federation.rows_of(c)) for c in range(federation.clients)]
    assert client_costs(federation, Client(epochs=3)).tolist() == [3 * tokens for tokens in whole]
    for c, cost in enumerate(client_costs(federation, Client(steps=5, batch_size=4))):
        rows = len(federation.rows_of(c))
        assert cost == pytest.approx(5 * min(4, rows) * whole[c] / rows if rows else 0)
