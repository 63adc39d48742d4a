"""The figure of a partition: well-formed, escaped, small, and in the colours of the page."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from rayfed.reports.drawing import COLORS, VARIABLES
from rayfed.reports.partition import LEVELS, experiences, facts, notes, shades, svg, table

SPREAD = {"min": 1, "p10": 1.5, "median": 2, "mean": 1234.4, "p90": 2000, "max": 20000, "iid": None}
PARTITION: dict[str, Any] = {
    "clients": 4,
    "clients_with_rows": 3,
    "rows": 12,
    "classes": 4,
    "largest_share": 0.5,
    "effective_clients": 2.5,
    "figures": {"rows": SPREAD, "total_variation": {**SPREAD, "iid": 0.125}},
    "rows_by_rank": [6, 4, 2],
    "heat_map": {
        "clients": ["<a&b>", "1", "2"], "rows": [6, 4, 2], "classes": ["x", "y\"'"], "columns_of": 2,
        "counts": [[6, 0], [1, 3], [1, 1]],
    },
}  # fmt: skip
NO_CLASSES = {**PARTITION, "classes": None, "heat_map": None, "figures": {"rows": SPREAD}}


def test_a_shade_is_the_share_of_the_clients_rows_and_only_no_rows_have_none() -> None:
    levels, shares = shades(PARTITION["heat_map"])
    assert shares == [[1, 0], [0.25, 0.75], [0.5, 0.5]]
    assert levels == [[LEVELS, 0], [LEVELS / 4, 3 * LEVELS / 4], [LEVELS / 2, LEVELS / 2]]
    assert shades({"counts": [[999, 1]], "rows": [1000]})[0] == [[LEVELS, 1]]


@pytest.mark.parametrize("partition", [PARTITION, NO_CLASSES])
def test_the_figure_is_well_formed_and_shows_every_cell_and_bar(partition: dict[str, Any]) -> None:
    text = svg(partition)
    root = ElementTree.fromstring(text)
    paths = [path.attrib for path in root.iter("{http://www.w3.org/2000/svg}path")]
    cells = sum(path["d"].count("M") for path in paths if "fill-opacity" in path["style"])
    assert cells == (5 if partition["classes"] else 0)
    assert paths[-1]["d"].count("M") == 3  # the bars
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert ("<a&b>" in words) == bool(partition["classes"])
    assert {"6", "2"} <= set(words)


def test_on_the_page_every_colour_is_a_variable_of_the_page() -> None:
    text = svg(PARTITION, inline=True)
    assert not re.search("#[0-9a-f]{6}", text)
    assert f"var(--{VARIABLES[COLORS[0]]})" in text


def test_the_table_and_its_notes() -> None:
    found = table(PARTITION)
    assert found.columns[-1] == "iid"
    assert found.rows[0] == ("rows", "1", "1.5", "2", "1,234", "2,000", "20,000", "")
    assert found.rows[1][0] == "total variation"
    assert found.rows[1][-1] == "0.12"
    assert "iid" not in table(NO_CLASSES).columns
    assert facts(PARTITION)["clients"] == "4, of which 3 have rows"
    assert max(map(len, [*notes(PARTITION), *notes(NO_CLASSES)])) <= 80


def test_the_table_of_experiences() -> None:
    assert experiences(PARTITION) is None
    found = experiences(
        PARTITION | {"experiences": [{"classes": ["x", "y", "z"], "rows": 1200, "clients_with_rows": 3}]}
    )
    assert found is not None
    assert found.rows == (("1", "1,200", "3", "3", "x, y, ..."),)
