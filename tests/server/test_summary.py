"""The summary and the closing table name one model first: the one that is exported."""

from __future__ import annotations

import json
from collections import Counter

import pandas as pd
from small_runs import lowrank

import rayfed
from rayfed.server.summary import _ranks
from rayfed.tracking import Sink, Table


class Last(Sink):
    """Keeps the closing table."""

    table: Table | None = None

    def finish(self, summary, table):
        self.table = table


def test_the_closing_table_begins_with_the_exported_model_and_has_its_numbers(tiny, tmp_path):
    sink = Last()
    sparse = "wire.down.density=0.25", "wire.up.density=0.25", "server.rounds=3", "client.lr=0.2"
    result = rayfed.run(tiny(*sparse), out=tmp_path / "run", sink=sink)
    summary, table = result.summary, sink.table
    exported, received = summary["final/test_accuracy"], summary["final/test_accuracy_masked"]
    assert exported == result.metrics[-1]["test/accuracy"]
    assert table.columns == ("", "test accuracy", "MB both ways")
    assert table.rows[0][1] == f"{100 * exported:.1f} %"
    labels = [label for label, *_ in table.values]
    assert labels == [label for label, *_ in table.rows]
    assert table.values[0] == ("flasc, rank 4, density 1/4 down, 1/4 up", exported, summary["bytes/total"] / 1e6)
    assert table.values[1] == ("  as clients receive it, sparse", received, None)
    assert table.values[2][1:] == (None, summary["bytes/dense"] / 1e6)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_the_closing_table_names_ranks_and_densities_as_they_were_used(tmp_path):
    sink, tiers = Last(), ("profiles.kind=tiers", "profiles.ranks=[4,1,2]", "profiles.densities_up=[0.5,0.125,0.5]")
    settings = "method.name=fedhl", *tiers, "wire.down.decay=0.5", "wire.down.every=2", "server.cohort=3"
    rayfed.run(
        lowrank(*settings, "server.rounds=3", "partition.clients=3", "lora.rank=4"), out=tmp_path / "run", sink=sink
    )
    assert sink.table.rows[0][0] == "fedhl, ranks 1, 2 and 4, density 1/2 to 1 down, 1/8 to 1/2 up"
    assert _ranks([4]) == ", rank 4"
    assert _ranks([1, 2, 3, 4, 9]) == ", 5 ranks from 1 to 9"
    assert _ranks([]) == ""


def test_a_key_of_the_rounds_never_means_a_total_in_the_summary(tiny, tmp_path):
    result = rayfed.run(tiny("server.rounds=3"), out=tmp_path / "run")
    summary, last = result.summary, result.metrics[-1]
    for key in ("bytes/down", "bytes/up", "params/down", "params/up"):
        assert summary[f"{key}_total"] == sum(record[key] for record in result.metrics)
    for key in summary.keys() & last.keys():
        assert summary[key] == last[key]


def test_a_record_says_who_trained_at_which_rank(tmp_path):
    mixed = "method.name=fedhl", "profiles.kind=tiers", "profiles.ranks=[1,2]", "server.cohort=4", "engine.pack=2"
    result = rayfed.run(lowrank(*mixed), out=tmp_path / "run")
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    for record in result.metrics:
        uploads = ledger[(ledger["round"] == record["round"]) & (ledger["direction"] == "up")]
        clients, ranks = zip(*record["clients/trained"])
        assert list(clients) == sorted(uploads["client"])
        assert Counter(ranks) == {rank: record[f"clients/rank_{rank}"] for rank in set(ranks)}
        assert all(rank == (1, 2)[client % 2] for client, rank in record["clients/trained"])
