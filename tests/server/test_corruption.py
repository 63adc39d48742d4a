"""A resumed run uses only files that are as they were written: others are refused, repaired or without effect."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults.corruption import corrupt
from small_runs import lowrank

import rayfed
from rayfed.cli import main
from rayfed.errors import RunError, UserError
from rayfed.server.loop import Server
from rayfed.tracking import Sink, read_metrics

EXPERIMENT = lowrank(
    "method.name=fedview", "server.rounds=6", "server.optimizer=fedavgm", "profiles.kind=tiers", "profiles.ranks=[1,2]",
    "client.steps=1",
)  # fmt: skip
NEWEST = "checkpoints/round-000004"


class Interrupt(Sink):
    """Interrupts the run after a round."""

    def __init__(self, round: int) -> None:
        self.last = round

    def round(self, record) -> None:
        if record["round"] == self.last:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run that was interrupted after round 4 of 6: two checkpoints, client state."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(KeyboardInterrupt):
        rayfed.run(EXPERIMENT, out, sink=Interrupt(4))
    return out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict]:
    return results(rayfed.run(EXPERIMENT, tmp_path_factory.mktemp("undisturbed") / "run").out)


@pytest.fixture
def run(interrupted, tmp_path) -> Path:
    """A copy of the interrupted run."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def results(out: Path) -> list[dict]:
    """Every round's record without times."""
    records = read_metrics(out / "metrics.jsonl")
    return [{key: value for key, value in record.items() if not key.startswith("time/")} for record in records]


def events(out: Path) -> str:
    return (out / "events.log").read_text(errors="replace")


def test_a_run_that_is_interrupted_has_the_checkpoint_of_its_last_finished_round(tmp_path):
    experiment = EXPERIMENT.model_copy(update={"checkpoint": EXPERIMENT.checkpoint.model_copy(update={"every": 100})})
    out, draws = tmp_path / "run", []

    class Interrupted(Server):
        """Interrupted in the middle of round 3, when the state of round 2 has been used."""

        def _round(self, t):
            record = super()._round(t)
            if t == 2:
                draws.append(t)
                raise KeyboardInterrupt
            return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayfed.engine.rounds.Server", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            rayfed.run(experiment, out)
    assert draws == [2]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["round-000002"]
    assert "--resume` continues after round 2" in events(out)
    rayfed.run(experiment, out, resume=True)
    whole = rayfed.run(experiment, tmp_path / "whole")
    assert results(out) == results(whole.out)
    assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize("name", [f"{NEWEST}/state.safetensors", f"{NEWEST}/checkpoint.json", "metrics.jsonl"])
def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_used(run, undisturbed, name):
    data = (run / name).read_bytes()
    (run / name).write_bytes(data[:-9])
    rayfed.run(EXPERIMENT, run, resume=True)
    assert results(run) == undisturbed
    assert "round-000004 is damaged" in events(run)
    assert "round-000003 is used instead" in events(run)


def test_without_a_whole_checkpoint_the_refusal_names_the_newest(run):
    for folder in (run / "checkpoints").iterdir():
        (folder / "checkpoint.json").write_text("{}")
    with pytest.raises(UserError, match=r"^--resume: .*round-000004 is damaged .*start the run anew$"):
        rayfed.run(EXPERIMENT, run, resume=True)


def test_stray_files_do_not_block_a_resume(run, undisturbed):
    (run / "checkpoints" / "round-junk").mkdir()
    (run / "checkpoints" / "round-000009").symlink_to(run / "nowhere")
    (run / "checkpoints" / "round-000008").write_text("a file")
    (run / "ledger.parquet" / "part-junk.parquet").write_text("junk")
    rayfed.run(EXPERIMENT, run, resume=True)
    assert results(run) == undisturbed


@pytest.mark.parametrize("many", [30, pytest.param(600, marks=pytest.mark.slow)])
def test_no_changed_file_changes_a_result(interrupted, undisturbed, tmp_path, many):
    outcomes, several = {"refused": 0, "repaired": 0, "without effect": 0}, []
    for seed in range(many):
        out = Path(shutil.copytree(interrupted, tmp_path / str(seed)))
        what = corrupt(out, seed)
        try:
            rayfed.run(EXPERIMENT, out, resume=True)
        except (UserError, RunError) as error:
            outcomes["refused"] += 1
            several += ["\n" in str(error)]
            continue
        assert results(out) == undisturbed, (seed, what)
        repaired = (out / "events.log").is_file() and "is used instead" in events(out)
        outcomes["repaired" if repaired else "without effect"] += 1
        shutil.rmtree(out)
    print(outcomes)
    assert all(outcomes.values())
    assert not any(several)


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("config.yaml", "seed: 0", "seed: 1", "other settings|state/chain"),
        ("metrics.jsonl", '"state/digest": "', '"state/digest": "0', "state/chain"),
        ("metrics.jsonl", '"bytes/up": 1', '"bytes/up": 2', "bytes up"),
        ("metrics.jsonl", '"train/loss": ', '"train/loss": 1', "metrics.jsonl"),
    ],
)
def test_verify_sees_what_was_changed(run, capsys, name, old, new, said):
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.startswith("rounds 1 to 4 and 2 checkpoints are as they were written: chain ")
    text = (run / name).read_text()
    assert old in text
    (run / name).write_text(text.replace(old, new, 1))
    assert main(["verify", str(run)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert any(part in line for part in said.split("|"))


def test_verify_refuses_what_is_no_run(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no config.yaml" in capsys.readouterr().err
