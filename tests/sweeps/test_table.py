"""The table's numbers against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweep_files import folded_width, planned

from rayfed.config.sweep import Sweep, load_sweep
from rayfed.sweeps.plan import Trial, expand, make_trials
from rayfed.sweeps.table import make_table, summarize
from rayfed.tracking.format import format_mean

GRID = {
    "method.name": {"grid": ["fedit", "rbla"]},
    "client.lr": {"grid": [0.1, 0.2]},
    "seed": {"grid": [0, 1]},
}
# (metric, report) by trial, in the order of the grid; None: the trial failed
ENDS = [(0.50, 0.90), (0.60, 0.80), (0.70, 0.10), (0.60, 0.30), (0.4, 0.4), (0.2, 0.2), None, (0.99, 0.99)]


def make_rows(trials: list[Trial]) -> dict[str, dict[str, Any]]:
    rows = {}
    for trial, end in zip(trials, ENDS, strict=True):
        row = rows[trial.name] = {"trial": trial.name, "status": "done" if end else "failed"}
        if end:
            row |= {"metric": end[0], "report": end[1], "bytes": 2_000_000, "seconds": 3.0, "server_seconds": 0.2}
    return rows


@pytest.fixture
def trials(sweep_file) -> list[Trial]:
    return planned(sweep_file({"parameters": GRID}))[0]


def section(**more: Any) -> Sweep:
    return Sweep(**{"parameters": GRID, "metric": "eval/accuracy", "report": "test/accuracy", **more})


def test_means_and_deviations_over_the_seeds(trials) -> None:
    table = make_table(trials, make_rows(trials), section())
    assert table.columns == ("method", "lr", "eval/accuracy", "test/accuracy", "MB both ways", "seconds", "trials")
    assert table.rows == (
        # mean 55 and deviation sqrt(2 * 5^2 / 1) = 7.07; of the report 85 and 7.07
        ("fedit", "0.1", "55.00 ± 7.07 %", "85.00 ± 7.07 %", "2.00", "3.0", "2/2"),
        ("fedit", "0.2", "65.00 ± 7.07 %", "20.00 ± 14.14 %", "2.00", "3.0", "2/2"),
        ("rbla", "0.1", "30.00 ± 14.14 %", "30.00 ± 14.14 %", "2.00", "3.0", "2/2"),
        ("rbla", "0.2", "99.00 %", "99.00 %", "2.00", "3.0", "1/2"),
    )


def test_a_tuned_setting_is_selected_on_validation_alone(trials) -> None:
    table = make_table(trials, make_rows(trials), section(tune=["client.lr"]))
    assert [row[:2] for row in table.rows] == [
        ("fedit", "0.2"),  # the better validation, though the worse test
        ("rbla", "0.1"),  # 0.2 looks better, but one of its seeds failed
    ]
    assert table.rows[0][3] == "20.00 ± 14.14 %"
    table = make_table(trials, make_rows(trials), section(tune=["client.lr"], mode="min"))
    assert [row[:2] for row in table.rows] == [("fedit", "0.1"), ("rbla", "0.1")]


def test_later_seeds_take_no_part_in_the_selection(trials) -> None:
    ends = make_rows(trials)
    ends[trials[3].name]["metric"] = 0.1  # fedit at 0.2: the best of the first seed (0.7), but not of both
    for tune_seeds, rate, metric in ((None, "0.1", "55.00 ± 7.07 %"), (1, "0.2", "40.00 ± 42.43 %")):
        table = make_table(trials, ends, section(tune=["client.lr"], tune_seeds=tune_seeds))
        assert (table.rows[0][1], table.rows[0][2], table.rows[0][-1]) == (rate, metric, "2/2")


def test_a_row_without_a_finished_trial_is_shown(trials) -> None:
    ends = make_rows(trials) | {trial.name: {"status": "unfinished"} for trial in trials[6:]}
    assert make_table(trials, ends, section()).rows[3] == ("rbla", "0.2", "-", "-", "-", "-", "0/2")


ROUNDS = [
    {
        "round": 1,
        "eval/accuracy": 0.9,
        "test/accuracy": 0.1,
        "bytes/total": 10,
        "time/round_s": 1.0,
        "time/server_s": 0.5,
    },
    {"round": 2, "eval/accuracy": None, "test/accuracy": None, "bytes/total": 20, "time/round_s": 1.5},
    {"round": 3, "eval/accuracy": 0.7, "test/accuracy": 0.3, "bytes/total": 30, "time/round_s": 1.0},
    {"round": 4, "eval/accuracy": None, "test/accuracy": None, "bytes/total": 40, "time/round_s": 1.0},
]


@pytest.mark.parametrize(
    ("more", "expected"),
    [({}, (3, 0.7, 0.3)), ({"at": "best"}, (1, 0.9, 0.1)), ({"at": "best", "mode": "min"}, (3, 0.7, 0.3))],
)
def test_the_round_that_counts(more: dict, expected: tuple) -> None:
    got = summarize(ROUNDS, section(**more), "test/accuracy")
    assert (got["round"], got["metric"], got["report"]) == expected
    assert (got["bytes"], got["seconds"], got["server_seconds"]) == (40, 4.5, 0.5)


def test_an_earlier_round_does_not_speak_for_a_run_that_diverged() -> None:
    diverged = [*ROUNDS, {**ROUNDS[3], "round": 5, "nonfinite": "train/loss=nan eval/accuracy=nan"}]
    assert summarize(diverged, section(), "test/accuracy")["metric"] is None
    assert summarize(diverged, section(at="best"), "test/accuracy")["metric"] == 0.9


def test_trials_that_never_measure_the_metric_have_the_fallback() -> None:
    masked = {"metric": "eval/accuracy_masked", "fallback": "eval/accuracy", "report": None}
    dense = summarize(ROUNDS, section(**masked), "test/accuracy_masked")
    assert (dense["metric"], dense["report"]) == (0.7, 0.3)
    sparse = [{**own, "eval/accuracy_masked": 0.2, "test/accuracy_masked": 0.25} for own in ROUNDS]
    found = summarize(sparse, section(**masked), "test/accuracy_masked")
    assert (found["metric"], found["report"]) == (0.2, 0.25)
    diverged = [*ROUNDS, {**ROUNDS[3], "round": 5, "nonfinite": "train/loss=nan eval/accuracy_masked=nan"}]
    assert summarize(diverged, section(**masked), None)["metric"] is None
    with pytest.raises(ValueError, match=r"sweep.fallback: got 'eval/accuracy', but sweep.search and sweep.stop"):
        section(**masked, stop={"kind": "asha", "grace": 2})


def test_a_table_fits_a_terminal(sweep_file) -> None:
    """Two tuned settings of several methods, with validation and test accuracy over seeds, on 80 columns."""
    cases = {"hetlora": {"method.name": "hetlora"}, "fedhl": {"method.name": "fedhl", "method.gamma": {"grid": [1.0]}}}
    parameters = {"client.lr": {"grid": [0.0025]}, "seed": {"grid": [0, 1]}}
    path = sweep_file({"cases": cases, "parameters": parameters})
    (trials, _), (_, sweep) = planned(path), load_sweep(path)
    rows = {
        trial.name: {
            "status": "done", "metric": 0.8 + i / 100, "report": 0.8 - i / 100, "bytes": 123_450_000, "seconds": 138.3,
        }
        for i, trial in enumerate(trials)
    }  # fmt: skip
    accuracy = sweep.model_copy(update={"metric": "eval/accuracy", "report": "test/accuracy"})
    table = make_table(trials, rows, accuracy)
    assert table.columns[:3] == ("case", "lr", "gamma")
    assert folded_width(table) <= 80


@pytest.mark.parametrize(
    ("centre", "deviation", "key", "said"),
    [
        (0.8123, 0.0045, "test/accuracy", "81.23 ± 0.45 %"),
        (0.0161, None, "eval/gap", "1.61 %"),
        (1.23456, 0.5, "eval/loss", "1.2346 ± 0.5000"),
        (None, None, "eval/loss", "-"),
    ],
)
def test_how_means_are_written(centre: float | None, deviation: float | None, key: str, said: str) -> None:
    assert format_mean(centre, deviation, key) == said


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs" / "sweeps").glob("*.yaml")), ids=str)
def test_the_sweeps_in_configs_are_valid(path: Path) -> None:
    """All but what the data and the model say: every trial's fields and combinations."""
    settings, sweep = load_sweep(path)
    points = expand(sweep, 0)
    trials = make_trials(settings, points)
    assert len(trials) == len(points)
