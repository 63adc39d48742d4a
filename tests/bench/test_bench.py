"""Benchmarks run at small sizes and say what they measured; how fast they are is nobody's test."""

from __future__ import annotations

import json
import time

import pytest
import torch

from rayfed.bench import BENCHMARKS, aggregate, find, scale, wire
from rayfed.bench.algebra import measure
from rayfed.bench.stub import Shape, make_uploads
from rayfed.bench.timing import paired, table, write
from rayfed.cli import main
from rayfed.errors import UserError


def test_every_benchmark_is_there():
    assert all(callable(find(name)) for name in BENCHMARKS)
    with pytest.raises(UserError, match="bench: got 'algebr', but there are aggregate, algebra, scale, wire"):
        find("algebr")


def test_pairs_run_in_turn_and_the_ratio_is_theirs():
    calls = []
    row = paired("x", ("a", lambda: calls.append("a")), ("b", lambda: calls.append("b")), pairs=3)
    assert calls == ["a", "a", "b", "a", "b", "a", "b"]
    assert row.ratio_low <= row.ratio <= row.ratio_high
    assert row.cpu_ratio > 0


def test_processor_time_is_not_wall_time():
    def work():
        sum(range(2_000_000))

    row = paired("x", ("work", work), ("sleep", lambda: time.sleep(0.05)), pairs=2)
    assert row.seconds_b >= 0.05
    assert row.cpu_b < row.seconds_b / 2


def test_algebra_is_exact_where_it_says_so(tmp_path):
    rows = measure(size=96, layers=2, width=40)
    assert rows[0].facts["error"] < 1e-5
    assert rows[1].facts["excess error, flat spectrum"] < 0.1
    write(tmp_path / "b.json", "algebra", rows)
    written = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in rows]
    assert written["machine"]["cores"] >= 1
    assert all(row.name in table(rows) for row in rows)


SMALL = Shape(layers=3, width=50)


def test_uploads_are_what_they_say():
    one, other = make_uploads(SMALL.entries, 1 / 16, count=2)
    assert len(one.indices) == SMALL.entries // 16
    assert not torch.equal(one.indices, other.indices)
    assert torch.equal(make_uploads(SMALL.entries, 1 / 16, count=1)[0].values, one.values)


def test_wire_holds_the_bytes_against_the_bound():
    threads = torch.get_num_threads()
    rows = wire.measure(entries=40_000, pairs=1)
    assert torch.get_num_threads() == threads
    assert {row.threads for row in rows} == {1}
    facts = {row.name: row.facts for row in rows}
    assert facts["wire 1"]["index bytes"] == 0
    # By hand: H(1/4) = 0.811278 bits, of 40,000 entries 4056.4 bytes.
    assert facts["wire 1/4"]["entropy bound"] == 4057
    assert abs(facts["wire 1/16"]["over the bound, %"]) < 5
    assert facts["wire 1/16, layers differ"]["over the bound, %"] < 0
    assert all(facts[f"wire {d}"]["GB/s"] > 0 for d in ("1", "1/4", "1/16", "1/64"))
    assert [row.name for row in rows if row.name.startswith("top-k")] == ["top-k 1/4", "top-k 1/16", "top-k 1/64"]


def test_aggregate_runs_the_drivers_own_code():
    rows = aggregate.measure(uploads=20, shape=SMALL, pairs=1)
    assert [row.name for row in rows] == ["flasc", "fedit"]
    state = 4 * SMALL.entries / 1e6
    assert rows[0].facts["allowed"] == pytest.approx(3 * 3 * state + 200)  # AdamW has two moments beside the vector
    assert rows[1].facts["allowed"] == pytest.approx(3 * state + 200)
    assert all(row.facts["uploads/s"] > 0 for row in rows)


def test_scale_runs_whole_rounds_of_a_large_population():
    rows = scale.measure(cohorts=(10, 30), population=5_000, rounds=3, large=SMALL)
    assert [row.name for row in rows] == ["cohort 10 of 5000", "cohort 30 of 5000", "cohort 30 of 5000"]
    assert rows[-1].a == f"a round, adapter of {SMALL.entries}"
    assert all(row.facts["ms a client"] > 0 and row.facts["ms a client, cpu"] > 0 for row in rows)


def test_only_aggregate_counts_uploads(capsys, tmp_path):
    assert main(["bench", "algebra", "--uploads", "5"]) == 2
    assert "only `bench aggregate` takes it" in capsys.readouterr().err
    assert main(["bench", "aggregate", "--uploads", "0"]) == 2
