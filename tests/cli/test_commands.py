"""The commands that only print, bad usage, and how errors become lines and exit codes."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rayfed
from rayfed.cli import main
from rayfed.config import Experiment
from rayfed.config.describe import iter_fields
from rayfed.errors import RunError, Terminated, UserError
from rayfed.methods import METHODS, method_class
from rayfed.weighting import WEIGHTINGS

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def printed(capsys: Capture, *arguments: str) -> str:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_methods_lists_every_method_with_its_paper(capsys: Capture) -> None:
    out = printed(capsys, "methods")
    for name in METHODS:
        (line,) = [line for line in out.splitlines() if line.startswith(f"{name} ")]
        assert method_class(name).paper in line
        assert method_class(name).summary in line


def test_methods_explains_one_method_with_its_options(capsys: Capture) -> None:
    out = printed(capsys, "methods", "flasc")
    assert out.startswith("flasc: ")
    assert "method.mask = " in out
    assert main(["methods", "flask"]) == 2
    assert capsys.readouterr().err.startswith("rayfed: method.name: got 'flask', but did you mean flasc? ")


def test_settings_lists_every_setting_with_its_default_and_limits(capsys: Capture) -> None:
    lines = printed(capsys, "settings").splitlines()
    assert [line.split(" = ")[0] for line in lines if not line.startswith(" ")] == [
        name for name, _ in iter_fields(Experiment)
    ]
    assert "wire.up.density = 1.0  [a number in (0, 1]]" in lines
    assert "client.betas = [0.9, 0.999]  [a list of 2 numbers in [0, 1)]" in lines
    assert "model.normalize = true  [true or false]" in lines
    assert "data.path = null  [a string (up to 1000 bytes) or null]" in lines
    assert "eval.early_stop.patience = (no default)  [an integer in [1, 999999]]" in lines
    assert "    Learning rate." in lines
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("section", "first", "count"),
    [("client", "client.optimizer = sgd", 17), ("wire.up", "wire.up.density = 1.0", 4), ("seed", "seed = 0", 1)],
)
def test_settings_of_one_section(capsys: Capture, section: str, first: str, count: int) -> None:
    keys = [line for line in printed(capsys, "settings", section).splitlines() if not line.startswith(" ")]
    assert keys[0].startswith(first)
    assert len(keys) == count
    assert all(key.startswith(section) for key in keys)


def test_settings_of_the_weightings(capsys: Capture) -> None:
    lines = printed(capsys, "settings", "weighting").splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("server.")] == [
        f"server.weights={name}" for name in WEIGHTINGS
    ]
    assert "weighting.eps = 0.1  [a number in [0, 1]]" in lines
    assert "    How far a weight may be from the client's share of the examples." in lines


@pytest.mark.parametrize(
    ("section", "hint"),
    [("clint", "did you mean client? "), ("wire.up.densty", "did you mean wire.up.density? "), ("xyz", "")],
)
def test_settings_of_an_unknown_section(capsys: Capture, section: str, hint: str) -> None:
    assert main(["settings", section]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"rayfed: settings: got '{section}', but {hint}sections are name, seed, data, ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["fly"], "COMMAND: got 'fly', but allowed are init, run, sweep, "),
        (["swep"], "COMMAND: got 'swep', but did you mean sweep? allowed are "),
        (["--fly"], "no such option '--fly'; see `rayfed --help`"),
        (["run"], "missing argument 'CONFIG'; see `rayfed run --help`"),
        (["run", "c.yaml", "--fly"], "no such option '--fly'; see `rayfed run --help`"),
        (
            ["run", "lowrank", "--out", "x", "word"],
            "override: got 'word', but an override is written key=value, such as ",
        ),
        (["run", "c.yaml", "--rsume"], "no such option '--rsume'; did you mean --resume? see `rayfed run --help`"),
        (["run", "c.yaml", "--out"], "option '--out' requires an argument; see `rayfed run --help`"),
        (["methods", "flasc", "a=1"], "got unexpected extra argument (a=1); see `rayfed methods --help`"),
        (["ftp://me:secret@host/x"], "COMMAND: got 'ftp://***@host/x', but "),
    ],
)
def test_bad_usage_exits_with_2(capsys: Capture, arguments: list[str], hint: str) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rayfed: ")
    assert err.count("\n") == 1
    assert hint in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--version"], f"rayfed {rayfed.__version__}\n"),
        (["--help"], "COMMAND"),
        ([], "run one experiment"),
        (["run", "--help"], "key=value"),
    ],
)
def test_help_and_version(capsys: Capture, arguments: list[str], words: str) -> None:
    assert words in printed(capsys, *arguments)


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UserError("a: wrong\nb: wrong"), 2, ["rayfed: a: wrong", "rayfed: b: wrong"]),
        (RunError("the cluster is gone"), 1, ["rayfed: the cluster is gone"]),
        (KeyboardInterrupt(), 1, ["rayfed: interrupted; `--resume` with the same --out continues"]),
        (Terminated(), 1, ["rayfed: terminated; `--resume` with the same --out continues"]),
        (UserError("config: got 'ftp:/me:key@host/x', but"), 2, ["rayfed: config: got 'ftp:/***@host/x', but"]),
    ],
)
def test_errors_become_lines_and_exit_codes(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, lines: list[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("rayfed.cli.settings.describe", fail)
    assert main(["settings"]) == code
    assert capsys.readouterr().err.splitlines() == lines


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("rayfed.cli.settings.describe", fail)
    with pytest.raises(ZeroDivisionError):
        main(["settings"])


def test_a_process_starts_without_torch_and_ends_quietly_when_its_output_is_closed() -> None:
    script = "import sys\nfrom rayfed.cli import main\ncode = main(['settings'])\n"
    script += "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)\nsys.exit(code)"
    full = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (full.returncode, full.stderr) == (0, "")
    with subprocess.Popen(
        [sys.executable, "-m", "rayfed", "settings"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()  # as `head` does
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


def test_the_installed_command_is_main() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"rayfed": "rayfed.cli:main"}
