"""Base updates: every client pays for the rounds that it missed, and at most for the whole change of the base."""

from __future__ import annotations

import json

import torch

from rayfed import wire
from rayfed.server.base_updates import BaseUpdates


def length(sizes) -> int:
    return sizes.bytes_header + sizes.bytes_indices + sizes.bytes_values


def test_a_client_pays_for_every_round_it_missed_and_once():
    base_updates = BaseUpdates()
    updates = [torch.ones(10), torch.ones(20), torch.ones(30)]
    base_updates.publish(updates[0], entries=1000)
    assert [length(s) for s in base_updates.collect(5)] == [len(wire.encode(updates[0]))]
    base_updates.publish(updates[1], entries=1000)
    base_updates.publish(updates[2], entries=1000)
    assert [length(s) for s in base_updates.collect(5)] == [len(wire.encode(v)) for v in updates[1:]]
    assert base_updates.collect(5) == []
    assert len(base_updates.collect(6)) == 3  # a client that never took part needs all of them


def test_the_whole_change_is_sent_where_that_is_shorter():
    base_updates = BaseUpdates()
    for _ in range(5):
        base_updates.publish(torch.ones(400), entries=1000)
    assert [length(s) for s in base_updates.collect(1)] == [len(wire.encode(torch.ones(1000)))]


def test_zeros_do_not_travel_where_that_is_shorter():
    updates = torch.zeros(1000)
    updates[3] = 1.0
    base_updates = BaseUpdates()
    base_updates.publish(updates, entries=10_000)
    (sizes,) = base_updates.collect(0)
    assert sizes.count == 1
    assert length(sizes) < 100


def test_a_method_without_base_updates_costs_nothing():
    base_updates = BaseUpdates()
    base_updates.publish(None, entries=1000)
    assert base_updates.collect(0) == []


def test_it_survives_a_checkpoint():
    base_updates = BaseUpdates()
    base_updates.publish(torch.ones(10), entries=1000)
    base_updates.collect(3)
    base_updates.publish(torch.ones(20), entries=1000)
    again = BaseUpdates.from_json(json.loads(json.dumps(base_updates.to_json())))
    assert again.collect(3) == base_updates.collect(3)
    assert again.collect(4) == base_updates.collect(4)
