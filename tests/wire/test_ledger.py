import contextlib
import itertools
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bit_flips import flipped

from rayfed.wire import Ledger, Sizes, encode
from rayfed.wire.ledger import COLUMNS


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


def filled(sent: list[tuple[int, int, str, bytes]], ledger: Ledger | None = None) -> Ledger:
    ledger = Ledger() if ledger is None else ledger
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
    for round in range(4):
        assert ledger.totals(round) == expected([row for row in sent if row[0] == round])
    assert ledger.totals() == expected(sent)
    assert ledger.total_bytes == sum(len(payload) for *_, payload in sent)
    assert ledger.totals(99) == dict.fromkeys(("bytes/down", "bytes/up", "params/down", "params/up"), 0)
    ledger.totals(99)["bytes/up"] = 7  # an answer is a copy
    assert ledger.totals(99)["bytes/up"] == 0


def test_rows_are_those_of_the_payloads_with_their_checksums():
    sent = traffic()
    rows = filled(sent).rows(1, 2)
    assert rows.dtype == np.int64
    assert rows.shape == (20, len(COLUMNS))
    expected_rows = sorted(
        [round, client, ("down", "up").index(direction), len(payload), zlib.crc32(payload[:27] + payload[31:])]
        for round, client, direction, payload in sent
        if round in (1, 2)
    )
    assert rows[:, [0, 1, 2, 3, -1]].tolist() == expected_rows
    np.testing.assert_array_equal(rows[:, 5:8].sum(1), rows[:, 3])


def table(sent: list[tuple[int, int, str, bytes]], folder: Path) -> pa.Table:
    """All rows, written at once."""
    filled(sent).write(folder)
    return pq.read_table(folder)


