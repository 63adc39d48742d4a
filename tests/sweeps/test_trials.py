"""What a trial's process does, without Ray: continue from Tune's checkpoints, and tell every round once."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune
from small_runs import lowrank

import rayfed
from rayfed.api.continuation import last_round, run_trial, schedule, snapshot
from rayfed.config import Experiment, load_config
from rayfed.config.marks import data_key
from rayfed.errors import UserError
from rayfed.server.chain import continued_after, verify
from rayfed.sweeps import on_tune
from rayfed.sweeps.on_tune import load_federation, make_trainable
from rayfed.sweeps.plan import FAILED
from rayfed.tracking import read_metrics


def settings(*overrides: str) -> Experiment:
    return lowrank("server.rounds=6", "server.optimizer=adamw", "server.lr=0.01", *overrides)


def run(folder: Path, experiment: Experiment, given: Path | None = None, stop: int | None = None) -> list[int]:
    """The rounds that Tune is told. ``stop``: Tune stops the trial after that round."""
    checkpoint = tune.Checkpoint.from_directory(str(given)).as_directory() if given else None
    told = []
    with closing(run_trial(experiment, folder, load_federation(experiment, {}), checkpoint)) as rounds:
        for record in rounds:
            told.append(int(str(record["round"])))
            if record["round"] == stop:
                break
    return told


def checkpoint_of(folder: Path, at: Path) -> Path:
    """What Tune stores of the run directory."""
    with snapshot(folder) as copy:
        return Path(shutil.copytree(copy, at))


def digests(folder: Path) -> list[str]:
    return [record["state/digest"] for record in read_metrics(folder / "metrics.jsonl")]


def verified(folder: Path) -> str:
    """What `rayfed verify` says of the run directory."""
    return verify(folder, load_config(folder / "config.yaml").digest(), continued_after(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The digests of the unbroken run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    rayfed.run(settings(), folder)
    return digests(folder)


def test_the_last_record_comes_after_the_end_of_the_run(tmp_path: Path, whole: list[str]) -> None:
    for record in run_trial(settings(), tmp_path, load_federation(settings(), {})):
        assert (tmp_path / "summary.json").is_file() == (record["round"] == 6)
    assert digests(tmp_path) == whole
    assert run(tmp_path, settings()) == [1, 2, 3, 4, 5, 6]  # told again where Tune knows nothing; nothing runs


def test_a_trial_continues_from_its_run_directory(tmp_path: Path, whole: list[str]) -> None:
    assert run(tmp_path, settings("checkpoint.every=2"), stop=3) == [1, 2, 3]
    shutil.rmtree(tmp_path / "checkpoints" / "round-000003")  # as if the process had been killed
    assert run(tmp_path, settings("checkpoint.every=2")) == [1, 2, 3, 4, 5, 6]
    assert digests(tmp_path) == whole


def test_a_paused_trial_continues_from_its_checkpoint(tmp_path: Path, whole: list[str]) -> None:
    """Tune may know less than the run directory: what is newer goes, and Tune is told these rounds again."""
    folder = tmp_path / "run"
    run(folder, settings(), stop=3)
    given = checkpoint_of(folder, tmp_path / "given")
    run(folder, settings(), stop=4)
    (folder / "notes.txt").write_text("mine")
    assert run(folder, settings(), given) == [4, 5, 6]
    assert digests(folder) == whole
    assert (folder / "notes.txt").is_file()  # the same directory
    assert run(tmp_path / "elsewhere", settings(), given) == [4, 5, 6]
    assert digests(tmp_path / "elsewhere") == whole
    assert not (folder / "continues.json").exists()
    assert verified(tmp_path / "elsewhere").startswith("rounds 1 to 6 and ")


def test_a_trial_continues_another_one_with_other_settings(tmp_path: Path, whole: list[str]) -> None:
    better, worse = settings("name=m1"), settings("name=m2", "client.lr=0.01")
    run(tmp_path / "m1", better, stop=2)
    run(tmp_path / "m2", worse, stop=3)
    given = checkpoint_of(tmp_path / "m1", tmp_path / "given")
    changed = settings("name=m2", "client.lr=0.06")
    assert run(tmp_path / "m2", changed, given, stop=4) == [3, 4]
    assert digests(tmp_path / "m2")[:2] == whole[:2]
    assert digests(tmp_path / "m2")[2] != whole[2]
    note = json.loads((tmp_path / "m2" / "continues.json").read_text())
    assert (note["trial"], note["round"], note["before"]) == ("m1", 2, {"client.lr": 0.05})
    assert verified(tmp_path / "m2").startswith("rounds 3 to 4 and 2 checkpoints are as they were written")

    # The first member copies the second one: the note has both steps.
    given = checkpoint_of(tmp_path / "m2", tmp_path / "second")
    assert run(tmp_path / "m1", settings("name=m1", "client.lr=0.07"), given) == [5, 6]
    note = json.loads((tmp_path / "m1" / "continues.json").read_text())
    assert (note["trial"], note["round"], note["before"]) == ("m2", 4, {"client.lr": 0.06})
    assert note["earlier"]["trial"] == "m1"
    assert schedule(tmp_path / "m1", settings("client.lr=0.07", "name=m1"), ["client.lr"]) == [
        {"rounds": [1, 2], "trial": "m1", "client.lr": 0.05},
        {"rounds": [3, 4], "trial": "m2", "client.lr": 0.06},
        {"rounds": [5, 6], "trial": "m1", "client.lr": 0.07},
    ]
    assert [record["round"] for record in read_metrics(tmp_path / "m1" / "metrics.jsonl")] == list(range(1, 7))


def test_what_may_not_change(tmp_path: Path) -> None:
    run(tmp_path / "m1", settings(), stop=2)
    given = checkpoint_of(tmp_path / "m1", tmp_path / "given")
    with pytest.raises(
        UserError, match=r"^seed: was 0 and is 1, but a trial that continues from a checkpoint may chang"
    ):
        run(tmp_path / "m2", settings("seed=1"), given)


def test_a_checkpoint_has_what_a_run_needs_and_no_more(tmp_path: Path) -> None:
    run(tmp_path / "run", settings("checkpoint.keep=3"), stop=4)
    given = checkpoint_of(tmp_path / "run", tmp_path / "given")
    assert {path.name for path in given.iterdir()} == {"config.yaml", "metrics.jsonl", "ledger.parquet", "checkpoints"}
    assert [path.name for path in (given / "checkpoints").iterdir()] == ["round-000004"]
    assert last_round(given) == 4
    assert not [path for path in (tmp_path / "run").iterdir() if "snapshot" in path.name]


def test_trials_of_a_process_share_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_federation(settings(), {})
    assert load_federation(settings("client.lr=0.01", "server.rounds=3"), {}) is first
    other = load_federation(settings("seed=1"), {})
    assert other is not first
    monkeypatch.setattr("ray.get", lambda shared: shared)
    key = data_key(settings().model_dump(mode="json"))
    shared: Any = {key: first}
    assert load_federation(settings(), shared) is first  # from Ray's object store


def test_what_the_process_of_a_sweeps_trial_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round; of a trial that fails the reason."""
    records: list[Any] = []
    monkeypatch.setattr(on_tune, "report", lambda record, folder, pauses: records.append(record))
    monkeypatch.setattr(tune, "get_context", lambda: SimpleNamespace(get_trial_name=lambda: "a"))
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)
    given = settings().model_dump(mode="json", exclude_unset=True)
    train = make_trainable(given, {}, tmp_path)
    train({"client.lr": 0.03})
    assert [record["round"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert load_config(tmp_path / "a" / "config.yaml").name == "a"
    records.clear()
    train({"client.lr": -1})
    assert records == [{FAILED: "client.lr: got -1, but it should be a number in [1e-30, 1e+30]"}]
    monkeypatch.setattr(on_tune, "_own_folder", lambda: tmp_path / "b")
    with pytest.raises(UserError, match=r"^client.lr: got -1"):
        make_trainable(given, {})({"client.lr": -1})
