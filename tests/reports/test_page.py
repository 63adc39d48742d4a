"""The page and its figures: one file, well formed, the same bytes for the same runs, and it renders."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from rayfed.errors import UserError
from rayfed.reports import Link, figures, read, write_report
from rayfed.reports.charts import lines, pareto
from rayfed.reports.drawing import COLORS, DARK, LIGHT, MARKERS, MUTED, RAMP, css, drawing, group_styles, ramp
from rayfed.reports.heat_map import draw, heat_maps
from rayfed.reports.run_charts import client_accuracies, experiences, trained

Write = Callable[..., Path]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def tree(page: Path) -> ET.Element:
    return ET.fromstring(page.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n"))


def texts(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


@pytest.fixture(scope="module")
def sweep(writer: Write, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Density x rank with two seeds, ranks mixed, one setting's names hostile."""
    folders, at = [], tmp_path_factory.mktemp("sweep")
    for density, size in ((0.25, 1000), (1.0, 4000)):
        for rank in (4, 16):
            for seed in (0, 1):
                overrides = f"wire.up.density={density}", f"lora.rank={rank}", f"seed={seed}", f"name=d{density}r{rank}"
                more = {"clients/rank_2": [1, 2, 1], f"clients/rank_{rank}": [1, 0, 1]}
                more |= {"test/accuracy_rank_4_density_0.25": [0.1, 0.2, 0.3]}
                scores = [0.3 + rank / 100, 0.5 + density / 10, 0.6 + seed / 50 + density / 10]
                name = f"{density}-{rank}-{seed}"
                sizes = {"down": [size, 900, 800], "up": size}
                folders.append(writer(name, *overrides, eval=scores, more=more, folder=at, **sizes))
    return folders


