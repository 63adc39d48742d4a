"""The figures of a partition against their definitions, written out over all classes; and their limits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rayfed.tasks.data.dataset import Split
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.data.heterogeneity import describe, write_partition
from rayfed.tasks.low_rank_regression import NumberRows


def federation(labels: list[list[int]] | list[np.ndarray], classes: int, **more: object) -> Federation:
    """Client k has rows with the labels ``labels[k]``; the rows are shuffled in the training split."""
    sizes = [len(own) for own in labels]
    rows = np.random.default_rng(0).permutation(sum(sizes))
    train = np.empty(len(rows), np.int64)
    train[rows] = np.concatenate([np.asarray(own, np.int64) for own in labels])
    split = Split([""] * len(rows), train)
    names = tuple(f"class {c}" for c in range(classes))
    return Federation(split, split, split, names, rows, np.cumsum([0, *sizes]), **more)  # type: ignore[arg-type]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * np.log2(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def test_the_figures_are_their_definitions() -> None:
    rng = np.random.default_rng(1)
    labels = [rng.integers(0, high, size) for high, size in ((7, 30), (2, 5), (4, 1), (1, 0), (5, 64))]
    found = describe(federation(labels, 9))
    holders = [own for own in labels if len(own)]
    population = np.bincount(np.concatenate(holders), minlength=9) / 100
    shares = [np.bincount(own, minlength=9) / len(own) for own in holders]
    total = [np.abs(p - population).sum() / 2 for p in shares]
    jensen = [np.sqrt(kl(p, (p + population) / 2) / 2 + kl(population, (p + population) / 2) / 2) for p in shares]
    for name, values in {
        "rows": [30, 5, 1, 64],
        "classes": [len(set(own.tolist())) for own in holders],
        "total_variation": total,
        "jensen_shannon": jensen,
    }.items():
        spread = found["figures"][name]
        assert [spread[key] for key in ("min", "median", "mean", "max")] == pytest.approx(
            [np.min(values), np.median(values), np.mean(values), np.max(values)]
        )
        assert [spread["p10"], spread["p90"]] == pytest.approx(np.percentile(values, (10, 90)).tolist())
    assert (found["clients"], found["clients_with_rows"], found["rows"], found["classes"]) == (5, 4, 100, 9)
    assert found["largest_share"] == 0.64
    assert found["effective_clients"] == pytest.approx(100**2 / (30**2 + 5**2 + 1 + 64**2))
    assert found["rows_by_rank"] == [64, 30, 5, 1]


def test_the_ends_of_the_ranges() -> None:
    same = describe(federation([[0, 1, 2]] * 4, 3))
    assert same["effective_clients"] == 4
    assert [same["figures"][name]["max"] for name in ("total_variation", "jensen_shannon")] == pytest.approx([0, 0])
    disjoint = describe(federation([[c] * 20 for c in range(50)], 50))["figures"]
    assert disjoint["total_variation"]["min"] == pytest.approx(1 - 1 / 50)
    assert 0.9 < disjoint["jensen_shannon"]["max"] < 1


def test_iid_is_what_clients_of_these_sizes_have_by_chance() -> None:
    rng = np.random.default_rng(2)
    drawn = describe(federation([rng.integers(0, 10, 20) for _ in range(200)], 10))["figures"]["total_variation"]
    assert drawn["iid"] == pytest.approx(drawn["mean"], abs=0.01)
    assert drawn["iid"] > 0.2  # so 0 would be a wrong mark for "no skew"
    skewed = describe(federation([[k % 10] * 20 for k in range(200)], 10))["figures"]["total_variation"]
    assert skewed["iid"] == pytest.approx(drawn["iid"], abs=0.02)
    assert skewed["mean"] == pytest.approx(0.9)


def test_the_heat_map_samples_clients_by_rows_and_joins_neighbouring_classes() -> None:
    labels = [[c % 10 for c in range(k)] for k in range(1, 31)]
    grid = describe(federation(labels, 10), clients=3, columns=4)["heat_map"]
    assert grid["rows"] == [30, 16, 1] or grid["rows"] == [30, 15, 1]
    assert grid["clients"] == [str(n - 1) for n in grid["rows"]]
    assert grid["columns_of"] == 3
    assert grid["classes"] == ["class 0", "class 3", "class 6", "class 9"]
    assert grid["counts"][0] == [9, 9, 9, 3]
    assert [sum(counts) for counts in grid["counts"]] == grid["rows"]
    named = federation([[0], [1, 1]], 2, names=np.array(["ann", "bob"]))
    assert describe(named)["heat_map"]["clients"] == ["bob", "ann"]


@pytest.mark.parametrize("labels", [np.zeros((6, 2), np.float32), np.arange(6) - 1, np.arange(6.0)])
def test_labels_that_are_no_classes_leave_the_rows(labels: np.ndarray) -> None:
    split = NumberRows(np.zeros((6, 1)), labels)
    found = describe(Federation(split, split, split, ("a",) * 6, np.arange(6), np.array([0, 2, 6])))
    assert list(found["figures"]) == ["rows"]
    assert found["classes"] is None
    assert found["heat_map"] is None


def test_the_file_is_small_for_a_large_population_and_is_written_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    labels = np.split(rng.integers(0, 1000, 100_000), np.arange(1, 50_000) * 2)
    write_partition(tmp_path, federation(labels, 1000))
    text = (tmp_path / "partition.json").read_text()
    assert len(text) < 60_000
    assert len(json.loads(text)["rows_by_rank"]) == 101
    write_partition(tmp_path, federation([[0, 1]], 2))
    assert (tmp_path / "partition.json").read_text() == text
