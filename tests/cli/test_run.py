"""`rayfed run`: a refusal is one line before anything starts or is written; a run leaves its directory."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import rayfed
from rayfed.cli import main
from rayfed.config import dump_config

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(tiny: Callable[..., rayfed.Experiment], tmp_path: Path) -> Path:
    """The tiny federation as a file, on Ray: a refusal that came too late would start Ray."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny("engine.kind=ray")))
    return path


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import of Ray, or of a module that needs Ray, fails."""
    for module in ("ray", "rayfed.engine.driver", "rayfed.engine.ray_executor"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture
def refused(no_ray: None, tmp_path: Path, capsys: Capture) -> Callable[..., str]:
    """Runs `rayfed run` with the arguments and returns its one line. Nothing may have been started or written."""

    def refused(*arguments: str | Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["run", *map(str, arguments)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("rayfed: ")
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("rayfed: ").strip()

    return refused


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("client.bach_size=3", "client.bach_size: unknown key; did you mean client.batch_size?"),
        ("wire.down.density=1.5", "wire.down.density: got 1.5, but it should be a number in (0, 1]"),
        ("method.name=flask", "method.name: got 'flask', but did you mean flasc? allowed are "),
        ("method.mask=soft", "method.mask: got 'soft', but it should be refresh or fixed"),
        ("data.path={tmp}/gone", "data.path: got '{tmp}/gone', but there is no such file or folder"),
        ("partition.clients=100 partition.alpha=0.01 server.cohort=100", "server.cohort: got 100, but only "),
        ("model.name={tmp}/gone", "model.name: got '{tmp}/gone', but it cannot be loaded: "),
        ("lora.rank=33", "lora.rank: got 33, but encoder."),
    ],
)
def test_wrong_settings_are_one_line(
    refused: Callable[..., str], config: Path, tmp_path: Path, overrides: str, line: str
) -> None:
    words = overrides.format(tmp=tmp_path).split()
    assert refused(config, *words, "--out", tmp_path / "out").startswith(line.format(tmp=tmp_path))


def test_a_wrong_row_is_one_line(refused: Callable[..., str], config: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in (1.5, 2.5)))
    line = f"data.label: got 1.5 in {path}, column 'label', row 1, but labels are integers or strings"
    assert refused(config, f"data.path={path}", "--out", tmp_path / "out").startswith(line)


def test_a_missing_config_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    gone = tmp_path / "gone.yaml"
    assert refused(gone, "--out", tmp_path / "out") == f"config: got {str(gone)!r}, but there is no such file"


def test_resume_needs_a_directory(refused: Callable[..., str], config: Path) -> None:
    assert refused(config, "--resume") == "--resume: needs --out, the directory to continue"


def test_the_directory_must_be_free(refused: Callable[..., str], config: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    assert refused(config, "--out", tmp_path / "used") == (
        f"--out: got {str(tmp_path / 'used')!r}, but it is not empty; continue it with --resume or name another"
    )
    assert refused(config, "--out", tmp_path / "used" / "notes.txt").endswith("notes.txt is a file")


def test_the_directory_cannot_lie_in_a_file(refused: Callable[..., str], config: Path) -> None:
    assert refused(config, "--out", config / "out").startswith(f"--out: got {str(config / 'out')!r}, but")


def test_every_mistake_of_a_config_has_its_line(no_ray: None, config: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["run", str(config), "seed=x", "client.lr=0", "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line[: line.index(": got")] for line in err.splitlines()] == ["rayfed: seed", "rayfed: client.lr"]
    assert not (tmp_path / "out").exists()


def test_as_a_process_a_refusal_is_one_line_too(config: Path, tmp_path: Path) -> None:
    # What libraries print or log by themselves shows only here.
    command = [sys.executable, "-m", "rayfed", "run", config, "lora.target_modules=[qurey]", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("rayfed: lora.target_modules: got ['qurey'], but it matches no layer; ")
    assert done.stderr.count("\n") == 1
    assert re.fullmatch(r"settings [0-9a-f]{16}\n", done.stdout)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "template", ["{a} {b} {flags}", "{flags} {a} {b}", "{a} {flags} {b}", "{a} --resume {b} {out}"]
)
def test_overrides_may_precede_and_follow_flags(
    no_ray: None, config: Path, tmp_path: Path, capsys: Capture, template: str
) -> None:
    # The refusal shows that both were read: each is fine alone.
    out = f"--out {tmp_path / 'out'}"
    words = template.format(a="server.cohort=9", b="partition.clients=8", flags=f"{out} --resume", out=out)
    assert main(["run", str(config), *words.split()]) == 2
    assert "server.cohort: got 9, but the population has only 8 clients" in capsys.readouterr().err


@dataclass(frozen=True)
class Finished:
    config: Path
    out: Path
    code: int
    stdout: str


@pytest.fixture(scope="module")
def finished(tiny: Callable[..., rayfed.Experiment], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.yaml").write_text(dump_config(tiny()))
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        code = main(["run", str(folder / "config.yaml"), "server.rounds=1", "--out", str(folder / "out")])
    return Finished(folder / "config.yaml", folder / "out", code, stdout.getvalue())


def test_a_run_prints_its_settings_digest_and_its_directory(finished: Finished) -> None:
    assert finished.code == 0
    digest = rayfed.load_config(finished.config, ["server.rounds=1"]).digest()
    lines = finished.stdout.splitlines()
    assert lines[0] == f"settings {digest}"
    assert lines[-1] == f"run directory {finished.out}"


def test_a_run_leaves_its_directory(finished: Finished) -> None:
    assert sorted(path.name for path in finished.out.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "events.log",
        "ledger.parquet",
        "metrics.jsonl",
        "partition.json",
        "report.html",
        "summary.json",
    ]
    assert [path.name for path in (finished.out / "checkpoints").iterdir()] == ["round-000001"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in (finished.out / "adapter").iterdir()
    }
    (record,) = [json.loads(line) for line in (finished.out / "metrics.jsonl").read_text().splitlines()]
    assert record["round"] == 1


def test_the_config_of_a_run_is_resolved_and_reads_back(finished: Finished) -> None:
    path = finished.out / "config.yaml"
    assert rayfed.load_config(path) == rayfed.load_config(finished.config, ["server.rounds=1"])
    assert yaml.safe_load(path.read_text())["client"]["momentum"] == 0.9  # defaults are spelled out


def test_a_finished_run_is_not_written_over(finished: Finished, no_ray: None, capsys: Capture) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")}
    for overrides, line in (
        (["server.rounds=1"], f"rayfed: --out: got {str(finished.out)!r}, but it is not empty; "),
        (["server.rounds=2", "seed=5", "--resume"], "rayfed: --resume: "),
        (["server.rounds=1", "lora.alpha=9", "--resume"], "rayfed: --resume: "),
    ):
        assert main(["run", str(finished.config), *overrides, "--out", str(finished.out)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(line)
        assert err.count("\n") == 1
    assert "was made with other settings (digest " in err
    assert "): lora.alpha was 8.0 and is 9.0; resume with its config.yaml" in err
    assert {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")} == before