def written(folder: Path, sent: list[tuple[int, int, str, bytes]], every: int, ledger: Ledger | None = None) -> Ledger:
    """Adds the rows and writes after each ``every`` rounds."""
    ledger = Ledger() if ledger is None else ledger
    for _, rows in itertools.groupby(sent, lambda row: row[0] // every):
        filled(list(rows), ledger).write(folder)
    return ledger


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_totals(one: Ledger, other: Ledger) -> bool:
    return all(one.totals(r) == other.totals(r) for r in (None, *range(10)))


def test_the_folder_is_one_table_for_pyarrow_and_pandas(tmp_path):
    sent = traffic(rounds=9)
    folder = tmp_path / "server.rounds=9" / "ledger.parquet"  # a name that pyarrow could take for a partition
    ledger = written(folder, sent, 2)
    (folder / ".part-000010.parquet.7.partial").write_text("left by a killed process")
    parts = [f"part-00000{round}.parquet" for round in (1, 3, 5, 7, 8)]
    assert sorted(files(folder)) == [".part-000010.parquet.7.partial", *parts]
    assert pq.ParquetFile(folder / parts[0]).metadata.row_group(0).column(3).compression == "ZSTD"
    whole = table(sent, tmp_path / "whole")
    types = {name: pa.int64() for name in COLUMNS} | {
        "round": pa.int32(), "direction": pa.dictionary(pa.int32(), pa.string())
    }  # fmt: skip
    assert {field.name: field.type for field in whole.schema} == types
    assert pq.read_table(folder).equals(whole)
    assert same_totals(Ledger.read(folder), ledger)
    rows = [tuple(row.values()) for row in whole.to_pylist()]
    assert rows == sorted(rows)  # "down" before "up"
    pandas = pytest.importorskip("pandas")
    pandas.testing.assert_frame_equal(pandas.read_parquet(folder), whole.to_pandas())


def test_a_write_forgets_its_rows_and_changes_no_earlier_part(tmp_path):
    ledger = written(tmp_path, traffic()[:20], 2)
    before = files(tmp_path)
    assert len(ledger.rows()) == 0
    ledger.write(tmp_path)
    assert files(tmp_path) == before
    filled(traffic()[20:], ledger).write(tmp_path)
    assert files(tmp_path).items() > before.items()
    assert ledger.totals() == expected(traffic())


def test_a_write_that_fails_leaves_no_file_and_keeps_the_rows(tmp_path, monkeypatch):
    ledger = filled(traffic())

    def full(rows: pa.Table, path: Path, **_: object) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(OSError, match="disk full"):
            ledger.write(tmp_path)
    assert files(tmp_path) == {}
    ledger.write(tmp_path)
    assert len(pq.read_table(tmp_path)) == 40


def test_a_write_up_to_a_round_leaves_the_later_rows(tmp_path):
    sent = traffic()
    ledger = filled(sent)
    ledger.write(tmp_path, 1)
    assert list(files(tmp_path)) == ["part-000001.parquet"]
    np.testing.assert_array_equal(ledger.rows(), filled(sent).rows(2))
    ledger.write(tmp_path)
    assert pq.read_table(tmp_path).equals(table(sent, tmp_path / "whole"))


def test_neither_rows_nor_file_depend_on_the_order_of_arrival(tmp_path):
    sent = traffic()
    one, other = filled(sent), filled([sent[i] for i in np.random.default_rng(1).permutation(len(sent))])
    one.write(tmp_path / "one")
    other.write(tmp_path / "other")
    assert files(tmp_path / "one") == files(tmp_path / "other")


def test_equal_keys_are_ordered_by_the_other_columns():
    pairs = [(header, indices) for header in (5, 3, 9) for indices in (8, 2, 4, 6)]
    ledger = Ledger()
    for header, indices in pairs:
        ledger.add_sizes(round=1, client=1, direction="up", sizes=Sizes(1, 1, header, indices, 50 - header - indices))
    assert [(header, indices) for header, indices in ledger.rows()[:, 5:7].tolist()] == sorted(pairs)


def test_an_empty_ledger_is_written_and_read(tmp_path):
    folder = tmp_path / "ledger.parquet"
    Ledger.truncate(folder, 0)
    assert not folder.exists()
    Ledger().write(folder)
    assert len(pq.read_table(folder)) == 0
    assert Ledger.read(folder).total_bytes == 0
    assert len(filled(traffic(), Ledger.read(folder)).rows()) == 40


@pytest.mark.parametrize(("every", "last"), [(1, -1), (1, 0), (1, 3), (1, 50), (3, 2), (3, 5)])
def test_a_resumed_ledger_goes_on_as_if_never_stopped(tmp_path, last, every):
    sent = traffic(rounds=9)
    sooner = [row for row in sent if row[0] <= last]
    checksum = written(tmp_path, sent, every).checksum
    before = files(tmp_path)
    assert same_totals(Ledger.read(tmp_path, last), filled(sooner))
    assert files(tmp_path) == before  # reading removes nothing
    Ledger.truncate(tmp_path, last)
    resumed = Ledger.read(tmp_path)
    assert same_totals(resumed, filled(sooner))
    written(tmp_path, sent[len(sooner) :], every, resumed)
    assert files(tmp_path) == before
    assert same_totals(resumed, filled(sent))
    assert resumed.checksum == checksum == Ledger.read(tmp_path).checksum


def test_the_checksum_sees_every_change_of_a_part(tmp_path):
    checksum = written(tmp_path, traffic(), 1).checksum
    part = tmp_path / "part-000001.parquet"
    data = part.read_bytes()
    for bad in flipped(data, 50):
        part.write_bytes(bad)
        with contextlib.suppress(ValueError):
            assert Ledger.read(tmp_path).checksum != checksum
    part.unlink()
    assert Ledger.read(tmp_path).checksum != checksum


def test_a_part_that_is_no_ledgers_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        Ledger.read(tmp_path / "none")
    written(tmp_path, traffic(), 1)
    part = tmp_path / "part-000002.parquet"
    table, data = pq.read_table(part), part.read_bytes()
    for damage, said in (
        (lambda: part.write_text("no Parquet here"), "Parquet"),
        (lambda: part.write_bytes(data[:-9]), "Parquet"),
        (lambda: pq.write_table(table.drop("client"), part), "client"),
    ):
        damage()
        with pytest.raises(ValueError, match=rf"^{part}: .*{said}") as error:
            Ledger.read(tmp_path)
        assert "\n" not in str(error.value)


def test_parts_with_many_row_groups_are_read(tmp_path):
    whole = table(traffic(), tmp_path)
    pq.write_table(whole, tmp_path / "part-000003.parquet", row_group_size=7)
    assert same_totals(Ledger.read(tmp_path), filled(traffic()))


def test_memory_does_not_grow_with_the_run(tmp_path):
    sizes = Sizes(9, 9, 31, 0, 36)

    def work(ledger: Ledger, rounds: range) -> int:
        """Traced bytes after so many rounds of 200 rows, each with a checkpoint."""
        for round in rounds:
            for client in range(200):
                ledger.add_sizes(round=round, client=client, direction="up", sizes=sizes)
            ledger.write(tmp_path)
        return tracemalloc.get_traced_memory()[0]

    ledger = Ledger()
    work(ledger, range(5))  # imports
    tracemalloc.start()
    try:
        few = work(ledger, range(5, 10))
        many = work(ledger, range(10, 110))
        tracemalloc.reset_peak()
        Ledger.read(tmp_path)
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    rows = 100 * 200 * 64  # bytes of the rows of 100 rounds; the totals of a round are far less
    assert many - few < rows / 10
    assert read - many < rows / 10
