"""The documents refer to files and names that exist, README is short, and the site's generated pages are whole."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from small_runs import lowrank

import rayfed
from rayfed.cli.methods import describe
from rayfed.config import Experiment
from rayfed.config.describe import format_value, iter_fields
from rayfed.config.options import options_of
from rayfed.config.sweep import Sweep
from rayfed.methods import METHODS, method_class
from rayfed.plugins import member_class
from rayfed.weighting import WEIGHTINGS, Weighting

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.M)


@pytest.fixture(scope="module")
def generate() -> SimpleNamespace:
    """The names in docs/generate.py."""
    return SimpleNamespace(**runpy.run_path(str(DOCS / "generate.py")))


def site() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def nav_pages(entry: Any) -> list[str]:
    """The pages of an entry of mkdocs.yml's `nav`, in order."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in nav_pages(part)]


def links(page: Path) -> list[tuple[str, str]]:
    """(text, target) of every link to a file of the project."""
    found = LINK.findall(page.read_text(encoding="utf-8"))
    return [(text, target) for text, target in found if "://" not in target]


def anchors(page: Path) -> set[str]:
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in HEADING.findall(page.read_text(encoding="utf-8"))
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    missing = []
    for text, target in links(page):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append((text, target))
    assert missing == []


def test_the_five_questions_are_answered_by_names_that_exist() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Five questions")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| W")]
    assert len(rows) == 5
    for row in rows:
        named = [(re.search(r"`([\w.]+)`", label), target) for label, target in LINK.findall(row)]
        assert any(name for name, _ in named), row
        for name, target in named:
            if name is not None:
                source = (DOCS / target).read_text(encoding="utf-8")
                assert re.search(rf"^\s*def {name[1].rpartition('.')[2]}\(", source, re.M), (name[1], target)


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 8192
    assert len(text.splitlines()) <= 150


def test_readme_has_every_method_with_the_facts_of_its_class() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", text.split("## Methods")[1].split("\n## ")[0], re.M))
    assert sorted(rows) == sorted(METHODS)
    for name, row in rows.items():
        cls, (paper, ranks, secure, source) = method_class(name), (cell.strip() for cell in row.split("|"))
        assert cls.paper.removeprefix("arXiv ") in paper, name
        assert (ranks == "yes", source) == (cls.mixed_ranks, cls.source), name
        assert (secure or "no") in describe(name).split("secure ")[1].splitlines()[0], name


def test_the_overview_of_methods_has_the_facts_of_every_class() -> None:
    text = (DOCS / "methods.md").read_text(encoding="utf-8").split("## Overview")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*`) \| .* \|(.*)\|(.*)\|$", text, re.M)
    found = {name: (r.strip(), s.strip()) for names, r, s in rows for name in re.findall(r"`(\w+)`", names)}
    assert sorted(found) == sorted(METHODS)
    for name, (ranks, secure) in found.items():
        assert (ranks == "yes") == method_class(name).mixed_ranks, name
        assert (secure or "no") in describe(name).split("secure ")[1].splitlines()[0], name


def test_every_page_is_in_the_navigation(generate: SimpleNamespace) -> None:
    written = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(nav_pages(site()["nav"])) == sorted([*written, *generate.PAGES])


def test_the_site_loads_nothing_from_elsewhere() -> None:
    config = site()
    assert config["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript", "extra"} & set(config)
    assert config["plugins"] == ["search"]


def test_configuration_has_every_setting_and_every_option(generate: SimpleNamespace) -> None:
    page = generate.configuration()
    for key, _ in [*iter_fields(Experiment), *iter_fields(Sweep, "sweep.")]:
        assert f"**`{key}`** (default " in page, key
    for name in METHODS:
        section = page.split(f"\n### {name}\n")[1].split("\n### ")[0]
        for option in options_of(method_class(name)):
            assert f"method.{option} = " in section, (name, option)


def test_the_page_of_weights_has_every_option_with_its_default() -> None:
    text = (DOCS / "weights-and-channels.md").read_text(encoding="utf-8")
    for name in WEIGHTINGS:
        assert f"`{name}`" in text
        for option, found in options_of(member_class("rayfed.weighting", name, Weighting, "server.weights")).items():
            default = format_value(found.default, quotes=False)
            assert f"- `weighting.{option}` (default `{default}`)" in text, (name, option)


def test_equations_has_every_method(generate: SimpleNamespace) -> None:
    page = generate.equations()
    assert re.findall(r"^## (\w+)$", page, re.M) == list(METHODS)
    assert "W^r = best rank-r approximation of W" in page


def test_index_is_readme_with_links_from_docs(generate: SimpleNamespace) -> None:
    page = generate.index()
    targets = [target for _, target in LINK.findall(page) if "://" not in target]
    assert "results/density-and-rank.svg" in targets
    assert all((DOCS / target.partition("#")[0]).exists() for target in targets)


@pytest.mark.parametrize(
    "settings",
    [
        ("method.name=fedhl", "eval.diagnostics=true"),
        ("channel.kind=over_the_air", "channel.snr=20", "server.weights=bound"),
        ("method.name=ffa_lora", "topology.kind=graph", "server.cohort=6"),
    ],
    ids=["star", "air", "graph"],
)
def test_outputs_has_every_key_that_a_run_writes(tmp_path: Path, settings: tuple[str, ...]) -> None:
    text = (DOCS / "outputs.md").read_text(encoding="utf-8")
    run = rayfed.run(lowrank(*settings, "server.rounds=1"), out=tmp_path / "run")
    keys = {*run.metrics[0], *run.summary, *pq.read_table(run.out / "ledger.parquet").column_names}
    keys = {re.sub(r"^clients/rank_\d+$", "clients/rank_4", key) for key in keys}
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []
    files = {entry.name for entry in run.out.iterdir()}
    assert [name for name in sorted(files) if f"| `{name}" not in text] == []
