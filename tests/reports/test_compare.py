"""What a report says of runs, against numbers worked out by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import stdev

import pytest

import rayfed
from rayfed import wire
from rayfed.errors import UserError
from rayfed.reports import read, summary, write_report
from rayfed.reports.compare import ACCURACY, compare, curve
from rayfed.reports.heat_map import heat_maps
from rayfed.reports.runs import read_run
from rayfed.reports.table import baselines, differing, front, rank_shares
from rayfed.tracking import read_metrics

Write = Callable[..., Path]
GAP = ("data.source=lowrank", "partition.kind=natural")


def cells(folders: list[Path], target: float | None = None) -> dict[str, dict[str, str]]:
    """Label -> column -> cell of the summary."""
    table = summary(read(folders, target))
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_the_last_evaluated_round_counts_and_the_best_on_validation_is_shown_beside_it(write_run: Write) -> None:
    masked = {"test/accuracy_masked": [0.1, 0.2, 0.3, 0.4, None]}
    scores = {"eval": [0.5, 0.8, 0.8, 0.7, None], "test": [0.9, 0.6, 0.65, 0.95, None]}
    folder = write_run("a", **scores, more=masked)
    (found,) = read([folder]).groups[0].summaries
    assert (found.value, found.report, found.masked) == (0.7, 0.95, 0.4)
    assert (found.best_round, found.best_report) == (2, 0.6)
    row = cells([folder])["a"]
    assert row["validation accuracy"] == "70.0 %"
    assert row["test accuracy"] == "95.0 %"
    assert row["sparse model"] == "40.0 %"
    assert row["best round"] == "2"
    assert row["test accuracy, best round"] == "60.0 %"


def test_without_an_accuracy_the_loss_counts(write_run: Write, tmp_path: Path) -> None:
    def losses(values: list[float | None]) -> dict[str, list[float | None]]:
        return {"eval/loss": values, "test/loss": [value and 2 * value for value in values]}

    nothing = {"eval": [None] * 3}
    poor, good = (
        write_run(name, f"client.lr={lr}", **nothing, more=losses(values))
        for name, lr, values in (("poor", 0.1, [3.0, 2.5, 2.75]), ("good", 0.2, [3.0, None, 0.25]))
    )
    comparison = read([poor, good])
    assert [group.label for group in comparison.ranked] == ["lr 0.2", "lr 0.1"]
    (found,) = comparison.ranked[1].summaries
    assert (found.value, found.report, found.best_round, found.best_report) == (2.75, 5.5, 2, 5.0)
    assert comparison.target is None  # no share of a loss means anything
    row = cells([poor, good])["lr 0.2"]
    assert (row["validation loss"], row["test loss"]) == ("0.2500", "0.5000")
    page = write_report(comparison, tmp_path / "page").read_text()
    assert "Loss and traffic" in page
    assert "Best is lr 0.2: 0.5000 test loss, 0.2500 validation loss" in page


def test_the_table_is_what_a_real_run_left_in_metrics_and_ledger(
    tiny: Callable[..., rayfed.Experiment], tmp_path: Path
) -> None:
    out = tmp_path / "real"
    result = rayfed.run(tiny("server.rounds=3", "wire.down.density=0.25", "wire.up.density=0.5"), out)
    comparison = read([out], target=0.01)
    (found,) = comparison.groups[0].summaries
    lines = read_metrics(out / "metrics.jsonl")
    ledger = wire.Ledger.read(out / "ledger.parquet")
    assert (found.value, found.report) == (lines[-1]["eval/accuracy"], lines[-1]["test/accuracy"])
    assert found.masked == lines[-1]["test/accuracy_masked"]
    assert {"bytes/down": found.down, "bytes/up": found.up}.items() <= ledger.totals().items()
    assert found.bytes == ledger.total_bytes
    first = ledger.totals(1)
    assert (found.target_round, found.target_bytes) == (1, first["bytes/down"] + first["bytes/up"])
    assert found.report == result.summary["final/test_accuracy"]
    assert (found.best_round, found.best_report) == (result.summary["best/round"], result.summary["best/test_accuracy"])
    assert comparison.groups[0].counted[0].finished


def test_bytes_to_a_target_count_up_to_the_first_round_that_reached_it(write_run: Write) -> None:
    run = write_run("a", eval=[None, 0.5, None, 0.7, 0.65], down=[10, 20, 30, 40, 50], up=[100, 200, 300, 400, 500])
    other = write_run("b", "client.lr=0.5", eval=[0.1, 0.2, 0.3, 0.4, 0.5])
    comparison = read([run, other], target=0.6)
    assert [group.target_bytes for group in comparison.groups] == [2 * (100 + 1000), None]
    rows = cells([run, other], target=0.6)
    assert rows["lr 0.001"]["MB to 60.0 %"] == "0.0022"
    assert rows["lr 0.001"]["target round"] == "4"
    assert rows["lr 0.5"]["MB to 60.0 %"] == "not reached"


def test_the_default_target_is_95_percent_of_the_best_mean(write_run: Write) -> None:
    folders = [
        write_run("a0", eval=[0.8, 0.6]),
        write_run("a1", "seed=1", eval=[0.4, 0.4]),
        write_run("b", "client.lr=0.5", eval=[0.5, 0.7]),
    ]
    comparison = read(folders)  # means of the best: 0.6 and 0.7
    assert comparison.target == pytest.approx(0.95 * 0.7)
    assert comparison.groups[0].values(lambda r: r.target_bytes) == [3000]
    assert comparison.groups[0].target_bytes is None
    assert cells(folders)["lr 0.001"]["MB to 66.5 %"] == "1/2 reached it"


@pytest.mark.parametrize("target", [0, 1, 80, -0.1, float("nan")])
def test_a_target_that_is_no_share_is_refused(write_run: Write, target: float) -> None:
    with pytest.raises(UserError, match=r"^--target: got .*, but it should be a share between 0 and 1, such as 0.8$"):
        read([write_run("a")], target)


def test_runs_that_differ_in_seed_alone_are_one_group(write_run: Write) -> None:
    folders = [
        write_run("b", "name=other", "seed=1", "engine.workers=5", eval=[0.4, 0.7, 0.9], test=[0.4, 0.7, 0.8]),
        write_run("a", "name=one", "client.momentum=0.9", eval=[0.2, 0.6, 0.5], test=[0.2, 0.6, 0.5], down=2000),
    ]
    (group,) = read(folders).groups
    assert [run.seed for run in group.runs] == [0, 1]
    assert group.score == pytest.approx(0.7)
    assert group.deviation(lambda r: r.report) == pytest.approx(stdev([0.5, 0.8]))
    (row,) = cells(folders).values()
    assert row["seeds"] == "2"
    assert row["best round"] == "2 to 3"
    assert row["test accuracy"] == "65.0 ± 21.2 %"
    assert row["test accuracy, best round"] == "70.0 ± 14.1 %"
    assert row["MB down"] == "0.0090"  # 3 rounds of 2 clients: the mean of 12,000 and 6,000 bytes
    mean = curve(group.counted, ACCURACY, {run: run.cumulative("bytes/down") for run in group.counted})
    assert mean.x == [3000, 6000, 9000]
    assert mean.mean == pytest.approx([0.3, 0.65, 0.7])
    assert (mean.low, mean.high) == ([0.2, 0.6, 0.5], [0.4, 0.7, 0.9])


def test_a_list_valued_metric_is_in_no_series(write_run: Write) -> None:
    more = {"test/recall": [[0.5, None], [0.25, 1.0]], "test/accuracy_rank_4": [[0.5], None]}
    (group,) = read([write_run("a", more=more)]).groups
    assert group.runs[0].series("test/recall") == group.runs[0].series("test/accuracy_rank_4") == {}
    assert group.runs[0].series("eval/accuracy") == {1: 0.5, 2: 0.6}


def test_a_curve_has_the_rounds_that_all_seeds_measured(write_run: Write) -> None:
    folders = [write_run("a", eval=[None, 0.2, 0.3]), write_run("b", "seed=1", eval=[0.1, 0.4, None])]
    (group,) = read(folders).groups
    own = curve(group.runs, ACCURACY)
    assert (own.x, own.mean) == ([2], pytest.approx([0.3]))
    own = curve(group.runs, ACCURACY, {run: run.cumulative("bytes/up") for run in group.runs})
    assert (own.x, own.mean) == ([2000], pytest.approx([0.3]))


def test_between_full_evaluations_a_curve_has_the_subset_and_the_result_has_not(write_run: Write) -> None:
    more = {"eval_subset/accuracy": [0.1, 0.9, None]}
    (group,) = read([write_run("a", eval=[None, None, 0.5], more=more)]).groups
    own = curve(group.runs, ACCURACY)
    assert (own.x, own.mean, own.full) == ([1, 2, 3], [0.1, 0.9, 0.5], [2])
    assert (group.score, group.summaries[0].best_round) == (0.5, 3)
    assert read([group.runs[0].folder], target=0.6).groups[0].target_bytes is None


def test_baselines_are_those_of_the_summaries(write_run: Write) -> None:
    folders = [write_run("a"), write_run("b", "seed=1"), write_run("c", "client.lr=1")]
    for folder, central in zip(folders, (0.5, 0.7, None)):
        values = {
            "final/test_accuracy": 0.6,
            "head_only/test_accuracy": None,
            "head_only/test_accuracy_central": central,
        }
        (folder / "summary.json").write_text(json.dumps(values))
    table = baselines(read(folders))
    assert table is not None
    assert table.rows == (("lr 0.001", "60.0 ± 0.0 %", "-", "-", "60.0 ± 14.1 %"),)
    assert baselines(read(folders[2:])) is None
    (folders[0] / "summary.json").write_text("[]")
    with pytest.raises(UserError, match=r"summary\.json: not a JSON object, so it is damaged$"):
        read(folders)


def test_the_same_settings_and_seed_twice_are_not_two_seeds(write_run: Write) -> None:
    folders = [write_run("a"), write_run("b", eval=[0.1, 0.2])]
    comparison = read([*folders, folders[0], folders[0].parent / "b" / ".." / "a"])
    assert [group.label for group in comparison.groups] == ["a", "b"]
    assert [len(group.runs) for group in comparison.groups] == [1, 1]


def test_an_unfinished_seed_is_in_no_mean_and_said(write_run: Write) -> None:
    done = write_run("a", eval=[0.5, 0.6, 0.7])
    going = write_run("b", "seed=1", eval=[0.1, 0.2], finished=False)
    comparison = read([done, going])
    (group,) = comparison.groups
    assert group.score == 0.7
    assert cells([done, going])[group.label]["seeds"] == "1/2"
    assert comparison.notes == (f"{group.label}: left out of the means, not finished: seed 1",)
    alone = read([going])
    assert alone.groups[0].score == 0.2
    assert alone.notes == ("b: not finished, shown up to its last round",)


def test_a_run_that_stopped_early_is_finished(write_run: Write) -> None:
    folder = write_run("a", "server.rounds=9", eval=[0.5, 0.6])
    assert read([folder]).groups[0].counted[0].finished
    with (folder / "events.log").open("a") as log:
        log.write("2026-11-01T00:00:00.000Z resume after round 2: name x\n2026-11-01T00:00:00.000Z worker 1 died\n")
    assert not read([folder]).groups[0].counted[0].finished


def test_the_settings_that_differ_are_those_that_decide(write_run: Write) -> None:
    a = write_run("a", "client.lr=0.1", "engine.workers=3", "tracking.project=x", "method.mask=fixed")
    b = write_run("b", "client.lr=0.2", "engine.pack=2", "seed=4")
    text = (b / "config.yaml").read_text()
    assert "  max_tokens: 128\n" in text
    (b / "config.yaml").write_text(text.replace("  max_tokens: 128\n", ""))  # as an older version would leave it
    table = differing(read([a, b]))
    assert table.columns == ("", "method.mask", "client.lr", "engine.pack")
    assert [row[1:] for row in table.rows] == [("fixed", "0.1", "1"), ("-", "0.2", "2")]


@pytest.mark.parametrize(
    ("one", "other", "labels"),
    [
        (["name=dense"], ["name=sparse", "client.lr=1"], ["dense", "sparse"]),
        (["name=x"], ["name=x", "client.lr=1"], ["lr 0.001", "lr 1"]),
        (["wire.up.density=0.5"], [], ["density 0.5", "density 1"]),
        (["wire.up.density=0.5", "wire.down.density=0.5"], [], ["density 0.5", "density 1"]),
        (
            ["wire.up.density=0.5", "wire.down.density=0.25"],
            [],
            ["down density 0.25, up density 0.5", "down density 1, up density 1"],
        ),
        (["method.name=fedit"], ["lora.rank=4"], ["fedit, rank 16", "flasc, rank 4"]),
        (["client.lr=1", "client.momentum=0", "client.eps=1", "client.epochs=2"], [], ["a", "b"]),
    ],
)
def test_a_group_is_named_by_what_tells_it_apart(
    write_run: Write, one: list[str], other: list[str], labels: list[str]
) -> None:
    found = [group.label for group in read([write_run("a", *one), write_run("b", *other)]).groups]
    assert found == labels


def test_the_front_is_chosen_on_validation(write_run: Write) -> None:
    folders = [
        write_run("dear", "client.lr=0.1", eval=[0.9], test=[0.5], down=900),
        write_run("beaten", "client.lr=0.2", eval=[0.6], test=[0.99], down=500),
        write_run("cheap", "client.lr=0.3", eval=[0.6], test=[0.4], down=100),
        write_run("between", "client.lr=0.4", eval=[0.7], test=[0.6], down=600),
    ]
    comparison = read(folders)
    assert [group.label for group in comparison.front] == ["lr 0.3", "lr 0.4", "lr 0.1"]
    assert front(comparison).rows[0] == ("lr 0.3", "0.0012", "60.0 %", "40.0 %")
    assert [group.label for group in comparison.ranked] == ["lr 0.1", "lr 0.4", "lr 0.2", "lr 0.3"]


def test_where_the_answer_is_known_the_last_gap_counts(write_run: Write) -> None:
    folders = [
        write_run("a", *GAP, "client.lr=0.1", eval=[0.5, 0.01, 0.2]),
        write_run("b", *GAP, "client.lr=0.2", eval=[0.6, 0.3, 0.1]),
    ]
    comparison = read(folders)
    assert [group.score for group in comparison.groups] == [0.2, 0.1]
    assert comparison.target == pytest.approx(1 - 0.95 * 0.9)
    assert [group.label for group in comparison.ranked] == ["lr 0.2", "lr 0.1"]
    rows = cells(folders)
    assert rows["lr 0.2"]["share of the gap left"] == "10.0 %"
    assert rows["lr 0.1"]["MB to 14.5 %"] == "0.0060"
    assert not any("test" in column for column in rows["lr 0.1"])


def test_a_run_that_diverged_has_no_earlier_round_to_speak_for_it(write_run: Write) -> None:
    nan = {"nonfinite": [None, "train/loss=nan eval/gap=inf"]}
    folders = [
        write_run("a", *GAP, eval=[0.5, None], more=nan),
        write_run("b", *GAP, "client.lr=1", eval=[0.6, 0.3]),
        write_run("c", *GAP, "client.lr=1", "seed=1", eval=[0.5, None], more=nan),
    ]
    comparison = read(folders)
    assert [group.score for group in comparison.groups] == [None, None]
    rows = cells(folders, target=0.4)
    assert rows["lr 0.001"]["share of the gap left"] == "diverged"
    assert rows["lr 1"]["share of the gap left"] == "30.0 % (1/2)"
    assert comparison.front == []
    assert comparison.target is None


def test_without_a_validation_split_nothing_is_chosen(write_run: Write) -> None:
    folder = write_run("a", eval=[None, None, None], test=[0.5, 0.9, 0.7])
    row = cells([folder])["a"]
    assert row["test accuracy"] == "70.0 %"
    assert "best round" not in row


def test_runs_without_a_common_figure_are_refused(write_run: Write) -> None:
    known, other = write_run("a", *GAP), write_run("b")
    with pytest.raises(UserError, match=re.escape(f"DIR: got 2 runs ({known}, {other}), but they have none of")):
        read([known, other])


def test_trials_are_told_apart_by_what_their_names_do_not_share(write_run: Write) -> None:
    """Where more settings differ than a label may spell out, a trial's own name says it shortest."""
    folders = []
    for case, rate, more in (("rbla", 0.1, "lora.rank=5"), ("fedhl", 0.2, "lora.alpha=7")):
        for seed in (0, 1):
            name = f"case={case},steps=10,lr={rate},seed={seed}"
            settings = (f"method.name={case}", f"client.lr={rate}", more, f"seed={seed}", f"name={json.dumps(name)}")
            folders.append(write_run(name, *settings))
    assert [group.label for group in read(folders).groups] == ["rbla, lr 0.1", "fedhl, lr 0.2"]


