"""A run that goes on with another number of rounds: the bits of an unbroken run, or a refusal in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import assert_same_run, lowrank

import rayfed
from rayfed.cli.verify import verify
from rayfed.config import load_config
from rayfed.errors import UserError
from rayfed.server import change_rounds

BEFORE, AFTER = "server.rounds=6", "server.rounds=10"


class Ends(rayfed.Callback):
    """Ends the run after round 3."""

    def on_round(self, record: Any) -> bool:
        return bool(record["round"] < 3)


@pytest.mark.parametrize(
    "settings",
    [
        ("method.name=fedsa",),  # tensors of single clients
        ("method.name=flora",),  # base updates
        ("server.optimizer=fedadam", "server.schedule.warmup=3", "client.schedule.warmup=8"),
        ("wire.down.density=0.5", "wire.down.decay=0.9"),
    ],
)
def test_a_finished_run_goes_on_to_the_bits_of_an_unbroken_one(
    tmp_path: Path, settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = rayfed.run(lowrank(AFTER, *settings), tmp_path / "whole")
    rayfed.run(lowrank(BEFORE, *settings), tmp_path / "run")
    result = rayfed.run(lowrank(AFTER, *settings), tmp_path / "run", resume=True)
    assert result.rounds == 10
    assert_same_run(result.out, whole.out)
    verify(str(result.out))
    assert "rounds 1 to 10" in capsys.readouterr().out


def test_a_stopped_run_gets_fewer_rounds(tmp_path: Path) -> None:
    whole = rayfed.run(lowrank(BEFORE), tmp_path / "whole")
    with rayfed.iter_rounds(lowrank(AFTER), tmp_path / "run") as rounds:
        for _ in range(6):
            next(rounds)
    assert_same_run(rayfed.run(lowrank(BEFORE), tmp_path / "run", resume=True).out, whole.out)


def test_the_last_round_runs_again_where_it_was_evaluated_as_the_last(tiny: Any, tmp_path: Path) -> None:
    """Round 4 may not be the best one, and has the metrics of a subset, in the run of 6 rounds."""
    settings = ("eval.every=3", "eval.subset=8", "eval.early_stop={patience: 3}")
    whole = rayfed.run(tiny("server.rounds=6", *settings), tmp_path / "whole")
    out = rayfed.run(tiny("server.rounds=4", *settings), tmp_path / "run").out
    shutil.copytree(out, tmp_path / "one")
    assert_same_run(rayfed.run(tiny("server.rounds=6", *settings), out, resume=True).out, whole.out)
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "round-000003")
    with pytest.raises(UserError, match=r"^server\.rounds: got 6, but round 4 in .*eval\.every=3.*model\.adapter="):
        rayfed.run(tiny("server.rounds=6", *settings), tmp_path / "one", resume=True)


@pytest.mark.parametrize(
    ("settings", "rounds", "line"),
    [
        ((), 3, r"^server\.rounds: got 3, but the run in .* has done 4 rounds$"),
        (("client.schedule.kind=cosine",), 8, r"made for 4, and client\.schedule\.kind depends on the number; start"),
        (("server.schedule.kind=linear",), 8, r"and server\.schedule\.kind depends .*model\.adapter=.*run$"),
        (("wire.down.decay=0.5", "wire.down.every=5"), 8, r"and wire\.down\.decay depends on"),
    ],
)
def test_a_number_of_rounds_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, settings: tuple[str, ...], rounds: int, line: str
) -> None:
    out = rayfed.run(lowrank(*settings), tmp_path / "run").out
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=line) as caught:
        rayfed.run(lowrank(f"server.rounds={rounds}", *settings), out, resume=True)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_that_was_ended_stays_ended(tmp_path: Path) -> None:
    out = rayfed.run(lowrank(), tmp_path / "run", callbacks=[Ends()]).out
    with pytest.raises(UserError, match=r"^server\.rounds: got 9, but the run in .* was ended after round 3, by"):
        rayfed.run(lowrank("server.rounds=9"), out, resume=True)


def test_other_settings_are_refused_as_ever(tmp_path: Path) -> None:
    out = rayfed.run(lowrank(), tmp_path / "run").out
    with pytest.raises(UserError, match=r"server\.rounds was 4 and is 9.*resume with its config\.yaml"):
        rayfed.run(lowrank("server.rounds=9", "client.lr=0.01"), out, resume=True)


@pytest.mark.parametrize("moves", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_death_while_files_are_moved_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    whole = rayfed.run(lowrank(AFTER), tmp_path / "whole")
    out = rayfed.run(lowrank(BEFORE), tmp_path / "run").out
    replace, left = change_rounds.os.replace, iter(range(moves))

    def dies(source: Path, target: Path) -> None:
        if change_rounds.STAGED in Path(source).parent.name:
            next(left)  # StopIteration where none is left
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(change_rounds.os, "replace", dies)
        with pytest.raises(RuntimeError):  # a StopIteration in a generator
            rayfed.run(lowrank(AFTER), out, resume=True)
    assert_same_run(rayfed.run(lowrank(AFTER), out, resume=True).out, whole.out)
    assert load_config(out / "config.yaml").server.rounds == 10
