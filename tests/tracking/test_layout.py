"""Tables in a terminal: what folds first, and that everything is still there."""

from __future__ import annotations

import io

import pytest

from rayfed.tracking import Table
from rayfed.tracking.console import PlainView
from rayfed.tracking.layout import column_widths, folded, natural_widths

TABLE = Table(
    "mean ± deviation over the seeds, last measured; client.lr selected by mean eval/accuracy (max)",
    ("method.name", "client.lr", "test/accuracy", "MB both ways", "seconds (the server's own)", ""),
    (
        ("fedview with corrections, ranks 4-16-64", "0.05", "67.21 ± 0.34 %", "12.34", "138.3 (4.1)", ""),
        ("  adapter", "0.1", "60.00 ± 0.10 %", "1.23", "99.9 (2.0)", ""),
    ),
)


class Terminal(io.StringIO):
    """A terminal's stream."""

    def isatty(self) -> bool:
        return True


def test_headings_fold_before_names_and_names_before_numbers() -> None:
    natural = natural_widths(TABLE)
    assert natural == [39, 9, 14, 12, 26, 0]
    assert column_widths(TABLE, sum(natural)) == natural
    assert column_widths(TABLE, sum(natural) - 1) == [39, 9, 14, 12, 25, 0]  # the widest heading gives way
    assert column_widths(TABLE, 39 + 9 + 14 + 5 + 11) == [39, 9, 14, 5, 11, 0]
    assert column_widths(TABLE, 30 + 9 + 14 + 5 + 11) == [30, 9, 14, 5, 11, 0]
    assert sum(column_widths(TABLE, 40)) == 40
    assert column_widths(TABLE, 1) == [1, 1, 1, 1, 1, 0]


def test_a_row_folds_between_words_and_keeps_its_indent() -> None:
    assert [*folded(("  as clients receive it", "65.0 %"), (14, 6))] == [("  as clients", "65.0 %"), ("receive it", "")]
    assert [*folded(("", ""), (0, 3))] == [("", "")]


@pytest.mark.parametrize("columns", [80, 65])
def test_a_table_of_a_sweep_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, limited in ((Terminal(), True), (io.StringIO(), True), (io.StringIO(), False)):
        if limited:
            monkeypatch.setenv("COLUMNS", str(columns))
        else:  # a pipe, and nothing says how wide it should be
            monkeypatch.delenv("COLUMNS")
        PlainView(stream).table(TABLE)
        lines = stream.getvalue().splitlines()
        assert (max(map(len, lines)) <= columns) == limited
        for word in " ".join((TABLE.title, *TABLE.columns, *(cell for row in TABLE.rows for cell in row))).split():
            assert word in stream.getvalue()
        assert "67.21 ± 0.34 %" in stream.getvalue()
