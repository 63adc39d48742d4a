"""FLASC-Search's decisions, on landscapes small enough to follow by hand, through the interface of Tune's searchers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from small_runs import LOWRANK

from rayfed.config import Experiment, validate
from rayfed.config.search import FlascSearchSettings
from rayfed.errors import UserError
from rayfed.sweeps.flasc_search import FlascSearch, Probe, neighbours
from rayfed.sweeps.on_tune import RUN_DIR, START_FROM

SETTINGS: dict[str, Any] = {"rank": 1, "density": 0.25, "factor": 2, "max_rank": 4, "rounds": 3, "final": False}
Place = tuple[int, float]
Landscape = Mapping[Place, float | None]


def experiment(**sections: Any) -> Experiment:
    return validate({**LOWRANK, "method": {"name": "flasc"}, "server": {"rounds": 5, "cohort": 2}, **sections})


def search(mode: Any = "max", **more: Any) -> FlascSearch:
    return FlascSearch(experiment(), "eval/gap", mode, **{**SETTINGS, **more})


def place(config: Mapping[str, Any]) -> Place:
    return config["lora.rank"], config["wire.up.density"]


def drive(search: FlascSearch, landscape: Landscape, draw: random.Random | None = None) -> list[dict[str, Any]]:
    """Runs the search to its end; the metric of a trial is that of its place. With ``draw``, trials end in any order.

    Returns the configs in the order of their suggestions.
    """
    suggested: list[dict[str, Any]] = []
    running: dict[str, dict[str, Any]] = {}
    while True:
        while isinstance(config := search.suggest(f"id{len(suggested)}"), dict):
            running[f"id{len(suggested)}"] = config
            suggested.append(config)
        if not running:
            assert config == FlascSearch.FINISHED
            return suggested
        assert config is None
        trial = draw.choice(list(running)) if draw else next(iter(running))
        config = running.pop(trial)
        metric = landscape[place(config)]
        search.on_trial_complete(trial, {"eval/gap": metric, RUN_DIR: f"/runs/{config['name']}"}, error=metric is None)


def ended(landscape: Landscape, mode: Any = "max", **more: Any) -> Any:
    """The progress of a search at its end."""
    own = search(mode, **more)
    drive(own, landscape)
    return own.progress()


# Accuracy by (rank, density). From (1, 1/4): rank 2 wins (30 against 25), then density (45 against 35), then rank again
# (50 against 48), and from (4, 1/2) only density 1 is left, which gains.
LANDSCAPE = {
    (1, 0.25): 0.20, (2, 0.25): 0.30, (1, 0.5): 0.25, (4, 0.25): 0.35, (2, 0.5): 0.45, (4, 0.5): 0.50, (2, 1.0): 0.48,
    (4, 1.0): 0.60,
}  # fmt: skip
TRIALS = [
    "start", "start-rank", "start-density", "start-rank-rank", "start-rank-density", "start-rank-density-rank",
    "start-rank-density-density", "start-rank-density-rank-density",
]  # fmt: skip


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("at", [(1, 0.01, 0.01), (3, 0.05, 0.02), (8, 0.001, 0.2)])
def test_neighbours_cost_the_same(at: tuple[int, float, float], factor: int) -> None:
    here = Probe(("start",), *at, 3)
    settings = FlascSearchSettings(kind="flasc", factor=factor, max_rank=99, rounds=3, directions="separate")
    found = neighbours(here, settings)
    assert [other.path[-1] for other in found] == ["rank", "density", "down", "up"]
    for other in found:
        assert other.rank * (other.down + other.up) == pytest.approx(factor * here.rank * (here.down + here.up))
        assert other.rounds == 6
    assert [(other.rank, other.down > here.down, other.up > here.up) for other in found] == [
        (factor * here.rank, False, False),
        (here.rank, True, True),
        (here.rank, True, False),
        (here.rank, False, True),
    ]


def test_neighbours_end_at_the_limits() -> None:
    def moves(rank: int, down: float, up: float, **more: Any) -> list[Probe]:
        settings = FlascSearchSettings(kind="flasc", **{"factor": 2, "max_rank": 4, "rounds": 3, **more})
        return neighbours(Probe(("start",), rank, down, up, 3), settings)

    def names(*at: Any, **more: Any) -> list[str]:
        return [other.path[-1] for other in moves(*at, **more)]

    assert names(2, 0.5, 0.5) == ["rank", "density"]
    assert names(4, 0.5, 0.5) == ["density"]
    assert names(2, 1.0, 1.0) == ["rank"]
    assert names(2, 0.25, 0.25, max_density=0.3) == ["rank"]
    assert names(4, 0.5, 0.25, directions="separate") == ["density", "up"]  # down alone: 1.25
    (full,) = moves(4, 0.05, 0.05, factor=20)  # 0.05 * 20 is 1, though not quite so in floats
    assert (full.down, full.up) == (1.0, 1.0)


def test_the_better_neighbour_is_chosen_until_there_is_none() -> None:
    own = search()
    configs = drive(own, LANDSCAPE)
    assert [config["name"] for config in configs] == TRIALS
    at = own.progress()
    assert at.chosen.path == ("start", "rank", "density", "rank", "density")
    assert (at.chosen.rank, at.chosen.down, at.chosen.up, at.chosen.rounds) == (4, 1.0, 1.0, 15)
    assert at.ended == "no neighbour up to rank 4 and density 1"
    assert at.rounds == 3 * (1 + 2 + 2 + 2 + 1)
    assert [probe.path[-1] for probe in at.path] == ["start", "rank", "density", "rank", "density"]
    assert [(probe.name, probe.rank, probe.up, probe.rounds) for probe in at.probes[3:5]] == [
        ("start-rank-rank", 4, 0.25, 9),
        ("start-rank-density", 2, 0.5, 9),
    ]


def test_a_probe_continues_the_run_of_the_probe_before_at_constant_rates() -> None:
    configs = drive(search(final=True), LANDSCAPE)
    assert [config.get(START_FROM) for config in configs[:4]] == [
        None,
        "/runs/start",
        "/runs/start",
        "/runs/start-rank",
    ]
    assert configs[3]["server.rounds"] == 9
    assert configs[3]["client.schedule.kind"] == configs[3]["server.schedule.kind"] == "constant"
    # The final run starts anew, and has the experiment's own rounds and schedules.
    assert configs[-1] == {
        "name": "final-start-rank-density-rank-density", "lora.rank": 4, "wire.down.density": 1.0,
        "wire.up.density": 1.0,
    }  # fmt: skip


def test_mode_min() -> None:
    losses = {place: 1 - accuracy for place, accuracy in LANDSCAPE.items()}
    assert ended(losses, "min").chosen == ended(LANDSCAPE).chosen
    assert ended(losses).chosen.path == ("start",)


@pytest.mark.parametrize(
    ("budget", "final", "moves", "rounds"),
    [
        (24, False, 5, 24),
        (23, False, 4, 21),
        (21, False, 4, 21),
        (26, True, 4, 26),
        (25, True, 3, 20),
        (9, False, 2, 9),
    ],
)
def test_no_step_starts_that_the_budget_does_not_cover(budget: int, final: bool, moves: int, rounds: int) -> None:
    at = ended(LANDSCAPE, budget=budget, final=final)  # a final run takes five rounds
    assert (len(at.chosen.path), at.rounds) == (moves, rounds)
    assert ("budget" in str(at.ended)) == (budget != 24)


def test_it_ends_where_nothing_gains() -> None:
    flat = LANDSCAPE | {(4, 0.5): 0.45, (2, 1.0): 0.44}
    at = ended(flat)  # equal is no gain
    assert (at.chosen.path, at.ended) == (("start", "rank", "density"), "no neighbour gains more than 0")
    at = ended(LANDSCAPE, gain=0.12)  # 0.10 in the first step
    assert (at.chosen.path, at.ended) == (("start",), "no neighbour gains more than 0.12")


def test_with_stay_further_rounds_are_no_gain() -> None:
    def run(**more: Any) -> FlascSearch:  # rounds help, and the first rank; nothing else does
        own = search(**more)
        number = 0
        while isinstance(config := own.suggest(str(number)), dict):
            metric = config["server.rounds"] / 100 + 0.1 * (config["lora.rank"] > 1)
            own.on_trial_complete(str(number), {"eval/gap": metric})
            number += 1
        return own

    assert run().progress().chosen.path == ("start", "rank", "rank", "density", "density")
    at = run(stay=True).progress()
    assert (at.chosen.path, at.rounds) == (("start", "rank"), 3 * (1 + 3 + 3))
    assert [probe.path[-1] for probe in at.probes[1:4]] == ["rank", "density", "stay"]


@pytest.mark.parametrize("failed", [None, float("nan")])
def test_a_failed_probe_is_never_chosen(failed: float | None) -> None:
    at = ended(LANDSCAPE | {(2, 0.25): failed, (1, 1.0): 0.1})
    assert at.chosen.path[:2] == ("start", "density")
    at = ended(LANDSCAPE | {(2, 0.25): failed, (1, 0.5): failed})
    assert (at.chosen.path, at.ended) == (("start",), "no neighbour gains more than 0")
    at = ended({(1, 0.25): failed}, final=True)
    assert (at.ended, at.pending) == ("the first probe has no finite metric", ())


@pytest.mark.parametrize("seed", range(8))
def test_the_order_in_which_trials_end_decides_nothing(seed: int) -> None:
    first, other = search(stay=True, final=True), search(stay=True, final=True)
    drive(first, LANDSCAPE)
    drive(other, LANDSCAPE, random.Random(seed))
    assert other.progress() == first.progress()


def test_a_search_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    """Saved while two trials run, of which one ends after the restore: nothing is suggested twice."""
    own = search()
    for trial in ("a", "b", "c"):
        config = own.suggest(trial)
        if trial != "c":
            own.on_trial_complete(trial, {"eval/gap": LANDSCAPE[place(config)], RUN_DIR: f"/runs/{config['name']}"})
    own.save(str(tmp_path / "state"))
    again = search()
    again.restore(str(tmp_path / "state"))
    assert again.suggest("d") is None
    again.on_trial_complete("c", {"eval/gap": LANDSCAPE[1, 0.5]})
    again.on_trial_complete("c", {"eval/gap": LANDSCAPE[1, 0.5]})  # Tune may run a trial that has failed again
    assert [config["name"] for config in drive(again, LANDSCAPE)] == TRIALS[3:]
    assert again.progress() == ended(LANDSCAPE)


def test_what_ended_earlier_is_not_suggested_again() -> None:
    own = search()
    for name, metric in (("start", 0.2), ("start-density", 0.25)):
        own.add_evaluated_point({"name": name, RUN_DIR: f"/earlier/{name}"}, metric)
    configs = drive(own, LANDSCAPE)
    assert [config["name"] for config in configs] == ["start-rank", *TRIALS[3:]]
    assert configs[0][START_FROM] == "/earlier/start"
    assert own.progress() == ended(LANDSCAPE)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"rank": 8}, "sweep.search.rank: got 8, but no rank may exceed sweep.search.max_rank=4"),
        ({"rounds": 0}, "rounds: got 0, but it should be an integer in [1, 999999]"),
        ({"rang": 2}, "rang: unknown key; did you mean rank? "),
        ({"mode": "more"}, "mode: got 'more', but it should be max or min"),
        (
            {"budget": 13, "final": True},
            "sweep.search.budget: got 13, but the first step alone needs 14 rounds: 3 probes of 3 and 5 for the final "
            "run (server.rounds)",
        ),
        ({"max_rank": 100_000, "density": 1e-6}, "name: got 'final-start-density"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(more: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        search(**more)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_an_experiment_that_cannot_continue_at_another_rank_is_refused() -> None:
    with pytest.raises(UserError, match=r"^method.name: got 'fedhl', but sweep.search continues runs at another rank"):
        FlascSearch(experiment(method={"name": "fedhl"}), "eval/gap", "min", **SETTINGS)


def test_the_search_that_comes_with_rayfed_fits_its_budget() -> None:
    """Every path through it: at most the nine probes of two rounds and the final nine that its file speaks of."""
    from rayfed.config.sweep import load_sweep

    settings, sweep = load_sweep(Path(__file__).parents[2] / "configs" / "sweeps" / "flasc_search.yaml")
    assert sweep.search is not None
    chosen = {key: value for key, value in sweep.search.model_dump().items() if key != "kind"}
    for prefer in (0, 1):
        own = FlascSearch(validate(settings), "m", "max", **chosen)
        number = 0
        while isinstance(config := own.suggest(str(number)), dict):
            moves = config["name"].split("-")
            own.on_trial_complete(str(number), {"m": len(moves) + 0.5 * (moves[-1] == ("rank", "density")[prefer])})
            number += 1
        at = own.progress()
        assert (at.chosen.rank, at.chosen.down, at.chosen.up) == (64, 0.25, 0.25)
        assert at.rounds <= 27
