"""`rayfed report` and `rayfed compare`: what they write and print, and refusals of one line."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rayfed
from rayfed.cli import main
from rayfed.config import dump_config

Capture = pytest.CaptureFixture[str]
SENT = '"bytes/down": 600, "bytes/up": 400, "bytes/total": 1000'
LINE = '{"round": 1, "eval/accuracy": %s, "test/accuracy": 0.4, ' + SENT + "}\n"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """As little as a run directory can be: settings and one round."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: bare\nserver: {rounds: 1}\n")
    (folder / "metrics.jsonl").write_text(LINE % 0.5)
    return folder


def refused(capsys: Capture, *arguments: str | Path) -> str:
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rayfed: ")
    assert err.count("\n") == 1
    return err.removeprefix("rayfed: ").rstrip("\n")


def test_a_report_of_one_run_lies_in_its_directory(bare: Path, capsys: Capture) -> None:
    assert main(["report", str(bare)]) == 0
    assert capsys.readouterr().out == f"page {bare / 'report.html'}, figures {bare / 'figures'}\n"
    assert (bare / "report.html").is_file()
    assert (bare / "figures" / "rounds.svg").is_file()
    assert (bare / "figures" / "rounds.png").is_file()
    assert main(["report", str(bare)]) == 0  # a second one replaces it


