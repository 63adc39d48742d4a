import gc
import subprocess
import sys
import tempfile
import tracemalloc
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rayfed.wire import Ledger, Sizes, WireError, encode
from rayfed.wire import ledger as ledgers
from rayfed.wire import rows as heaps


def traffic(rounds: int = 4, clients: int = 5) -> list[tuple[int, int, str, bytes]]:
    """Downloads and uploads of a few rounds, sizes all different."""
    rng = np.random.default_rng(0)
    sent = []
    for round in range(rounds):
        for client in rng.choice(10**12, clients, replace=False):
            for direction in ("down", "up"):
                x = torch.from_numpy(rng.standard_normal(int(rng.integers(50, 500)), np.float32))
                indices = torch.from_numpy(np.flatnonzero(rng.random(x.numel()) < rng.random()))
                sent.append((round, int(client), direction, encode(x, indices=indices)))
    return sent


def filled(sent: list[tuple[int, int, str, bytes]]) -> Ledger:
    ledger = Ledger()
    for round, client, direction, payload in sent:
        ledger.add(round=round, client=client, direction=direction, payload=payload)
    return ledger


def expected(sent: list[tuple[int, int, str, bytes]]) -> dict[str, int]:
    from rayfed.wire import decode

    def total(way: str, count) -> int:
        return sum(count(payload) for _, _, direction, payload in sent if direction == way)

    return {
        "bytes/down": total("down", len),
        "bytes/up": total("up", len),
        "params/down": total("down", lambda p: decode(p).count),
        "params/up": total("up", lambda p: decode(p).count),
    }


def test_totals_are_the_lengths_of_what_travelled():
    sent = traffic()
    ledger = filled(sent)
    assert len(ledger) == len(sent) == 40
    for round in range(4):
        assert ledger.totals(round) == expected([row for row in sent if row[0] == round])
    assert ledger.totals() == expected(sent)
    assert ledger.total_bytes == sum(len(payload) for *_, payload in sent)
    assert ledger.totals(99) == dict.fromkeys(("bytes/down", "bytes/up", "params/down", "params/up"), 0)
    ledger.totals(99)["bytes/up"] = 7  # an answer is a copy
    assert ledger.totals(99)["bytes/up"] == 0


def test_table_columns():
    table = filled(traffic()).table()
    integer = {
        name: pa.int64() for name in ("client", "bytes", "values", "bytes_header", "bytes_indices", "bytes_values")
    }
    types = {field.name: field.type for field in table.schema}
    assert types == {"round": pa.int32(), "direction": pa.dictionary(pa.int32(), pa.string()), **integer}
    parts = [table[name].to_numpy() for name in ("bytes_header", "bytes_indices", "bytes_values")]
    np.testing.assert_array_equal(sum(parts), table["bytes"].to_numpy())
    assert Ledger().table().schema == table.schema


