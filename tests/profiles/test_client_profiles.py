"""Profiles: every kind gives the shares it promises, a client is the same always, and a user's function is checked."""

from __future__ import annotations

import math
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from rayfed import seeding
from rayfed.config import Experiment, dump_config, load_config, validate
from rayfed.errors import UserError
from rayfed.profiles import client_profiles, rules
from rayfed.profiles.client_profiles import ClientProfiles, describe

CLIENTS = 10_000
SIZES = np.full(CLIENTS, 5)
KINDS: dict[str, dict[str, Any]] = {
    "same": {},
    "list": {"ranks": [1 + i * 7 % 16 for i in range(CLIENTS)]},
    "tiers": {"ranks": [2, 4, 16]},
    "weighted tiers": {"ranks": [2, 4, 16], "weights": [5, 3, 2], "densities_up": [0.1, 0.5, 1]},
    "uniform": {"low": 3, "high": 12},
    "heavy_tailed": {"ranks": [1, 2, 4, 8, 16], "exponent": 1.5},
    "normal": {"low": 2, "high": 14, "mean": 8, "std": 2},
}


def settings_of(kind: str, seed: int = 0, rank: int = 16, **settings: Any) -> Experiment:
    own = {"kind": kind.split()[-1], **settings}
    return validate(
        {"seed": seed, "lora": {"rank": rank, "alpha": 8}, "partition": {"clients": CLIENTS}, "profiles": own}
    )


def profiles_of(experiment: Experiment) -> ClientProfiles:
    return ClientProfiles(experiment.profiles, experiment.lora, experiment.wire, experiment.seed)


def make(kind: str, **settings: Any) -> ClientProfiles:
    return profiles_of(settings_of(kind, **settings))


def follows(law: dict[int, float], kind: str, **settings: Any) -> bool:
    """Have the ranks these shares, over four seeds, within four standard deviations each, and are there no others?"""
    found: Counter[int] = Counter()
    for seed in range(4):
        found.update(make(kind, seed=seed, **settings).rank_mix(SIZES))
    total = 4 * CLIENTS
    assert found.keys() <= law.keys()
    assert math.isclose(sum(law.values()), 1)
    return all(abs(found[rank] / total - p) <= 4 * math.sqrt(p * (1 - p) / total) for rank, p in law.items())


@pytest.fixture
def users() -> Iterator[Callable[..., ClientProfiles]]:
    """users(function) -> settings that use it, as `users_module:ranks`."""
    home = types.ModuleType("users_module")
    sys.modules["users_module"] = home

    def use(function: Any, **settings: Any) -> ClientProfiles:
        home.ranks = function  # type: ignore[attr-defined]
        return make("function", function="users_module:ranks", **settings)

    yield use
    del sys.modules["users_module"]


# What every kind promises


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_is_the_same_in_every_round_and_order(kind: str) -> None:
    profiles, again = make(kind, **KINDS[kind]), make(kind, **KINDS[kind])
    first = [profiles.profile(c, 5, 0) for c in range(300)]
    assert [again.profile(c, 5, 99) for c in reversed(range(300))] == first[::-1]
    assert all(1 <= p.rank <= 16 and p.scale == 8 / p.rank and p.examples == 5 for p in first)
    assert [p.client for p in first] == list(range(300))
    assert profiles.profile(np.int64(7), 5, 0) == first[7]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["weighted tiers", "uniform", "heavy_tailed", "normal"])
def test_another_seed_draws_other_ranks(kind: str) -> None:
    one, two = make(kind, **KINDS[kind]), make(kind, seed=1, **KINDS[kind])
    assert [one.profile(c, 5, 0).rank for c in range(99)] != [two.profile(c, 5, 0).rank for c in range(99)]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_read_back_equal_and_decide_the_digest(kind: str, tmp_path: Path) -> None:
    experiment = settings_of(kind, **KINDS[kind])
    (tmp_path / "config.yaml").write_text(dump_config(experiment))
    again = load_config(tmp_path / "config.yaml")
    assert again == experiment
    assert again.digest() == experiment.digest()
    assert (experiment.digest() == settings_of("same").digest()) == (kind == "same")


@pytest.mark.parametrize("kind", KINDS)
def test_the_mix_counts_the_profiles(kind: str) -> None:
    profiles = make(kind, **KINDS[kind])
    sizes = np.arange(CLIENTS) % 3  # a third hold nothing
    made = [profiles.profile(int(c), int(sizes[c]), 0) for c in np.flatnonzero(sizes)]
    assert profiles.rank_mix(sizes) == Counter(p.rank for p in made)
    assert profiles.tier_mix(sizes) == Counter((p.rank, p.density_down, p.density_up) for p in made)
    assert list(profiles.rank_mix(sizes)) == sorted({p.rank for p in made})


