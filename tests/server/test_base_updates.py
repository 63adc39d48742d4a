"""News: everybody pays for what they missed, and never more than for the whole change at once."""

from __future__ import annotations

import json

import torch

from rayfed import wire
from rayfed.server.base_updates import CatchUp


def length(sizes) -> int:
    return sizes.bytes_header + sizes.bytes_indices + sizes.bytes_values


def test_a_client_pays_for_every_round_it_missed_and_once():
    catchup = CatchUp()
    news = [torch.ones(10), torch.ones(20), torch.ones(30)]
    catchup.publish(news[0], whole=1000)
    assert [length(s) for s in catchup.collect(5)] == [len(wire.encode(news[0]))]
    catchup.publish(news[1], whole=1000)
    catchup.publish(news[2], whole=1000)
    assert [length(s) for s in catchup.collect(5)] == [len(wire.encode(v)) for v in news[1:]]
    assert catchup.collect(5) == []
    assert len(catchup.collect(6)) == 3  # a newcomer needs them all


def test_the_whole_change_is_sent_where_that_is_less():
    catchup = CatchUp()
    for _ in range(5):
        catchup.publish(torch.ones(400), whole=1000)
    assert [length(s) for s in catchup.collect(1)] == [len(wire.encode(torch.ones(1000)))]


def test_zeros_do_not_travel_where_that_is_less():
    news = torch.zeros(1000)
    news[3] = 1.0
    catchup = CatchUp()
    catchup.publish(news, whole=10_000)
    (sizes,) = catchup.collect(0)
    assert sizes.count == 1
    assert length(sizes) < 100


def test_methods_without_news_cost_nothing():
    catchup = CatchUp()
    catchup.publish(None, whole=1000)
    assert catchup.collect(0) == []


def test_it_survives_a_checkpoint():
    catchup = CatchUp()
    catchup.publish(torch.ones(10), whole=1000)
    catchup.collect(3)
    catchup.publish(torch.ones(20), whole=1000)
    again = CatchUp.from_json(json.loads(json.dumps(catchup.to_json())))
    assert again.collect(3) == catchup.collect(3)
    assert again.collect(4) == catchup.collect(4)
    assert CatchUp.from_json({}).collect(0) == []