def test_table_and_file_do_not_depend_on_arrival_order(tmp_path):
    sent = traffic()
    one = filled(sent)
    other = filled([sent[i] for i in np.random.default_rng(1).permutation(len(sent))])
    assert one.table().equals(other.table())
    one.write(tmp_path / "one.parquet")
    other.write(tmp_path / "other.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "other.parquet").read_bytes()
    rows = one.table().select(["round", "client", "direction"]).to_pylist()
    assert rows == sorted(rows, key=lambda row: (row["round"], row["client"], row["direction"]))


def test_parquet_round_trip(tmp_path):
    ledger = filled(traffic())
    path = tmp_path / "run" / "ledger.parquet"
    ledger.write(path)
    assert [p.name for p in path.parent.iterdir()] == ["ledger.parquet"]
    assert pq.ParquetFile(path).metadata.row_group(0).column(3).compression == "ZSTD"
    back = Ledger.read(path)
    assert back.table().equals(ledger.table())
    assert back.totals() == ledger.totals()
    assert all(back.totals(r) == ledger.totals(r) for r in range(5))
    assert back.total_bytes == ledger.total_bytes
    Ledger().write(path)
    empty = Ledger.read(path)
    assert (len(empty), empty.total_bytes) == (0, 0)


@pytest.mark.parametrize("last", [-1, 0, 2, 3, 50])
def test_a_resumed_ledger_goes_on_as_if_never_stopped(tmp_path, last):
    sent = traffic()
    filled(sent).write(tmp_path / "ledger.parquet")
    resumed = Ledger.read(tmp_path / "ledger.parquet", up_to_round=last)
    assert resumed.table().equals(filled([row for row in sent if row[0] <= last]).table())
    assert resumed.totals() == expected([row for row in sent if row[0] <= last])
    for round, client, direction, payload in sent:
        if round > last:
            resumed.add(round=round, client=client, direction=direction, payload=payload)
    assert resumed.table().equals(filled(sent).table())
    assert resumed.totals() == filled(sent).totals()
    assert all(resumed.totals(r) == filled(sent).totals(r) for r in range(4))


def test_growing_after_a_table_was_taken():
    ledger = filled(traffic())
    table = ledger.table()
    ledger.add(round=9, client=-1, direction="up", payload=memoryview(encode(torch.ones(3))))
    assert len(ledger) == len(table) + 1


def test_wrong_rows_are_refused_and_leave_no_trace():
    ledger = Ledger()
    payload = encode(torch.ones(3))
    good = {"round": 0, "client": 0, "direction": "up", "payload": payload}
    for change in (
        {"direction": "sideways"},
        {"round": -1},
        {"round": 2**31},
        {"client": 2**63},
        {"payload": payload[:-1]},
        {"payload": b""},
    ):
        with pytest.raises(ValueError, match=r"direction|round|payload"):
            ledger.add(**(good | change))
    with pytest.raises(WireError):
        ledger.add(**(good | {"payload": b"x" * 100}))
    assert len(ledger) == len(ledger.table()) == ledger.total_bytes == 0


def test_files_that_are_no_ledger_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Ledger.read(tmp_path / "none.parquet")
    (tmp_path / "text").write_text("no Parquet here")
    with pytest.raises(ValueError, match="Parquet"):
        Ledger.read(tmp_path / "text")
    pq.write_table(pa.table({"round": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="client, direction"):
        Ledger.read(tmp_path / "other.parquet")
    table = filled(traffic()).table()
    odd = pa.array(["sideways"] * len(table)).dictionary_encode()
    pq.write_table(table.set_column(2, "direction", odd), tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match="neither down nor up"):
        Ledger.read(tmp_path / "odd.parquet")


@pytest.fixture
def small(monkeypatch):
    """As if the heap had room for 7 rows, and a row group for 25."""
    monkeypatch.setattr(heaps, "HEAP_ROWS", 7)
    monkeypatch.setattr(ledgers, "GROUP_ROWS", 25)


def tuples(ledger: Ledger) -> list[tuple]:
    return [tuple(row.values()) for row in ledger.table().to_pylist()]


@pytest.mark.parametrize("order", ["as sent", "backwards", "shuffled"])
def test_spilled_rows_give_the_table_and_the_file_of_rows_on_the_heap(tmp_path, monkeypatch, small, order):
    sent = traffic(rounds=9)
    monkeypatch.setattr(heaps, "HEAP_ROWS", 1_000)
    whole = filled(sent)
    whole.write(tmp_path / "whole.parquet")
    assert tuples(whole) == sorted(tuples(whole))  # "down" before "up"
    monkeypatch.setattr(heaps, "HEAP_ROWS", 7)
    places = {"as sent": range(90), "backwards": range(90)[::-1], "shuffled": np.random.default_rng(2).permutation(90)}
    spilled = filled([sent[i] for i in places[order]])
    spilled.write(tmp_path / "spilled.parquet")
    assert len(spilled) == 90
    assert spilled.table().equals(whole.table())
    assert spilled.totals() == whole.totals() == expected(sent)
    assert (tmp_path / "spilled.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_equal_keys_are_ordered_by_the_other_columns_wherever_they_lay(small):
    pairs = [(header, indices) for header in (5, 3, 9) for indices in (8, 2, 4, 6)]
    ledger = Ledger()
    for header, indices in pairs:
        ledger.add_sizes(round=1, client=1, direction="up", sizes=Sizes(1, 1, header, indices, 50 - header - indices))
    assert [row[5:7] for row in tuples(ledger)] == sorted(pairs)


def test_row_groups_are_as_many_whole_rounds_as_fit(tmp_path, small):
    ledger = Ledger()
    for round, rows in enumerate([10, 10, 10, 60, 5, 5, 15, 1]):
        for client in range(rows):
            ledger.add_sizes(round=round, client=client, direction="up", sizes=Sizes(1, 1, 1, 1, 1))
    ledger.write(tmp_path / "ledger.parquet")
    file = pq.ParquetFile(tmp_path / "ledger.parquet")
    groups = [set(file.read_row_group(i)["round"].to_pylist()) for i in range(file.num_row_groups)]
    assert groups == [{0, 1}, {2}, {3}, {4, 5, 6}, {7}]  # a round of 60 rows has a group of its own


@pytest.mark.parametrize("last", [-1, 0, 3, 5, 50])
def test_a_ledger_is_written_up_to_a_round_and_still_knows_and_takes_later_ones(tmp_path, small, last):
    sent = traffic(rounds=9)
    sooner, later = sent[:60], sent[60:]  # six rounds, three rounds
    ledger = filled(sooner)
    ledger.write(tmp_path / "cut.parquet", up_to_round=last)
    filled([row for row in sooner if row[0] <= last]).write(tmp_path / "short.parquet")
    assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "short.parquet").read_bytes()
    for round, client, direction, payload in later:
        ledger.add(round=round, client=client, direction=direction, payload=payload)
    assert ledger.table().equals(filled(sent).table())
    assert ledger.totals() == expected(sent)


@pytest.mark.parametrize("last", [-1, 0, 3, 7, None])
@pytest.mark.parametrize("rows_a_group", [1, 25, 1_000])
def test_files_of_any_row_groups_are_read_beyond_the_heap(tmp_path, small, last, rows_a_group):
    sent = traffic(rounds=9)
    pq.write_table(filled(sent).table(), tmp_path / "ledger.parquet", row_group_size=rows_a_group)
    back = Ledger.read(tmp_path / "ledger.parquet", up_to_round=last)
    kept = [row for row in sent if last is None or row[0] <= last]
    assert len(back) == len(kept)
    assert back.table().equals(filled(kept).table())
    assert back.totals() == expected(kept)
    assert all(back.totals(round) == expected([row for row in kept if row[0] == round]) for round in range(10))


def test_memory_is_bounded_while_rows_come_and_are_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(heaps, "HEAP_ROWS", 1_000)
    monkeypatch.setattr(ledgers, "GROUP_ROWS", 1_000)
    sizes = Sizes(9, 9, 31, 0, 36)

    def peak(rounds: int) -> tuple[int, int, int]:
        peaks = []
        path = tmp_path / "ledger.parquet"
        ledger = Ledger()
        for round in range(rounds):
            for client in range(100):
                ledger.add_sizes(round=round, client=client, direction="up", sizes=sizes)
        peaks.append(tracemalloc.get_traced_memory()[1])
        for work in (lambda: ledger.write(path), lambda: Ledger.read(path)):
            tracemalloc.reset_peak()
            work()
            peaks.append(tracemalloc.get_traced_memory()[1])
        return tuple(peaks)

    peak(20)  # imports
    tracemalloc.start()
    try:
        few = peak(20)
        tracemalloc.reset_peak()
        many = peak(200)
    finally:
        tracemalloc.stop()
    # 18,000 rows more, of 53 bytes each; a round's totals and its part of the file's metadata are far less.
    assert all(late < early + 18_000 * 53 / 4 for early, late in zip(few, many)), (few, many)


def test_spilled_rows_leave_nothing_behind(tmp_path, monkeypatch, small):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ledger = filled(traffic())
    assert list(tmp_path.iterdir()) == []  # so a killed run leaves nothing either
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        del ledger
        gc.collect()
    assert [str(warning.message) for warning in seen] == []  # such as: unclosed file


def test_pyarrow_and_ray_are_not_imported_with_the_package():
    code = "import sys, rayfed.wire; print([m for m in ('pyarrow', 'ray', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