# Kind by kind


def test_by_default_every_client_has_the_servers_rank_and_the_wires_densities() -> None:
    profiles = profiles_of(
        validate({"wire": {"down": {"density": 0.5, "decay": 0.5, "every": 2}, "up": {"density": 0.25}}})
    )
    made = [profiles.profile(3, 10, t) for t in range(4)]
    assert {(p.rank, p.scale, p.density_up) for p in made} == {(16, 1.0, 0.25)}
    assert [p.density_down for p in made] == [0.5, 0.5, 0.25, 0.25]


def test_a_list_names_each_client() -> None:
    settings = {"partition": {"clients": 3}, "server": {"cohort": 3}, "wire": {"up": {"density": 0.1, "decay": 0.5}}}
    own = {"kind": "list", "ranks": [2, 16, 5], "densities_up": [0.5, 1, 0.25]}
    profiles = profiles_of(validate({**settings, "profiles": own}))
    made = [profiles.profile(c, 1, 1) for c in range(3)]
    assert [p.rank for p in made] == [2, 16, 5]
    assert [p.density_up for p in made] == [0.25, 0.5, 0.125]  # its own, and the wire's decay
    assert {p.density_down for p in made} == {1.0}


def test_a_list_is_as_long_as_the_data_have_clients() -> None:
    settings = {"partition": {"kind": "natural"}, "data": {"client": "owner"}}
    profiles = profiles_of(validate({**settings, "profiles": {"kind": "list", "densities_up": [0.5, 1, 1]}}))
    profiles.check(np.array([4, 0, 2]))
    with pytest.raises(UserError) as error:
        profiles.check(np.array([4, 0, 2, 2]))
    assert str(error.value) == "profiles.densities_up: got 3 values, but the population has 4 clients"


def test_flascs_rank_tiers() -> None:
    tiers = 4
    profiles = make("tiers", rank=4 ** (tiers - 1), ranks=[4**i for i in range(tiers)])
    made = [profiles.profile(c, 1, 0) for c in range(40)]
    assert [p.rank for p in made] == [4 ** (c % tiers) for c in range(40)]
    assert {(p.density_down, p.density_up) for p in made} == {(1.0, 1.0)}
    assert [p.scale for p in made[:4]] == [8, 2, 0.5, 0.125]


def test_flascs_density_tiers() -> None:
    tiers = 4
    densities = [4.0 ** -(tiers - 1 - i) for i in range(tiers)]
    profiles = make("tiers", rank=64, densities_down=densities, densities_up=densities)
    made = [profiles.profile(c, 1, 0) for c in range(40)]
    assert {p.rank for p in made} == {64}
    assert [(p.density_down, p.density_up) for p in made] == [(densities[c % tiers],) * 2 for c in range(40)]
    assert not profiles.mixed_ranks


def test_tiers_by_weights_keep_their_shares_and_their_densities() -> None:
    profiles = make("weighted tiers", **KINDS["weighted tiers"])
    assert follows({2: 0.5, 4: 0.3, 16: 0.2}, "tiers", **KINDS["weighted tiers"])
    assert set(profiles.tier_mix(SIZES)) == {(2, 1.0, 0.1), (4, 1.0, 0.5), (16, 1.0, 1.0)}
    scaled = make("tiers", **KINDS["weighted tiers"] | {"weights": [5e29, 3e29, 2e29]})
    assert scaled.rank_mix(SIZES) == profiles.rank_mix(SIZES)


def test_uniform_is_even_with_both_ends() -> None:
    assert follows(dict.fromkeys(range(3, 13), 0.1), "uniform", low=3, high=12)
    assert follows(dict.fromkeys(range(1, 17), 1 / 16), "uniform")  # 1 to lora.rank


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 2.5])
def test_heavy_tails_follow_the_power_law(exponent: float) -> None:
    ranks = [1, 2, 4, 8, 16]
    total = sum(rank**-exponent for rank in ranks)
    law = {rank: rank**-exponent / total for rank in ranks}
    assert follows(law, "heavy_tailed", ranks=ranks, exponent=exponent)


@pytest.mark.parametrize(("mean", "std"), [(8.0, 2.0), (4.0, 3.0), (None, None)])
def test_normal_is_rounded_and_cut(mean: float | None, std: float | None) -> None:
    below = NormalDist(mean or 8.0, std or 3.0).cdf
    law = {rank: below(rank + 0.5) - below(rank - 0.5) for rank in range(3, 14)}
    law |= {2: below(2.5), 14: 1 - below(13.5)}
    assert follows(law, "normal", low=2, high=14, mean=mean, std=std)


def test_a_normal_law_of_one_rank() -> None:
    assert make("normal", low=5, high=5).rank_mix(SIZES) == {5: CLIENTS}


