"""Which members copy which, worked out by hand, and how settings change."""

from __future__ import annotations

from collections import Counter

import pytest

from rayfed.config.search import PbtSettings
from rayfed.sweeps.pbt import Member, explore, first_generation, next_generation
from rayfed.sweeps.space import draw

SPACES = {"client.lr": {"loguniform": [1e-3, 1e-1]}, "client.steps": {"choice": [1, 2, 4, 8]}}


def rule(**more) -> PbtSettings:
    return PbtSettings(**({"kind": "pbt", "population": 8, "rounds": 2} | more))


def test_the_first_generation_has_the_draws_of_a_random_sweep() -> None:
    members = first_generation(rule(), SPACES, 3)
    assert [member.name for member in members] == [f"g01-m0{n}" for n in range(1, 9)]
    for i, member in enumerate(members):
        assert member.settings == {key: draw(space, key, 3, i) for key, space in SPACES.items()}
        assert member.lineage == [member]


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_the_worst_quarter_copies_the_best(mode: str, sign: int) -> None:
    members = first_generation(rule(), SPACES, 0)
    values = [sign * value for value in (0.5, 0.9, 0.1, 0.6, 0.4, 0.8, 0.3, 0.7)]
    parents: Counter[int] = Counter()
    for seed in range(20):
        after = next_generation(members, values, rule(), SPACES, mode, seed)
        assert [member.name for member in after] == [f"g02-m0{n}" for n in range(1, 9)]
        for member, before in zip(after, members, strict=True):
            if member.number in (3, 7):  # 0.1 and 0.3
                assert member.parent is not None
                parents[member.parent.number] += 1
                expected = explore(member.parent.settings, rule(), SPACES, seed, 2, member.number)
                assert member.settings == expected
                assert member.lineage == [member.parent, member]
            else:
                assert member.parent is before
                assert member.settings == before.settings
        assert next_generation(members, values, rule(), SPACES, mode, seed) == after
    assert set(parents) == {2, 6}  # 0.9 and 0.8, either of them
    assert min(parents.values()) > 8  # of 40 draws


def sources(values: list[float | None], **more) -> list[int]:
    """For each member, the number of the member that it continues."""
    members = first_generation(rule(population=len(values), **more), SPACES, 0)
    after = next_generation(members, values, rule(population=len(values), **more), SPACES, "max", 0)
    return [member.parent.number for member in after if member.parent is not None]


def test_how_many_copy() -> None:
    assert sources([0.1, 0.2, 0.3, 0.4], quantile=0.0) == [1, 2, 3, 4]
    assert sources([0.1, 0.2, 0.3, 0.4], quantile=0.01) == [4, 2, 3, 4]  # rounded up
    assert sources([0.1, 0.2, 0.3], quantile=0.5) == [3, 2, 3]  # never more than half
    assert sources([0.5, 0.5, 0.5, 0.5], quantile=0.25) == [1, 2, 3, 1]  # of equals the first is better


def test_a_member_without_a_metric_always_copies() -> None:
    assert sources([None, 0.2, 0.3, 0.4], quantile=0.0) == [4, 2, 3, 4]
    assert sources([None, 0.2, 0.3, 0.4], quantile=0.25) == [4, 2, 3, 4]
    assert sources([None, None, None, 0.4], quantile=0.25) == [4, 4, 4, 4]
    with pytest.raises(ValueError, match="no member has a metric"):
        sources([None, None])


def many(settings: dict, **more) -> list[dict]:
    return [explore(settings, rule(**more), SPACES, 0, generation, 1) for generation in range(2, 202)]


def test_numbers_are_multiplied_and_choices_move() -> None:
    found = many({"client.lr": 0.01, "client.steps": 2}, resample=0.0)
    assert Counter(own["client.lr"] for own in found).keys() == {0.008, 0.012}
    assert Counter(own["client.steps"] for own in found).keys() == {1, 4}
    assert 60 < sum(own["client.lr"] == 0.008 for own in found) < 140
    found = many({"client.lr": 0.01, "client.steps": 2}, resample=0.0, factors=(0.5, 3))
    assert {own["client.lr"] for own in found} == {0.005, 0.03}


def test_numbers_stay_within_their_range() -> None:
    found = many({"client.lr": 0.09, "client.steps": 8}, resample=0.0)
    assert {own["client.lr"] for own in found} == {0.072, 0.1}
    assert {own["client.steps"] for own in found} == {4}  # the only neighbour


def test_some_settings_are_new_draws() -> None:
    found = many({"client.lr": 0.01, "client.steps": 2})
    anew = [own["client.lr"] for own in found if own["client.lr"] not in (0.008, 0.012)]
    assert 30 < len(anew) < 75  # a quarter of 200
    assert len(set(anew)) == len(anew)
    assert all(1e-3 <= rate <= 1e-1 for rate in anew)
    assert min(anew) < 3e-3  # over the whole range
    assert max(anew) > 3e-2
    assert {own["client.steps"] for own in many({"client.lr": 0.01, "client.steps": 2}, resample=1.0)} == {1, 2, 4, 8}


def test_a_lineage_goes_back_to_the_first_generation() -> None:
    first = Member(1, 4, {})
    second = Member(2, 1, {}, first)
    third = Member(3, 1, {}, second)
    assert [member.name for member in third.lineage] == ["g01-m04", "g02-m01", "g03-m01"]