@pytest.fixture(scope="module")
def page(sweep: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep's page, without files of its figures."""
    return write_report(read(sweep), tmp_path_factory.mktemp("page"), Link(10, 50), files=False)


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(page: Path) -> None:
    root = tree(page)
    text = page.read_text()
    assert not re.search(r"https?:|//[a-z]", text)
    assert not re.search(r"@import|url\((?!#)", text)
    assert {element.tag for element in root.iter()}.isdisjoint({"script", "link", "img", "iframe", "object", "style:"})
    assert "default-src 'none'" in text
    assert "@media screen and (prefers-color-scheme:dark)" in text
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    assert used
    assert used <= set(ids)
    assert root.find(".//meta[@name='viewport']") is not None


def test_every_figure_has_a_title_and_a_caption(page: Path) -> None:
    root = tree(page)
    figures = root.findall(".//figure")
    titles = [texts(figure.find("svg/title")) for figure in figures]  # type: ignore[arg-type]
    expected = ["against rounds", "against MB both ways", "against MB down", "against MB up", "against simulated time"]
    expected = [f"Validation accuracy {rest}" for rest in expected]
    expected += ["MB both ways to 67.5 % validation accuracy", "Validation accuracy and MB both ways"]
    expected += ["Density and rank", "Traffic by part", "Ranks of the clients"]
    assert titles == [*expected, "Entries that a client receives per round", "Entries that a client sends per round"]
    for figure in figures:
        svg = figure.find("svg")
        assert svg is not None
        assert svg.get("role") == "img"
        labels = str(svg.get("aria-labelledby")).split()
        assert [root.find(f".//*[@id='{label}']") is not None for label in labels] == [True, True]
        assert texts(figure.find("figcaption/b")) in titles  # type: ignore[arg-type]
        assert svg.findall(".//text"), "letters, not their outlines"


def test_the_page_says_what_the_tables_say(page: Path) -> None:
    root = tree(page)
    said = texts(root)
    assert texts(root.find(".//h1")) == "4 settings compared, 8 runs"  # type: ignore[arg-type]
    assert "Best is d1.0r4: 71.0 % test accuracy, 71.0 % validation accuracy, for 0.0354 MB both ways." in said
    assert "Fewest bytes to 67.5 % validation accuracy: d1.0r4, 0.0354 MB; 2 of 4 reach it." in said
    heads = [texts(cell) for cell in root.findall(".//table")[1].findall("thead/tr/th")]
    assert heads == ["", "lora.rank", "wire.up.density"]
    assert "Figures of a single run: rayfed report" in said
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


def test_one_run_shows_its_own_figures(write_run: Write, tmp_path: Path) -> None:
    more = {"test/accuracy_rank_4_density_0.25": [0.1, 0.2], "eval/accuracy_masked": [0.1, 0.3]}
    more |= {f"test/accuracy_clients{which}": [0.3, 0.4] for which in ("", "_p10", "_p50", "_p90")}
    more |= {"eval_subset/accuracy": [0.2, None], "method/residual": [1.0, 2.0]}
    more |= {"diagnostics/to_mean_of_products": [0.1, 0.2], "clients/trained": [[[3, 4], [7, 16]], [[3, 4], [5, 4]]]}
    more |= {"test/confusion_matrix": [None, [[5, 1], [0, 9]]]}
    more |= {"test/accuracy_per_client": [None, [0.75, None, 0.25, 0.5, 1.0, 0.5]]}
    folder = write_run("a", "name=mine", more=more)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "classes.json").write_text(json.dumps(["<cards>", "a name that is far too long"]))
    root = tree(write_report(read([folder]), folder))
    titles = [texts(title) for title in root.findall(".//figure/svg/title")]
    assert titles[-9:] == [
        "Accuracy against rounds", "Loss against rounds", "Test accuracy by tier of clients",
        "Test accuracy over the clients", "Distance from plain averages", "residual against rounds",
        "Who trained when, at which rank", "Test accuracy of each client", "Confusion matrix",
    ]  # fmt: skip
    letters = [texts(text) for text in root.findall(".//figure/svg//text")]
    assert {"validation", "validation, sparse model", "test", "training", "rank 4, density 0.25"} <= set(letters)
    assert {"90th percentile", "median", "mean", "10th percentile"} <= set(letters)
    assert {"validation, subset", "rank 4", "rank 16", "<cards>", "a name t...ong", "9"} <= set(letters)
    assert "has not trained" in letters
    (lowest,) = (own for own in root.findall(".//table") if "lowest test accuracy" in texts(own[0]))
    rows = [[texts(cell) for cell in row] for row in lowest.findall("tbody/tr")]
    assert rows[:3] == [["2", "-", "25.0 %"], ["3", "4", "50.0 %"], ["5", "4", "50.0 %"]]
    assert "after round 2, of 5" in texts(lowest)
    assert "2 of 2, finished" in texts(root)
    assert "Run by run" not in texts(root)
    assert sorted(path.name for path in (folder / "figures").iterdir())[:2] == ["bytes.png", "bytes.svg"]


def test_what_has_an_order_has_colours_in_order() -> None:
    assert ramp(8) == [light for light, _ in RAMP]
    assert (ramp(2), ramp(1)) == ([RAMP[0][0], RAMP[-1][0]], [RAMP[3][0]])
    assert ramp(20) == sorted(ramp(20), key=lambda color: -int(color[1:3], 16)), "from pale to dark"


def test_a_map_ascends_and_equal_points_stay_visible(write_run: Write) -> None:
    folders = [
        write_run(f"{density}-{rank}", f"wire.up.density={density}", f"lora.rank={rank}", up=int(1000 * density))
        for density in (0.25, 1.0)
        for rank in (4, 16)
    ]
    comparison = read(folders)
    with drawing():
        (grid,) = heat_maps(comparison)
        axes = draw(comparison, grid).axes[0]
        low, high = axes.get_ylim()
        assert low < high
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0.25", "1"]
        points = pareto(comparison, group_styles(comparison.groups, comparison.ranked), False).axes[0].lines
        shown = {line.get_markerfacecolor(): line.get_zorder() for line in points if line.get_marker() in MARKERS}
    assert shown.pop("none") > max(shown.values())


def test_equal_values_do_not_hide_each_others_markers() -> None:
    with drawing():
        drawn = lines({"rank 2": {3: 0.3}, "rank 4": {3: 0.3}, "rank 8": {3: 0.3}}, ordered=True).axes[0].lines
    sizes = [line.get_markersize() for line in drawn]
    assert sizes == sorted(set(sizes), reverse=True), "the ones below are larger"
    assert {line.get_markerfacecolor() for line in drawn} == {"none"}


