"""The documents refer to files and names that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def links(page: Path) -> list[tuple[str, Path]]:
    """(text, file) of every link to a file of the project."""
    found = LINK.findall(page.read_text(encoding="utf-8"))
    return [(text, page.parent / target.split("#")[0]) for text, target in found if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [(text, str(target)) for text, target in links(page) if not target.exists()]
    assert missing == []


def test_the_five_questions_are_answered_by_names_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Five questions")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| W")]
    assert len(rows) == 5
    for row in rows:
        named = [(re.search(r"`([\w.]+)`", label), target) for label, target in LINK.findall(row)]
        assert any(name for name, _ in named), row
        for name, target in named:
            if name is not None:
                source = (ROOT / "docs" / target).read_text(encoding="utf-8")
                assert re.search(rf"^\s*def {name[1].rpartition('.')[2]}\(", source, re.M), (name[1], target)