def test_the_rarest_draws_stay_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, end in ((0, 0), (2**63 - 1, -1)):
        monkeypatch.setattr(seeding, "derive_seed", lambda *parts, key=key: key)
        assert 0 < rules._u(0, 0) < 1
        assert make("uniform", rank=1000, low=3).profile(0, 1, 0).rank == (3, 1000)[end]
        assert make("normal", rank=1000, low=3).profile(0, 1, 0).rank == (3, 1000)[end]
        assert make("tiers", ranks=[2, 4, 8], weights=[0.1, 0.2, 0.3]).profile(0, 1, 0).rank == (2, 8)[end]


def test_more_large_ranks_move_no_client_down() -> None:
    light, heavy = (make("heavy_tailed", ranks=[2, 4, 8, 16], exponent=e) for e in (2.0, 1.0))
    assert all(light.profile(c, 1, 0).rank <= heavy.profile(c, 1, 0).rank for c in range(500))


def test_rank_stabilised_scale_is_of_the_clients_own_rank() -> None:
    own = {"kind": "tiers", "ranks": [4, 16]}
    profiles = profiles_of(validate({"lora": {"rank": 16, "alpha": 8, "rslora": True}, "profiles": own}))
    assert [profiles.profile(c, 1, 0).scale for c in range(2)] == [4.0, 2.0]


# What can be said beforehand


@pytest.mark.parametrize(
    ("kind", "settings", "answer"),
    [
        ("same", {}, False),
        ("list", {"ranks": [16] * CLIENTS}, False),
        ("list", {"ranks": [16] * (CLIENTS - 1) + [15]}, True),
        ("tiers", {"ranks": [16, 16]}, False),
        ("tiers", {"ranks": [4, 4]}, True),  # all alike, but not as the server
        ("tiers", {"densities_up": [0.5, 1]}, False),
        ("heavy_tailed", {"ranks": [16, 1]}, True),
        ("uniform", {}, True),
        ("uniform", {"low": 16}, False),
        ("normal", {"low": 15}, True),
        ("function", {"function": "math:gcd"}, True),
    ],
)
def test_whether_ranks_may_differ(kind: str, settings: dict[str, Any], answer: bool) -> None:
    assert make(kind, **settings).mixed_ranks is answer


@pytest.mark.parametrize(
    ("profiles", "up", "answer"),
    [
        ({}, {}, False),
        ({}, {"density": 0.5}, True),
        ({}, {"decay": 0.5, "every": 10}, False),  # would begin in round 10, the 11th
        ({}, {"decay": 0.5, "every": 9}, True),
        ({"kind": "tiers", "densities_up": [1, 0.5]}, {}, True),
        ({"kind": "tiers", "densities_up": [1, 1]}, {"density": 0.5}, False),  # in place of the wire's
        ({"kind": "tiers", "densities_up": [1, 1]}, {"decay": 0.5}, True),
        ({"kind": "tiers", "densities_down": [1, 0.5]}, {}, False),
    ],
)
def test_whether_uploads_may_be_sparse(profiles: dict[str, Any], up: dict[str, Any], answer: bool) -> None:
    own = profiles_of(validate({"profiles": profiles, "wire": {"up": up}, "server": {"rounds": 10}}))
    assert own.may_be_sparse("up", 10) is answer


def test_a_population_of_a_million() -> None:
    sizes = np.ones(1_000_000, dtype=np.int64)
    settings = {"partition": {"clients": len(sizes)}}
    by_id = profiles_of(validate({**settings, "profiles": {"kind": "tiers", "ranks": [2, 4, 8, 16]}}))
    assert by_id.rank_mix(sizes) == dict.fromkeys([2, 4, 8, 16], 250_000)
    drawn = profiles_of(validate({**settings, "profiles": {"kind": "tiers", "ranks": [2, 4], "weights": [1, 3]}}))
    mix = drawn.rank_mix(sizes)
    assert sum(mix.values()) == 100_000
    assert mix[2] == pytest.approx(25_000, abs=4 * math.sqrt(100_000 * 3 / 16))


def test_a_sample_is_fair_to_every_tier(monkeypatch: pytest.MonkeyPatch, users: Callable[..., ClientProfiles]) -> None:
    monkeypatch.setattr(client_profiles, "MOST_EXAMINED", 1000)
    mix = users(lambda client, examples, seed: 1 + client % 5).rank_mix(SIZES)  # 5 divides the spacing of 10
    assert sum(mix.values()) == 1000
    assert all(count == pytest.approx(200, abs=50) for count in mix.values())
    assert len(mix) == 5


