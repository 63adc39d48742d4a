"""Benchmarks run at small sizes and say what they measured; how fast they are is nobody's test."""

from __future__ import annotations

import json

import pytest

from rayfed.bench import BENCHMARKS, find
from rayfed.bench.algebra import measure
from rayfed.bench.timing import paired, table, write
from rayfed.errors import UserError


def test_every_benchmark_is_there():
    assert all(callable(find(name)) for name in BENCHMARKS)
    with pytest.raises(UserError, match="bench: got 'algebr', but there are algebra"):
        find("algebr")


def test_pairs_run_in_turn_and_the_ratio_is_theirs():
    calls = []
    row = paired("x", ("a", lambda: calls.append("a")), ("b", lambda: calls.append("b")), pairs=3)
    assert calls == ["a", "a", "b", "a", "b", "a", "b"]
    assert row.ratio_low <= row.ratio <= row.ratio_high


def test_algebra_is_exact_where_it_says_so(tmp_path):
    rows = measure(size=96, layers=2, width=40)
    assert rows[0].facts["error"] < 1e-5
    assert rows[1].facts["excess error, flat spectrum"] < 0.1
    write(tmp_path / "b.json", "algebra", rows)
    written = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in rows]
    assert written["machine"]["cores"] >= 1
    assert all(row.name in table(rows) for row in rows)
