"""What a shell gets when it asks for completions, as Click's own scripts ask."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rayfed.cli import COMPLETE, main
from rayfed.cli.commands import program
from rayfed.config.shipped import shipped
from rayfed.methods import METHODS

Capture = pytest.CaptureFixture[str]


def completed(capsys: Capture, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """What bash suggests for the last of these words, each as `type,value`."""
    monkeypatch.setenv(COMPLETE, "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "\n".join(["rayfed", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    monkeypatch.setattr(sys, "argv", ["rayfed"])
    assert main() == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([""], [f"plain,{name}" for name in program.commands]),
        (["swe"], ["plain,sweep"]),
        (["run", "--r"], ["plain,--resume"]),
        (["run", "quick"], ["plain,quickstart"]),
        (["run", "configs/q"], ["file,configs/q"]),
        (["init", ""], [f"plain,{name}" for name in shipped()]),
        (["run", "quickstart", "server.ro"], ["plain,server.rounds="]),
        (["run", "quickstart", "--resume", "lora.al"], ["plain,lora.alpha="]),
        (["run", "quickstart", "sweep."], []),
        (["sweep", "lowrank", "sweep.metr"], ["plain,sweep.metric="]),
        (["run", "quickstart", "--out", "ru"], ["dir,ru"]),
        (["verify", "runs/"], ["dir,runs/"]),
        (["methods", ""], [f"plain,{name}" for name in METHODS]),
        (
            ["settings", "wire.u"],
            ["plain,wire.up", *(f"plain,wire.up.{k}" for k in ["density", "decay", "every", "values"])],
        ),
        (["bench", "al"], ["plain,algebra"]),
        (["fly", ""], [f"plain,{name}" for name in program.commands]),
    ],
    ids=" ".join,
)
def test_the_words_that_a_command_takes_are_suggested(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, words: list[str], found: list[str]
) -> None:
    assert completed(capsys, monkeypatch, *words) == found


def test_bash_completes_a_setting_without_a_space_behind_it(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPLETE, "bash_source")
    assert main() == 0
    script = capsys.readouterr().out
    assert "== *= ]] && compopt -o nospace\n    return 0" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


def test_suggestions_load_no_torch(tmp_path: Path) -> None:
    words = {"init": "", "run": "quick", "methods": "", "settings": "wire"}
    program = f"""
import os, sys
from rayfed.cli import main
for command, word in {words}.items():
    os.environ |= {{"{COMPLETE}": "bash_complete", "COMP_WORDS": f"rayfed\\n{{command}}\\n{{word}}", "COMP_CWORD": "2"}}
    main()
assert not {{"torch", "ray"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "plain,fedhl" in done.stdout