def test_of_a_long_run_the_last_rounds_show_who_trained(write_run: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "MOST_SQUARES", 5)
    more = {"clients/trained": [[[1, 4], [2, 4]]] * 4}
    (run,) = read([write_run("a", eval=[0.1, 0.2, 0.3, 0.4], more=more)]).groups[0].runs
    (plot,) = (plot for plot in figures.run_plots(run, 1) if plot.name == "run-1-trained")
    assert list(plot.draw.args[0]) == [4, 3]
    assert plot.caption.endswith("The last 2 rounds.")


def test_squares_of_many_clients_are_small_and_every_client_has_its_own_point() -> None:
    with drawing():
        few = trained({t: [[client, 4] for client in range(5)] for t in range(1, 4)}).axes[0].lines[0]
        many = trained({1: [[0, 4], [349, 4]]}).axes[0].lines[0]
        points = client_accuracies([0.5, None, 0.5, 0.25], {0: 4, 3: 16}).axes[0].lines
    assert (few.get_markersize(), many.get_markersize()) == (6.0, 1.5)
    shown = [(int(x), float(y)) for line in points for x, y in zip(*line.get_data())]
    assert sorted(shown) == [(1, 0.25), (2, 0.5), (3, 0.5)]
    assert [line.get_color() for line in points] == [*ramp(2), MUTED], "ranks, then the client that has not trained"


def test_names_are_only_ever_text(write_run: Write, tmp_path: Path) -> None:
    name = "</text><b onload='x'>&\"$\\frac$\u00a0_"
    folders = [write_run("a", f"name={json.dumps(name)}"), write_run("b", "name=_plain", "client.lr=1")]
    root = tree(write_report(read(folders), tmp_path / "out"))
    cells = [texts(cell) for cell in root.findall(".//tbody/tr/th")]
    assert name.replace("\u00a0", "\N{REPLACEMENT CHARACTER}") in cells
    assert not root.findall(".//*[@onload]")
    drawn = (tmp_path / "out" / "figures" / "rounds.svg").read_text()
    ET.fromstring(drawn)
    assert "$\\frac$" in drawn
    assert "_plain" in drawn


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes_whatever_the_users_style(write_run: Write, tmp_path: Path) -> None:
    import matplotlib

    folders = [write_run("a", "name=this"), write_run("b", "name=that", "client.lr=1", eval=[0.55, 0.65])]
    write_report(read(folders), tmp_path / "one")
    with matplotlib.rc_context({"font.size": 30, "xtick.major.size": 9, "svg.fonttype": "path"}):
        write_report(read(folders), tmp_path / "two")
        assert matplotlib.rcParams["font.size"] == 30
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 1 + 2 * 7
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    drawn = (tmp_path / "one" / "figures" / "rounds.svg").read_text()
    assert "<dc:date>" not in drawn
    assert ">this<" in drawn, "a legend of its own"
    assert ">that<" in drawn


def test_each_colour_of_a_figure_follows_the_pages_light_or_dark(page: Path) -> None:
    text = page.read_text()
    body = text[text.index("<body>") :]
    maps = re.findall(r'<svg role="img" aria-labelledby="density-rank.*?</svg>', body, re.DOTALL)
    assert len(maps) == 1
    assert set(re.findall(r"#[0-9a-f]{6}\b", body.replace(maps[0], ""))) == set()
    names = set(re.findall(r"var\(--(\w+)\)", text))
    assert names
    for name in names:
        assert len(re.findall(rf"--{name}:#", css())) == 2


def test_colours_can_be_told_from_the_paper() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    light, dark = re.findall(r"color-scheme:\w+;([^}]*)", css())
    for colors, paper, ink in ((light, LIGHT["paper"], LIGHT["ink"]), (dark, DARK["paper"], DARK["ink"])):
        assert contrast(ink, paper) >= 7
        assert all(contrast(color, paper) >= 3 for _, color in re.findall(r"--(s\d):(#\w+)", colors))


