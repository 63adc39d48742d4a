"""The ledger as a report reads it: parts, message sizes, and time on a link."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rayfed
from rayfed import wire
from rayfed.errors import UserError
from rayfed.reports import read
from rayfed.reports.table import parts
from rayfed.reports.traffic import Link, parse_link, read_traffic

Write = Callable[..., Path]


def test_traffic_is_what_the_ledger_says_of_a_real_run(tiny: Callable[..., rayfed.Experiment], tmp_path: Path) -> None:
    rayfed.run(tiny("wire.down.density=0.25", "wire.up.density=0.5"), tmp_path / "real")
    traffic = read_traffic(tmp_path / "real")
    assert traffic is not None
    ledger = wire.Ledger.read(tmp_path / "real" / "ledger.parquet")
    totals, rows = ledger.totals(), pq.read_table(tmp_path / "real" / "ledger.parquet").to_pylist()
    assert set(traffic.columns["round"]) == {1, 2}
    for way in ("down", "up"):
        own = [row for row in rows if row["direction"] == way]
        assert own
        assert traffic.bytes(way) == totals[f"bytes/{way}"]
        for part in ("header", "indices", "values"):
            assert traffic.bytes(way, part) == sum(row[f"bytes_{part}"] for row in own) > 0
        sizes = sorted(row["values"] for row in own)
        low, middle, high = traffic.entries(way) or (0, 0, 0)
        assert (low, high) == (sizes[0], sizes[-1])
        assert low <= middle <= high


def test_the_table_of_parts_is_a_mean_over_the_seeds(write_run: Write) -> None:
    folders = [
        write_run("a", down=2_000_000, up=500_000, eval=[0.5]),
        write_run("b", "seed=1", down=4_000_000, up=500_000, eval=[0.5]),
    ]
    comparison = read(folders)
    ledgers = {run: found for run in comparison.groups[0].runs if (found := read_traffic(run.folder))}
    ((_, *cells),) = parts(comparison, ledgers).rows
    # Two messages a way; each has 10 bytes of header, 20 of indices, the rest values; 8 bytes of `size` an entry.
    assert cells[:3] == ["0.0000", "0.0000", "6.00"]
    assert cells[5] == "1.00"
    assert cells[6:] == ["750,000 (500,000 to 1,000,000)", "125,000"]


def test_a_round_lasts_as_long_as_its_slowest_client(tmp_path: Path) -> None:
    ledger = wire.Ledger()
    for t, client, way, size in (
        (1, 1, "down", 1_000_000), (1, 1, "down", 1_000_000), (1, 1, "up", 500_000), (1, 2, "up", 1_000_000),
        (2, 2, "down", 4_000_000),
    ):  # fmt: skip
        sizes = wire.Sizes(n=9, count=9, bytes_header=0, bytes_indices=0, bytes_values=size)
        ledger.add_sizes(round=t, client=client, direction=way, sizes=sizes)  # type: ignore[arg-type]
    ledger.write(tmp_path / "ledger.parquet")
    traffic = read_traffic(tmp_path)
    assert traffic is not None
    # 16 Mbit/s are 2 MB/s down, 4 Mbit/s are 0.5 MB/s up: client 1 takes 1 + 1 s, client 2 takes 2 s; then 2 s more.
    assert traffic.seconds(Link(up=4, down=16)) == pytest.approx({1: 2.0, 2: 4.0})
    assert traffic.seconds(Link(up=4, down=8)) == pytest.approx({1: 3.0, 2: 7.0})
    assert traffic.seconds(Link(up=2, down=16)) == pytest.approx({1: 4.0, 2: 6.0})


def test_a_link_is_up_then_down() -> None:
    assert parse_link("10,50") == Link(up=10, down=50)
    assert parse_link(" 0.5 , 2 ") == Link(up=0.5, down=2)


@pytest.mark.parametrize("text", ["", "10", "10,50,1", "0,5", "5,-1", "a,b", "inf,1", "1,nan"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(
        UserError, match=r"^--link: got .*, but it should be UP,DOWN: two numbers of Mbit/s above 0"
    ) as e:
        parse_link(text)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("damage", ["bytes", "column"])
def test_a_damaged_ledger_is_refused_in_one_line(write_run: Write, damage: str) -> None:
    folder = write_run("a")
    (path,) = (folder / "ledger.parquet").iterdir()
    if damage == "bytes":
        path.write_bytes(b"PAR1 no more")
    else:
        pq.write_table(pa.table({"round": [1]}), path)
    with pytest.raises(UserError) as e:
        read_traffic(folder)
    assert str(e.value).startswith(f"{folder / 'ledger.parquet'}: not a ledger (")
    assert "\n" not in str(e.value)


def test_a_run_without_a_ledger_has_no_traffic(write_run: Write) -> None:
    folder = write_run("a")
    shutil.rmtree(folder / "ledger.parquet")
    assert read_traffic(folder) is None