def test_a_report_of_several_goes_where_it_is_told(
    bare: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in bare.iterdir():
        (other / file.name).write_text(file.read_text().replace("name: bare", "client: {lr: 0.5}"))
    monkeypatch.chdir(tmp_path)
    assert main(["report", "bare", "other", "--target", "0.45"]) == 0
    assert (tmp_path / "report" / "report.html").is_file()
    assert "MB to 45.0" in (tmp_path / "report" / "report.html").read_text()
    assert main(["report", "bare", "other", "--out", "x/y"]) == 0
    assert (tmp_path / "x" / "y" / "report.html").is_file()
    capsys.readouterr()
    said = refused(capsys, "report", "bare", "--out", "bare/config.yaml")
    assert said == "--out: got 'bare/config.yaml', but bare/config.yaml is a file"


def test_compare_prints_the_table(bare: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # a pipe whose width nothing limits
    assert main(["compare", str(bare), "--target", "0.45"]) == 0
    out = capsys.readouterr().out
    heads, row = ([cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in out.splitlines()[2:5:2])
    assert dict(zip(heads, row, strict=True)) == {
        "": "bare",
        "rounds": "1",
        "validation accuracy": "50.0 %",
        "test accuracy": "40.0 %",
        "best round": "1",
        "test accuracy, best round": "40.0 %",
        "MB down": "0.0006",
        "MB up": "0.0004",
        "MB both ways": "0.0010",
        "MB to 45.0 %": "0.0010",
        "target round": "1",
    }


NAMES = (
    "flasc-quarter-density-rank-64-cosine", "fedhl-mixed-ranks-4-16-64-gamma-2", "fedview-correction-floored-mixed",
    "flexlora-products-redistributed-by-svd",
)  # fmt: skip


def test_compare_fits_a_terminal_of_80_columns(
    bare: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four runs of two seeds with long names: names fold between words, numbers stay whole, details are left out."""
    for name in NAMES:
        for seed in (0, 1):
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            (folder / "config.yaml").write_text(f"name: {name}\nseed: {seed}\nserver: {{rounds: 1}}\n")
            (folder / "metrics.jsonl").write_text(LINE % (0.5 + 0.01 * seed))
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compare", *(str(tmp_path / f"{name}-{seed}") for name in NAMES for seed in (0, 1))]) == 0
    lines = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert "".join(row[0] for row in rows) == "".join(sorted(NAMES, key=NAMES.index))
    assert [row[2] for row in rows if row[2]] == ["50.5 ± 0.7 %"] * 4
    heads = " ".join(" ".join(cells) for cells in zip(*(line.split("┃")[1:-1] for line in lines if line[0] == "┃")))
    assert heads.split() == [
        "seeds",
        "validation",
        "accuracy",
        "test",
        "accuracy",
        "MB",
        "both",
        "ways",
        "MB",
        "to",
        "48.0",
        "%",
    ]


def test_comparing_needs_no_torch_no_ray_and_no_matplotlib(bare: Path) -> None:
    program = f"""
import sys
from rayfed.cli import main
assert main(["compare", {str(bare)!r}]) == 0
print("loaded:", *(name for name in ("torch", "ray", "transformers", "matplotlib", "wandb") if name in sys.modules))
assert main(["report", {str(bare)!r}]) == 0
print("loaded:", *(name for name in ("torch", "ray", "transformers", "wandb") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines() if line.startswith("loaded:")] == [["loaded:"]] * 2


@pytest.mark.parametrize("command", ["report", "compare"])
def test_what_is_no_run_is_refused_in_one_line(command: str, bare: Path, tmp_path: Path, capsys: Capture) -> None:
    gone = tmp_path / "gone"
    assert refused(capsys, command, gone) == f"DIR: got '{gone}', but there is no such folder"
    assert refused(capsys, command, bare / "config.yaml").endswith("but there is no such folder")
    (tmp_path / "empty").mkdir()
    assert refused(capsys, command, bare, tmp_path / "empty") == (
        f"DIR: got '{tmp_path / 'empty'}', but it is neither a run directory (no metrics.jsonl) nor a sweep's "
        "(no trials/)"
    )
    (tmp_path / "sweep" / "trials" / "a").mkdir(parents=True)
    assert refused(capsys, command, tmp_path / "sweep").endswith("but no trial of that sweep has a round yet")


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_run_with_nothing_to_read_is_refused_in_one_line(command: str, bare: Path, capsys: Capture) -> None:
    (bare / "metrics.jsonl").write_text(LINE % "null" if command == "report" else LINE.replace("0.4", "null") % "null")
    if command == "compare":
        assert refused(capsys, command, bare) == f"DIR: got '{bare}', but that run has not been evaluated yet"
    (bare / "metrics.jsonl").write_text('{"round": 1, "eval/accuracy": 0.5}\n')
    assert refused(capsys, command, bare) == f"{bare / 'metrics.jsonl'}: round 1 has no bytes/down"
    (bare / "metrics.jsonl").write_text("")
    assert refused(capsys, command, bare) == f"DIR: got '{bare}', but that run has no round yet"
    (bare / "metrics.jsonl").unlink()
    assert refused(capsys, command, bare) == f"DIR: got '{bare}', but that run has no round yet"
    (bare / "metrics.jsonl").write_text(LINE % 0.5)
    (bare / "config.yaml").unlink()
    assert refused(capsys, command, bare).endswith("but it has no config.yaml, so its settings are unknown")


def test_wrong_options_are_refused_in_one_line(bare: Path, capsys: Capture) -> None:
    assert refused(capsys, "report", bare, "--target", "80").startswith("--target: got 80, but it should be a share")
    assert refused(capsys, "compare", bare, "--target", "much").startswith("--target: got 'much', but it should be")
    assert refused(capsys, "report", bare, "--link", "fast").startswith("--link: got 'fast', but it should be UP,DOWN")


def test_report_without_matplotlib_is_refused_in_one_line(
    bare: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused(capsys, "report", bare) == (
        "matplotlib: not installed, and figures need it; pip install -e '.[report]'"
    )
    assert main(["compare", str(bare)]) == 0


@pytest.mark.parametrize("case", ["there", "missing", "broken"])
def test_a_finished_run_gets_its_page(
    case: str,
    tiny: Callable[..., rayfed.Experiment],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(dump_config(tiny("server.rounds=1")))
    if case == "missing":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    if case == "broken":
        monkeypatch.setattr("rayfed.reports.figures.plots", lambda *_: 1 / 0)
    assert main(["run", str(config), "--out", str(out)]) == 0
    last = (out / "events.log").read_text().splitlines()[-1].split(" ", 1)[1]
    assert (out / "report.html").exists() == (case == "there")
    assert not (out / "figures").exists()
    assert capsys.readouterr().err == ""
    if case == "there":
        assert last.startswith("finish: ")
    elif case == "missing":
        assert last == "no report.html: matplotlib is not installed (pip install -e '.[report]' in a clone)"
    else:
        assert last == "no report.html: ZeroDivisionError: division by zero"