def test_a_sweep_is_its_trials(write_run: Write, tmp_path: Path) -> None:
    trials = tmp_path / "sweep" / "trials"
    for rank in (16, 4):
        for seed in (0, 1):
            overrides = f"name=rank={rank},seed={seed}", f"lora.rank={rank}", f"seed={seed}"
            write_run(f"rank={rank},seed={seed}", *overrides, eval=[0.5 + rank / 100 + seed / 10], folder=trials)
    (trials / "rank=64,seed=0").mkdir()
    (trials / "rank=64,seed=0.json").write_text(json.dumps({"status": "failed"}))
    comparison = read([tmp_path / "sweep"])
    assert [group.label for group in comparison.groups] == ["rank 4", "rank 16"]
    assert [group.score for group in comparison.groups] == pytest.approx([0.59, 0.71])
    assert comparison.notes == (f"{tmp_path / 'sweep'}: 1 trial (rank=64,seed=0) left out, without a round yet",)
    write_run("c", "lora.rank=8")
    assert len(read([tmp_path / "sweep", tmp_path / "c"]).groups) == 3


def test_a_map_has_the_best_on_validation_in_each_cell(write_run: Write) -> None:
    folders = []
    for density, rank, lr, value in (
        (0.0625, 4, 0.1, 0.3), (0.0625, 16, 0.1, 0.4), (0.25, 4, 0.1, 0.6), (0.25, 16, 0.1, 0.7), (0.25, 16, 0.2, 0.8),
    ):  # fmt: skip
        overrides = f"wire.down.density={density}", f"wire.up.density={density}", f"lora.rank={rank}", f"client.lr={lr}"
        folders.append(write_run(f"r{len(folders)}", *overrides, eval=[value], test=[1 - value]))
    grid, *others = heat_maps(read(folders))
    assert [other.title for other in others] == ["client.lr and rank", "Density and client.lr"]
    assert (grid.y.label, grid.y.texts, grid.x.texts) == ("density, both ways", ["0.0625", "0.25"], ["4", "16"])
    assert {place: group.score for place, group in grid.cells.items()} == {
        (0, 0): 0.3, (0, 1): 0.4, (1, 0): 0.6, (1, 1): 0.8,
    }  # fmt: skip
    assert grid.chosen_among == ["client.lr"]
    assert heat_maps(read(folders[:2])) == []  # one density


def test_ranks_are_shares_of_all_client_rounds(write_run: Write) -> None:
    ranks = {"clients/rank_2": [2, 1], "clients/rank_8": [0, 1]}
    (group,) = read([write_run("a", more=ranks)]).groups
    assert rank_shares(group) == {2: 0.75, 8: 0.25}
    (plain,) = read([write_run("b", "lora.rank=5")]).groups
    assert rank_shares(plain) == {5: 1.0}


def test_in_a_sequence_of_classes_only_the_last_experience_compares(write_run: Write) -> None:
    """Early rounds are measured on fewer classes: none of them is the best, or reaches a target."""
    more = {"sequence/experience": [1, 1, 2, 2], "test/accuracy_experience_1": [0.9, 0.9, 0.3, 0.2]}
    run = read_run(write_run("a", eval=[0.8, 0.9, 0.4, 0.3], more=more))
    (group,) = compare([run], target=0.35).groups
    (found,) = group.summaries
    assert (found.best_round, found.target_round, found.value) == (3, 3, 0.3)
    assert run.by_experience() == [[0.9], [0.2]]
