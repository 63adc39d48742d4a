"""News: everybody pays for what they missed, and never more than for the whole change at once."""

from __future__ import annotations

import json

import torch

from rayfed import wire
from rayfed.server.base_updates import BaseUpdates


def length(sizes) -> int:
    return sizes.bytes_header + sizes.bytes_indices + sizes.bytes_values


def test_a_client_pays_for_every_round_it_missed_and_once():
    base_updates = BaseUpdates()
    news = [torch.ones(10), torch.ones(20), torch.ones(30)]
    base_updates.publish(news[0], whole=1000)
    assert [length(s) for s in base_updates.collect(5)] == [len(wire.encode(news[0]))]
    base_updates.publish(news[1], whole=1000)
    base_updates.publish(news[2], whole=1000)
    assert [length(s) for s in base_updates.collect(5)] == [len(wire.encode(v)) for v in news[1:]]
    assert base_updates.collect(5) == []
    assert len(base_updates.collect(6)) == 3  # a newcomer needs them all


def test_the_whole_change_is_sent_where_that_is_less():
    base_updates = BaseUpdates()
    for _ in range(5):
        base_updates.publish(torch.ones(400), whole=1000)
    assert [length(s) for s in base_updates.collect(1)] == [len(wire.encode(torch.ones(1000)))]


def test_zeros_do_not_travel_where_that_is_less():
    news = torch.zeros(1000)
    news[3] = 1.0
    base_updates = BaseUpdates()
    base_updates.publish(news, whole=10_000)
    (sizes,) = base_updates.collect(0)
    assert sizes.count == 1
    assert length(sizes) < 100


def test_methods_without_news_cost_nothing():
    base_updates = BaseUpdates()
    base_updates.publish(None, whole=1000)
    assert base_updates.collect(0) == []


def test_it_survives_a_checkpoint():
    base_updates = BaseUpdates()
    base_updates.publish(torch.ones(10), whole=1000)
    base_updates.collect(3)
    base_updates.publish(torch.ones(20), whole=1000)
    again = BaseUpdates.from_json(json.loads(json.dumps(base_updates.to_json())))
    assert again.collect(3) == base_updates.collect(3)
    assert again.collect(4) == base_updates.collect(4)
