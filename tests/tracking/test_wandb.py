"""W&B: how a run is tracked, that an offline run has everything, and that no error of W&B reaches the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from wandb_files import runs

from rayfed.config.execution import Tracking
from rayfed.errors import UserError
from rayfed.files import write_json
from rayfed.tracking import Record, RunInfo, SinkList, Table, open_sinks, wandb_sink
from rayfed.tracking import wandb_login as login
from rayfed.tracking.jsonl import JsonlSink
from rayfed.tracking.wandb_login import wandb_mode
from rayfed.tracking.wandb_sink import WandbSink

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def _no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")


def info(out: Path, start: int = 0, digest: str = "0123456789abcdef") -> RunInfo:
    wire = {"down": {"density": 0.25}, "up": {"density": 0.5}}
    config = {"seed": 3, "wire": wire, "method": {"name": "flasc"}, "lora": {"rank": 8}}
    return RunInfo("quickstart", out, digest, config, rounds=5, start=start, facts={"population": 350})


def record(number: int) -> Record:
    return {
        "round": number,
        "train/loss": 1 / number,
        "eval/accuracy": number / 10 if number % 2 else None,
        "bytes/total": 1000 * number,
        "clients/odd": 2,
        "test/recall": [0.5, 0.25],
        "test/confusion_matrix": [[number, 0], [1, 2]],
        "test/accuracy_per_client": [number / 10, None, 0.5] if number % 2 else None,
        "state/digest": f"{number:08x}",
    }


TABLE = Table(
    "results", ("model", "accuracy"), (("dense", "50.0 %"), ("masked", "")), values=(("dense", 0.5), ("masked", None))
)


# How a run is tracked


@pytest.mark.parametrize(
    ("setting", "environment", "mode"),
    [
        ("off", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, "off"),
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": ""}, "offline"),
        ("auto", {"WANDB_IDENTITY_TOKEN_FILE": "/token"}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "off"),
        ("online", {"WANDB_MODE": "disabled"}, "off"),
        ("online", {"WANDB_MODE": "offline"}, "offline"),
        ("online", {}, "online"),
        ("offline", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, "offline"),
    ],
)
def test_mode(monkeypatch: pytest.MonkeyPatch, setting: Any, environment: dict[str, str], mode: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(Tracking(wandb=setting)) == mode


@pytest.mark.parametrize(
    ("file", "text", "mode"),
    [
        (".netrc", f"machine api.wandb.ai\n  login user\n  password {KEY}\n", "online"),
        ("_netrc", f"machine api.wandb.ai\n  login user\n  password {KEY}\n", "online"),
        (".netrc", f"machine github.com\n  login user\n  password {KEY}\n", "offline"),
        (".netrc", "machine api.wandb.ai broken", "offline"),
        (".config/wandb/settings", f"[default]\napi_key = {KEY}\n", "online"),
        (".config/wandb/settings", "no section", "offline"),
        ("wandb/settings", "[default]\nmode = disabled\n", "off"),
        ("wandb/settings", f"[default]\nmode = offline\napi_key = {KEY}\n", "offline"),
    ],
)
def test_mode_from_files(tmp_path: Path, file: str, text: str, mode: str) -> None:
    path = tmp_path / "home" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)
    assert wandb_mode(Tracking()) == mode


def test_a_login_to_another_server_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "keys"
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_mode(Tracking()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert wandb_mode(Tracking()) == "offline"
    netrc.write_text(f"machine wandb.example.org:8080 login user password {KEY}\n")
    assert wandb_mode(Tracking()) == "online"


def test_without_the_package_auto_is_off_and_offline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "find_spec", lambda name: None)
    assert wandb_mode(Tracking()) == "off"
    with pytest.raises(UserError, match=r"tracking\.wandb: got 'offline'"):
        wandb_mode(Tracking(wandb="offline"))


# An offline run, read back


def rows(first: int, last: int) -> list[dict[str, Any]]:
    """What the history must contain: the scalars of every record, at the step of its round."""

    def logged(number: int) -> dict[str, Any]:
        return {k: v for k, v in record(number).items() if v is not None and not isinstance(v, list)}

    return [logged(number) | {"_step": number} for number in range(first, last + 1)]


def helpers() -> list[str]:
    return [child.name() for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]


def play(out: Path, first: int, last: int, done: bool = True) -> list[str]:
    """Runs the sink in a thread, as an actor would; returns its messages."""
    said: list[str] = []
    settings = Tracking(wandb="offline", project="p", group="g", tags=("a", "b"))

    def body() -> None:
        sink = SinkList(JsonlSink(out / "metrics.jsonl"), WandbSink(settings, "offline", notify=said.append))
        sink.start(info(out, start=first - 1))
        assert helpers(), "no helper process: then this test could not see one stay either"
        for number in range(first, last + 1):
            sink.round(record(number))
        sink.event("ignored")
        if done:
            sink.finish({"test/accuracy": 0.5, "probe": None, "recall": [0.5]}, TABLE)
        sink.close()
        sink.close()

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return said


def test_offline_run_holds_everything_and_leaves_no_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    grid = {"clients": ["ann", "bob"], "classes": ["a", "c"], "columns_of": 2, "counts": [[3, 0], [1, 2]]}
    write_json(out / "partition.json", {"heat_map": grid})
    said = play(out, 1, 5)
    assert helpers() == []
    assert "WANDB_SERVICE" not in os.environ
    assert capfd.readouterr() == ("", "")
    (run,) = runs(out)
    assert run["history"] == rows(1, 5)
    name = "quickstart flasc rank 8 density 0.25 / 0.5 seed 3"
    assert (run["project"], run["group"], run["name"], run["tags"]) == ("p", "g", name, ["a", "b"])
    assert run["job_type"] == "train"
    assert run["config"]["seed"] == 3
    assert run["config"]["wire"] == info(out).config["wire"]
    assert run["config"]["facts"] == {"population": 350}
    assert run["config"]["digest"] == "0123456789abcdef"
    assert run["summary"]["test/accuracy"] == 0.5
    assert {"probe", "recall", "test/recall"}.isdisjoint(run["summary"])
    tables = {}
    for key in ("table", "confusion", "clients", "partition"):
        (file,) = (out / "wandb").glob(f"offline-run-*/files/{run['summary'][key]['path']}")
        tables[key] = json.loads(file.read_text())
    assert tuple(tables["table"]["columns"]) == TABLE.columns
    assert tuple(map(tuple, tables["table"]["data"])) == TABLE.values
    assert tables["confusion"]["columns"] == ["label", "prediction", "rows"]
    assert tables["confusion"]["data"] == [["0", "0", 5], ["1", "0", 1], ["1", "1", 2]]
    assert (tables["clients"]["columns"], tables["clients"]["data"]) == (["client", "accuracy"], [[0, 0.5], [2, 0.5]])
    assert tables["partition"]["columns"] == ["client", "class", "rows"]
    cells = [["ann", "a ...", 3], ["ann", "c ...", 0], ["bob", "a ...", 1], ["bob", "c ...", 2]]
    assert tables["partition"]["data"] == cells
    assert run["best"] == {"train/loss": "min", "eval/accuracy": "max"}
    assert run["metrics"]["*"] == "round"
    assert run["metrics"]["bytes/total"] == "round"
    assert "round" in run["metrics"]
    assert run["exit"] == 0
    assert len(said) == 1
    assert "wandb sync" in said[0]


@pytest.mark.parametrize("artifact", [True, False])
def test_adapter_and_files_are_artifacts_of_the_run(tmp_path: Path, artifact: bool) -> None:
    out = tmp_path / "out"
    adapter = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
    files = ("config.yaml", "metrics.jsonl", "ledger.parquet/part-000001.parquet", "report.html")
    for name in (*adapter, *files, "checkpoints/state.safetensors"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    sink = WandbSink(Tracking(wandb="offline", artifact=artifact), "offline", notify=[].append)
    sink.start(info(out))
    sink.round(record(1))
    sink.finish({"test/accuracy": 0.5}, None)
    sink.close()
    (run,) = runs(out)
    assert run["exit"] == 0
    if artifact:
        kind, found = run["artifacts"][f"adapter-{run['id']}"]
        assert (kind, found) == ("model", {path.name: str(path) for path in (out / "adapter").iterdir()})  # not copied
        kind, found = run["artifacts"][f"run-{run['id']}"]
        assert (kind, set(found)) == ("run", set(files))
    else:
        assert {kind for kind, _ in run["artifacts"].values()} <= {"run_table"}


@pytest.mark.parametrize(
    ("key", "best"),
    [
        ("eval/accuracy_masked", "max"), ("eval_subset/accuracy", "max"), ("eval/macro_f1", "max"),
        ("eval/loss", "min"), ("eval/gap", "min"), ("train/loss", "min"),
        ("test/accuracy", None), ("bytes/up", None), ("time/round_s", None),
    ],
)  # fmt: skip
def test_the_summary_has_the_best_of_what_may_choose(key: str, best: str | None) -> None:
    assert wandb_sink.best_value(key) == best


def test_the_newest_folder_of_a_resumed_run_is_complete(tmp_path: Path) -> None:
    """The rounds of the first process may be lost, so the second process logs them again."""
    out = tmp_path / "out"
    play(out, 1, 3, done=False)
    play(out, 3, 5)  # a checkpoint older than the last logged round: round 3 is made again
    before, after = runs(out)
    assert before["id"] == after["id"] == json.loads((out / "wandb-run.json").read_text())["id"]
    assert before["history"] == rows(1, 3)
    assert after["history"] == rows(1, 5)
    assert (before["exit"], after["exit"]) == (1, 0)


def test_a_resumed_run_online_logs_what_wandb_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        step, dir, url = 3, str(tmp_path / "files"), "https://wandb.example.org/run"
        logged: ClassVar[list[int]] = []

        def define_metric(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
            assert step == values["round"]
            self.logged.append(step)

    monkeypatch.setattr(WandbSink, "_init", lambda *args: Run())
    monkeypatch.setattr(wandb_sink, "logged_in", lambda: True)
    before = JsonlSink(tmp_path / "metrics.jsonl")
    before.start(info(tmp_path))
    for number in range(1, 6):
        before.round(record(number))
    before.close()
    sink = WandbSink(Tracking(), "online", notify=[].append)
    sink.start(info(tmp_path, start=4))
    sink.round(record(5))
    assert Run.logged == [3, 4, 5]


def test_other_settings_in_the_same_directory_are_another_run(tmp_path: Path) -> None:
    make = wandb_sink._run_id
    first = make(info(tmp_path))
    assert make(info(tmp_path, start=3)) == first
    other = make(info(tmp_path, digest="f" * 16))
    assert other != first
    (tmp_path / "wandb-run.json").write_text("[]")
    assert make(info(tmp_path)) not in (first, other)


def test_other_runs_of_this_process_stay_alive(tmp_path: Path) -> None:
    first, second = (WandbSink(Tracking(wandb="offline"), "offline", notify=[].append) for _ in range(2))
    first.start(info(tmp_path / "1"))
    second.start(info(tmp_path / "2"))
    first.round(record(1))
    first.close()
    assert helpers()
    second.round(record(1))
    second.finish({}, None)
    second.close()
    assert helpers() == []
    assert [runs(tmp_path / name)[0]["history"] for name in "12"] == [rows(1, 1), rows(1, 1)]


# Errors of W&B


def test_online_without_network_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setitem(wandb_sink.QUIET, "init_timeout", 2.0)
    sinks = open_sinks(Tracking(), out)
    sinks.start(info(out))
    sinks.round(record(1))
    sinks.finish({}, None)
    sinks.close()
    assert helpers() == []
    assert [run["history"] for run in runs(out)] == [rows(1, 1)]
    log = (out / "events.log").read_text()
    assert "wandb: online start failed, trying offline (CommError" in log
    assert "wandb: offline in" in log
    folders = [folder.name for folder in (out / "wandb").glob("*run-2*")]
    assert len({name.rsplit("-", 1)[1] for name in folders}) == 1, "the failed start and the run share one id"
    assert len(folders) == 2
    printed = capfd.readouterr()
    assert printed == ("", "")
    seen = [log, *printed, *(p.read_text(errors="replace") for p in out.rglob("*") if p.is_file())]
    assert not any(KEY in text for text in seen)


def test_online_beside_a_living_run_goes_on_offline_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    living = WandbSink(Tracking(wandb="offline"), "offline", notify=said.append)
    living.start(info(tmp_path / "living"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setitem(wandb_sink.QUIET, "init_timeout", 2.0)
    other = WandbSink(Tracking(), "online", notify=said.append)
    other.start(info(tmp_path / "other"))
    for sink in (other, living):
        sink.round(record(1))
        sink.finish({}, None)
        sink.close()
    assert helpers() == []
    assert [runs(tmp_path / name)[0]["history"] for name in ("other", "living")] == [rows(1, 1), rows(1, 1)]


def test_online_without_a_login_tracks_offline(tmp_path: Path) -> None:
    said: list[str] = []
    sink = WandbSink(Tracking(wandb="online"), "online", notify=said.append)
    sink.start(info(tmp_path))
    sink.close()
    assert "not logged in" in said[0]
    assert len(runs(tmp_path)) == 1


def test_a_helper_process_of_an_ended_parent_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SERVICE", f"3-1-unix-{tmp_path}/gone.sock")
    play(tmp_path, 1, 2)
    assert helpers() == []
    assert [run["history"] for run in runs(tmp_path)] == [rows(1, 2)]


@pytest.mark.parametrize("error", [RuntimeError("no\nmore lines"), SystemExit(3)])
def test_an_error_is_reported_once_and_never_reaches_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    class Broken:
        calls = 0

        def define_metric(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log(self, *args: Any, **kwargs: Any) -> None:
            self.calls += 1
            raise error

        def finish(self, exit_code: int) -> None:
            assert exit_code == 1

    said: list[str] = []
    sink = WandbSink(Tracking(), "offline", notify=said.append)
    sink._run = broken = Broken()
    for number in (1, 2, 3):
        sink.round(record(number))
    sink.finish({"a": 1}, TABLE)
    sink.close()
    assert broken.calls == 1
    assert len(said) == 1
    assert said[0].startswith(f"wandb: log failed, the run continues without W&B ({type(error).__name__}")
    assert "\n" not in said[0]


def test_the_run_continues_when_no_start_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(WandbSink, "_init", refuse)
    sinks = open_sinks(Tracking(), tmp_path)
    sinks.start(info(tmp_path))
    sinks.round(record(1))
    sinks.finish({}, TABLE)
    sinks.close()
    assert (
        "wandb: start failed, the run continues without W&B (OSError: disk full)"
        in (tmp_path / "events.log").read_text()
    )


def test_a_process_without_close_still_ends(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from rayfed.config.execution import Tracking\n"
        "from rayfed.tracking import RunInfo\n"
        "from rayfed.tracking.wandb_sink import WandbSink\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "sink = WandbSink(Tracking(), 'offline', notify=lambda text: None)\n"
        "settings = {'method': {'name': 'm'}, 'lora': {'rank': 1}, 'seed': 0}\n"
        "settings['wire'] = {way: {'density': 1.0} for way in ('down', 'up')}\n"
        "sink.start(RunInfo('n', out, 'd', settings, 1)); sink.round({'round': 1, 'x': 2})\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60, cwd=Path(__file__).parents[2])
    assert runs(tmp_path)[0]["history"] == [{"round": 1, "x": 2, "_step": 1}]
