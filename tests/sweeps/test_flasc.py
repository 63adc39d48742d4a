"""FLASC-Search's decisions, on landscapes small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from rayfed.config.search import FlascSearchSettings
from rayfed.sweeps.flasc import Probe, neighbours, replay


def search(**more) -> FlascSearchSettings:
    return FlascSearchSettings(
        **({"kind": "flasc", "rank": 1, "density": 0.25, "factor": 2, "max_rank": 4, "rounds": 3} | more)
    )


def probe(rank: int, down: float, up: float) -> Probe:
    return Probe(("start",), rank, down, up, 3)


def on(landscape: Mapping[tuple[int, float], float | None]) -> Callable[[Probe], float | None]:
    """The metric of a probe is that of its (rank, density): KeyError if it has none yet."""
    return lambda probe: landscape[probe.rank, probe.down]


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("at", [(1, 0.01, 0.01), (3, 0.05, 0.02), (8, 0.001, 0.2)])
def test_neighbours_cost_the_same(at: tuple, factor: int) -> None:
    here = probe(*at)
    found = neighbours(here, search(factor=factor, max_rank=99, directions="separate"))
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
    def moves(at: Probe, **more) -> list[str]:
        return [other.path[-1] for other in neighbours(at, search(**more))]

    assert moves(probe(2, 0.5, 0.5)) == ["rank", "density"]
    assert moves(probe(4, 0.5, 0.5)) == ["density"]
    assert moves(probe(2, 1.0, 1.0)) == ["rank"]
    assert moves(probe(2, 0.25, 0.25), max_density=0.3) == ["rank"]
    assert moves(probe(4, 0.5, 0.25), directions="separate") == ["density", "up"]  # down alone: 1.25
    # 0.05 * 20 is 1, though not quite so in floats
    (full,) = neighbours(probe(4, 0.05, 0.05), search(factor=20))
    assert (full.down, full.up) == (1.0, 1.0)


# Accuracy by (rank, density). From (1, 1/4): rank 2 wins (30 against 25), then density (45 against 35), then rank again
# (50 against 48), and from (4, 1/2) only density 1 is left, which gains.
LANDSCAPE = {
    (1, 0.25): 0.20, (2, 0.25): 0.30, (1, 0.5): 0.25, (4, 0.25): 0.35, (2, 0.5): 0.45, (4, 0.5): 0.50, (2, 1.0): 0.48,
    (4, 1.0): 0.60,
}  # fmt: skip


def test_the_better_neighbour_is_chosen_until_there_is_none() -> None:
    at = replay(search(), "max", on(LANDSCAPE))
    assert at.chosen.path == ("start", "rank", "density", "rank", "density")
    assert (at.chosen.rank, at.chosen.down, at.chosen.up, at.chosen.rounds) == (4, 1.0, 1.0, 15)
    assert at.ended == "no neighbour up to rank 4 and density 1"
    assert at.rounds == 3 * (1 + 2 + 2 + 2 + 1)
    assert [probe.name for probe in at.probes] == [
        "start", "start-rank", "start-density", "start-rank-rank", "start-rank-density", "start-rank-density-rank",
        "start-rank-density-density", "start-rank-density-rank-density",
    ]  # fmt: skip
    assert [probe.parent for probe in at.probes[:4]] == [None, "start", "start", "start-rank"]
    assert at.steps[1].line(2, on(LANDSCAPE)) == {
        "step": 2,
        "from": "start-rank",
        "baseline": 0.30,
        "probes": [
            {
                "trial": f"start-rank-{move}", "lora.rank": rank, "wire.down.density": density,
                "wire.up.density": density, "rounds": 9, "metric": metric,
            }
            for move, rank, density, metric in (("rank", 4, 0.25, 0.35), ("density", 2, 0.5, 0.45))
        ],
        "chosen": "start-rank-density",
    }  # fmt: skip


def test_mode_min() -> None:
    losses = {place: 1 - accuracy for place, accuracy in LANDSCAPE.items()}
    assert replay(search(), "min", on(losses)).chosen == replay(search(), "max", on(LANDSCAPE)).chosen
    assert replay(search(), "max", on(losses)).chosen.path == ("start",)


@pytest.mark.parametrize(
    ("budget", "reserve", "moves", "rounds"),
    [(24, 0, 5, 24), (23, 0, 4, 21), (21, 0, 4, 21), (21, 1, 3, 15), (9, 0, 2, 9)],
)
def test_no_step_starts_that_the_budget_does_not_cover(budget: int, reserve: int, moves: int, rounds: int) -> None:
    at = replay(search(budget=budget), "max", on(LANDSCAPE), reserve)
    assert (len(at.chosen.path), at.rounds) == (moves, rounds)
    assert ("budget" in str(at.ended)) == (budget < 24)


def test_it_ends_where_nothing_gains() -> None:
    flat = LANDSCAPE | {(4, 0.5): 0.45, (2, 1.0): 0.44}
    at = replay(search(), "max", on(flat))  # equal is no gain
    assert (at.chosen.path, at.ended) == (("start", "rank", "density"), "no neighbour gains more than 0")
    assert at.steps[-1].chosen is None
    at = replay(search(gain=0.12), "max", on(LANDSCAPE))  # 0.10 in the first step
    assert (at.chosen.path, at.ended) == (("start",), "no neighbour gains more than 0.12")


def test_with_stay_further_rounds_are_no_gain() -> None:
    def metric(probe: Probe) -> float:  # rounds help, and the first rank; nothing else does
        return probe.rounds / 100 + 0.1 * (probe.rank > 1)

    assert replay(search(), "max", metric).chosen.path == ("start", "rank", "rank", "density", "density")
    at = replay(search(stay=True), "max", metric)
    assert (at.chosen.path, at.rounds) == (("start", "rank"), 3 * (1 + 3 + 3))
    assert [probe.path[-1] for probe in at.steps[0].probes] == ["rank", "density", "stay"]
    assert at.steps[0].baseline == pytest.approx(0.06)


def test_a_failed_probe_is_never_chosen() -> None:
    at = replay(search(), "max", on(LANDSCAPE | {(2, 0.25): None}))
    assert at.chosen.path[:2] == ("start", "density")
    at = replay(search(), "max", on(LANDSCAPE | {(2, 0.25): None, (1, 0.5): None}))
    assert (at.chosen.path, at.ended) == (("start",), "no neighbour gains more than 0")
    at = replay(search(), "max", on({(1, 0.25): None}))
    assert (at.ended, at.pending) == ("the first probe has no finite metric", ())


def test_a_replay_comes_to_the_same_decisions() -> None:
    whole = replay(search(), "max", on(LANDSCAPE))
    known: dict[tuple[int, float], float] = {}
    seen = []
    while (at := replay(search(), "max", on(known))).ended is None:
        assert at.steps == whole.steps[: len(at.steps)]
        seen += [probe.name for probe in at.pending]
        for probe in at.pending[:1] if len(known) % 2 else at.pending[-1:]:  # one of them, then the other
            known[probe.rank, probe.down] = LANDSCAPE[probe.rank, probe.down]
        for probe in at.pending:
            known.setdefault((probe.rank, probe.down), LANDSCAPE[probe.rank, probe.down])
    assert at == whole
    assert seen == [probe.name for probe in whole.probes]