def test_of_many_settings_the_best_have_colours(write_run: Write, tmp_path: Path) -> None:
    folders = [write_run(f"r{i}", f"client.lr={i + 1}", eval=[0.1 + i / 20]) for i in range(len(COLORS) + 3)]
    comparison = read(folders)
    styles = group_styles(comparison.groups, comparison.ranked)
    assert [group.label for group in styles] == [f"lr {i + 1}" for i in range(3, len(COLORS) + 3)]
    assert len({style.color for style in styles.values()}) == len(COLORS)
    said = texts(tree(write_report(comparison, tmp_path / "out", files=False)))
    assert "3 more, with a worse validation accuracy" in said


def test_without_matplotlib_the_refusal_names_the_extra(
    write_run: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    comparison = read([write_run("a")])
    with pytest.raises(UserError, match=r"^matplotlib: not installed, .*pip install -e '\.\[report\]'$"):
        write_report(comparison, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_score_there_is_no_pareto_front(write_run: Write, tmp_path: Path) -> None:
    """In each of three groups one seed diverges: no group has a score, and some have bytes."""
    nan = {"nonfinite": [None, "eval/gap=inf"]}
    folders = []
    for lr in (1, 2, 3):
        settings = "data.source=lowrank", "partition.kind=natural", f"client.lr={lr}"
        folders.append(write_run(f"{lr}-0", *settings, eval=[0.6, 0.3], up=500 * lr))
        folders.append(write_run(f"{lr}-1", *settings, "seed=1", eval=[0.6, None], more=nan))
    said = texts(tree(write_report(read(folders), tmp_path / "out", files=False)))
    assert "No run has a finite value." in said
    assert "Pareto" not in said


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)], ids=["phone, dark", "desktop, light"])
def test_a_browser_renders_the_page(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    from PIL import Image

    shot = tmp_path / "shot.png"
    command = [
        str(CHROMIUM),
        "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--window-size={width},1600", f"--screenshot={shot}", page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    image = Image.open(shot).convert("RGB")
    colors = {color: count for count, color in image.getcolors(image.width * image.height)}
    colors_of = DARK if dark else LIGHT
    paper, ink = (tuple(int(colors_of[name][i : i + 2], 16) for i in (1, 3, 5)) for name in ("paper", "ink"))
    assert max(colors, key=colors.__getitem__) == paper
    assert colors.get(ink, 0) > 500
    # Nothing but the tables, which scroll on their own, is wider than the screen: its right margin stays empty.
    assert image.crop((image.width - 8, 0, image.width, image.height)).getcolors() == [(8 * image.height, paper)]


def test_where_the_answer_is_known_gaps_are_on_a_log_axis(write_run: Write, tmp_path: Path) -> None:
    known = "data.source=lowrank", "partition.kind=natural"
    folders = [
        write_run("a", *known, "client.lr=0.1", eval=[0.9, 0.1, 0.01], up=500),
        write_run("b", *known, "client.lr=0.2", eval=[0.9, 0.2, 0.05], up=50_000),
        write_run("c", *known, "client.lr=0.3", eval=[0.9, 0.3, 0.02], up=5_000),
    ]
    root = tree(write_report(read(folders), tmp_path / "out", files=False))
    said = texts(root)
    assert "Gap and traffic" in said
    assert "Best is lr 0.1: 1.00 % share of the gap left, for 0.0090 MB both ways." in said
    assert "The last round counts." in said
    curves, byte_curves = (
        [texts(text) for text in figure.findall(".//text")] for figure in root.findall(".//figure")[:2]
    )
    assert {"10 %", "100 %"} <= set(curves)
    assert "2" in curves  # rounds are whole
    assert "MB both ways (log scale)" in byte_curves


def test_the_map_of_experiences_has_a_cell_for_each_accuracy() -> None:
    axes = experiences([[0.9], [None, 0.8], [0.1, 0.0, 1.0]]).axes[0]
    cells = {(round(p.get_x() + 0.48), round(p.get_y() + 0.48)) for p in axes.patches}
    assert cells == {(1, 1), (2, 2), (1, 3), (2, 3), (3, 3)}
    assert [text.get_text() for text in axes.texts] == ["90", "80", "10", "0", "100"]