def test_a_mix_in_words() -> None:
    assert describe({16: 4}) == "rank 16: 100.0 %"
    assert describe({4: 3, 16: 1}) == "rank 4: 75.0 %, rank 16: 25.0 %"
    many = dict.fromkeys(range(1, 11), 10) | {7: 20, 3: 15}
    assert describe(many) == "10 ranks from 1 to 10, mean 5.5; most often rank 7: 17.4 %, rank 3: 13.0 %, rank 1: 8.7 %"


# A user's function


def test_a_users_function_gives_ranks(users: Callable[..., ClientProfiles]) -> None:
    profiles = users(lambda client, examples, seed: min(examples, 9) + seed, seed=3)
    profiles.check(SIZES)
    assert [profiles.profile(0, n, 0).rank for n in (1, 5, 99)] == [4, 8, 12]
    assert not profiles.may_be_sparse("up", 10)


def test_a_users_function_gives_densities_too(users: Callable[..., ClientProfiles]) -> None:
    profiles = users(lambda client, examples, seed: (np.int64(2 + client), 1, np.float32(0.5)))
    made = profiles.profile(1, 1, 0)
    assert (made.rank, made.scale, made.density_down, made.density_up) == (3, 8 / 3, 1.0, 0.5)
    assert [type(value) for value in (made.rank, made.density_down, made.density_up)] == [int, float, float]
    assert set(profiles.tier_mix(np.ones(2))) == {(2, 1.0, 0.5), (3, 1.0, 0.5)}


def test_a_users_function_is_found_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_clients.py").write_text("def ranks(client, examples, seed):\n    return 1 + client % 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    profiles = make("function", function="my_clients:ranks")
    assert [profiles.profile(c, 1, 0).rank for c in range(4)] == [1, 2, 3, 1]


@pytest.mark.parametrize(
    "answer",
    [0, -1, 17, 4.0, "4", None, True, np.bool_(True), (4,), (4, 0.5), (4, 0.5, 0.5, 1), (17, 1, 1), "x\n" * 500],
)
def test_what_is_no_rank_is_refused(answer: Any, users: Callable[..., ClientProfiles]) -> None:
    with pytest.raises(UserError) as error:
        users(lambda client, examples, seed: answer).profile(7, 1, 0)
    line = str(error.value)
    assert line.startswith("profiles.function: got 'users_module:ranks', but for client 7 it returned ")
    assert line.endswith("; it should be a rank from 1 to 16 (lora.rank), or (rank, density_down, density_up)")
    assert "\n" not in line
    assert len(line) < 320


@pytest.mark.parametrize("density", [0, -0.5, 1.5, math.nan, math.inf, "1", None, True])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_density_is_refused(density: Any, place: int, users: Callable[..., ClientProfiles]) -> None:
    answer = (4, density, 1.0) if place == 0 else (4, 1.0, density)
    with pytest.raises(UserError, match=r"^profiles\.function: got .* returned .*; densities should be in \(0, 1\]$"):
        users(lambda client, examples, seed: answer).profile(7, 1, 0)


def test_a_function_that_raises_is_refused_with_its_reason(users: Callable[..., ClientProfiles]) -> None:
    profiles = users(lambda client, examples, seed: {"": 1}[f"two\nlines {client}"])
    with pytest.raises(UserError) as error:
        profiles.check(np.array([0, 1]))
    assert str(error.value) == (
        "profiles.function: got 'users_module:ranks', but for client 1 it raised KeyError: 'two\\nlines 1'"
    )
    assert isinstance(error.value.__cause__, KeyError)


def test_a_function_that_changes_its_mind_is_refused(users: Callable[..., ClientProfiles]) -> None:
    draw = np.random.default_rng(0)
    profiles = users(lambda client, examples, seed: draw.integers(1, 17))
    with pytest.raises(UserError, match=r"^profiles\.function: got .*, but it gave client \d+ first \(.*\), then \("):
        profiles.check(SIZES)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such:f", "no_such cannot be imported (ModuleNotFoundError: No module named 'no_such'); is its folder on "
                      "PYTHONPATH?"),
        ("math:no_such", "math has no function or class no_such"),
        ("math:pi", "that is no function"),
    ],
)  # fmt: skip
def test_a_function_that_is_not_there(path: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        make("function", function=path)
    assert str(error.value) == f"profiles.function: got {path!r}, but {reason}"


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_follow_the_own_rank_or_the_servers(rslora):
    def scales(**settings: Any) -> list[float]:
        experiment = settings_of("tiers", ranks=[2, 4, 16], **settings)
        lora = experiment.lora.model_copy(update={"rslora": rslora})
        own = profiles_of(experiment.model_copy(update={"lora": lora}))
        return [own.profile(client, 5, 0).scale for client in range(3)]

    power = 0.5 if rslora else 1  # alpha is 8
    assert scales() == pytest.approx([8 / 2**power, 8 / 4**power, 8 / 16**power])
    assert scales(scale="server") == pytest.approx([8 / 16**power] * 3)
