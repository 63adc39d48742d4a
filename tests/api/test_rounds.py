"""`run`, `iter_rounds` and callbacks in this process; on Ray in tests/engine/test_callbacks_on_ray.py."""

from __future__ import annotations

import json
import pydoc
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from small_runs import LOWRANK, lowrank

import rayfed
from rayfed.errors import RunError, UserError
from rayfed.server.checkpoint import manifests


class Calls(rayfed.Callback):
    """Notes every call; ends the run after round ``last``; fails in ``fails``."""

    def __init__(self, last: int = 0, fails: str = "") -> None:
        self.last, self.fails = last, fails
        self.calls: list[str] = []

    def _note(self, name: str, what: object = "") -> None:
        self.calls.append(f"{name} {what}".strip())
        if name == self.fails:
            raise ZeroDivisionError("no luck")

    def on_start(self, info: Any) -> None:
        self._note("on_start", info.start)

    def on_round(self, record: Any) -> bool:
        self._note("on_round", record["round"])
        return bool(record["round"] != self.last)

    def on_event(self, text: str) -> None:
        self._note("on_event", text)

    def on_finish(self, summary: Any) -> None:
        self._note("on_finish", summary["rounds"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> rayfed.RunResult:
    return rayfed.run(lowrank(), tmp_path_factory.mktemp("whole") / "run")


def digests(result: rayfed.RunResult) -> list[str]:
    return list(result.history["state/digest"])


def test_settings_are_an_object_a_file_or_a_mapping(tmp_path: Path, whole: rayfed.RunResult) -> None:
    (tmp_path / "config.yaml").write_text(yaml.dump(LOWRANK))
    for i, settings in enumerate((tmp_path / "config.yaml", str(tmp_path / "config.yaml"), LOWRANK)):
        assert digests(rayfed.run(settings, tmp_path / str(i))) == digests(whole)
    with pytest.raises(UserError, match=r"^experiment: got 7, but it is an Experiment, the path of"):
        rayfed.run(7)  # type: ignore[arg-type]


def test_history_has_a_row_a_round_and_a_column_a_key(whole: rayfed.RunResult) -> None:
    history = whole.history
    assert list(history.index) == [1, 2, 3, 4]
    assert history.index.name == "round"
    assert set(history.columns) == {key for record in whole.metrics for key in record} - {"round"}
    assert list(history["bytes/total"]) == [record["bytes/total"] for record in whole.metrics]


def test_rounds_begin_when_they_are_asked_for(tmp_path: Path, whole: rayfed.RunResult) -> None:
    def written() -> int:
        return len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())

    rounds = rayfed.iter_rounds(lowrank(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for record in rounds:
        assert written() == record["round"]
        assert not (tmp_path / "run" / "adapter").exists()
        with pytest.raises(UserError, match=r"^result: the run has no result yet"):
            _ = rounds.result
    assert digests(rounds.result) == digests(whole)
    assert rounds.result.summary == whole.summary


@pytest.mark.parametrize("how", ["close", "with", "break"])
def test_a_run_that_is_left_early_can_be_resumed(tmp_path: Path, whole: rayfed.RunResult, how: str) -> None:
    experiment, out = lowrank("checkpoint.every=3"), tmp_path / "run"
    if how == "break":
        for record in rayfed.iter_rounds(experiment, out):
            if record["round"] == 2:
                break
    elif how == "with":
        with rayfed.iter_rounds(experiment, out) as rounds:
            assert [next(rounds)["round"] for _ in range(2)] == [1, 2]
    else:
        rounds = rayfed.iter_rounds(experiment, out)
        assert [next(rounds)["round"] for _ in range(2)] == [1, 2]
        rounds.close()
    assert manifests(out / "checkpoints")[0].round == 2
    assert "stopped; `--resume` continues after round 2" in (out / "events.log").read_text()
    assert [record["round"] for record in rayfed.iter_rounds(experiment, out, resume=True)] == [3, 4]
    assert digests(rayfed.run(experiment, out, resume=True)) == digests(whole)


def test_callbacks_are_called_in_order(tmp_path: Path) -> None:
    first, second = Calls(), Calls()
    rayfed.run(lowrank("server.rounds=2"), tmp_path / "run", callbacks=[first, second])
    assert first.calls == ["on_start 0", "on_round 1", "on_round 2", "on_finish 2"] == second.calls


def test_a_callback_ends_the_run_and_a_resume_adds_no_rounds(tmp_path: Path, whole: rayfed.RunResult) -> None:
    calls = Calls(last=2)
    out = tmp_path / "run"
    stopped = rayfed.run(lowrank("checkpoint.every=3"), out, callbacks=[calls, Calls()])
    assert calls.calls[-2:] == ["on_event a callback ended the run after round 2", "on_finish 2"]
    assert digests(stopped) == digests(whole)[:2]
    assert (stopped.rounds, json.loads((out / "summary.json").read_text())["rounds"]) == (2, 2)
    assert (out / "adapter").is_dir()
    assert rayfed.run(lowrank("checkpoint.every=3"), out, resume=True).rounds == 2


@pytest.mark.parametrize(
    ("fails", "done"), [("on_start", 0), ("on_round", 1), ("on_event", 1), ("on_finish", 4)], ids=str
)
def test_an_exception_names_the_callback_and_shows_its_code(
    tmp_path: Path, whole: rayfed.RunResult, fails: str, done: int
) -> None:
    out, calls = tmp_path / "run", Calls(last=1 if fails == "on_event" else 0, fails=fails)
    with pytest.raises(RunError) as failure:
        rayfed.run(lowrank("checkpoint.every=3"), out, callbacks=[calls])
    raised = next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "raise ZeroDiv" in line)
    message = f"callbacks: Calls.{fails} failed: ZeroDivisionError: no luck ({__file__}:{raised})"
    assert str(failure.value) == message
    (note,) = failure.value.__notes__
    assert all(text in note for text in (__file__, 'raise ZeroDivisionError("no luck")'))
    assert "callbacks.py" not in note
    assert [checkpoint.round for checkpoint in manifests(out / "checkpoints")[:1]] == ([done] if done else [])
    assert f"continues after round {done}" in (out / "events.log").read_text()
    assert 'raise ZeroDivisionError("no luck")' in (out / "events.log").read_text()
    resumed = rayfed.run(lowrank("checkpoint.every=3"), out, resume=True)
    assert digests(resumed) == digests(whole)[: 1 if fails == "on_event" else 4]


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([Calls], "^callbacks: got the class Calls, but an object is needed: make one of it$"),
        ([print], "^callbacks: got <built-in function print>, but each is an object of a subclass of rayfed.Callback$"),
        (Calls(), "^callbacks: got <.*Calls object at .*>, but it is a list of rayfed.Callback objects$"),
    ],
    ids=["class", "function", "no list"],
)
def test_what_is_no_callback_is_refused(tmp_path: Path, callbacks: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rayfed.iter_rounds(lowrank(), tmp_path / "run", callbacks=callbacks)
    assert not (tmp_path / "run").exists()


def test_changes_of_settings() -> None:
    changed = lowrank().with_("server.rounds=5", {"client.lr": 0.1, "name": "other"})
    assert (changed.server.rounds, changed.client.lr, changed.name) == (5, 0.1, "other")
    assert changed.with_("server.rounds=4", {"client.lr": 0.05, "name": "tiny"}).digest() == lowrank().digest()
    with pytest.raises(UserError, match=r"^server.round: unknown key; did you mean server.rounds\?"):
        lowrank().with_("server.round=5")


def test_wrong_keywords_and_names_suggest_the_right_ones(tmp_path: Path) -> None:
    wrong: Any = {"ouput": tmp_path}
    with pytest.raises(TypeError, match=r"^run\(\) got an unexpected keyword argument 'ouput'; did you mean 'out'\?$"):
        rayfed.run(lowrank(), **wrong)
    wrong = {"labels": "topic"}
    with pytest.raises(TypeError, match=r"^TextClassification\(\) got .* argument 'labels'; did you mean 'label'\?$"):
        rayfed.TextClassification(**wrong)
    for function in (rayfed.sweep, rayfed.report):
        with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'ouput'; did you mean 'out'\?$"):
            function(tmp_path, **{"ouput": tmp_path})  # type: ignore[operator]
    with pytest.raises(UserError, match=r"^serverr: unknown key; did you mean server\? "):
        rayfed.Experiment(serverr={})
    with pytest.raises(UserError, match=r"^server.rounds: got 'x', but it should be an integer in"):
        rayfed.Experiment(server={"rounds": "x"})
    with pytest.raises(AttributeError, match=r"no attribute 'iter_round'; did you mean 'iter_rounds'\?$"):
        _ = rayfed.iter_round


def test_every_public_name_is_there_and_documented() -> None:
    assert set(rayfed.__all__) <= set(dir(rayfed))
    for name in set(rayfed.__all__) - {"__version__"}:
        assert getattr(rayfed, name).__doc__, name
    text = pydoc.plain(pydoc.render_doc(rayfed))
    assert all(re.search(rf"\b{name}\b", text) for name in set(rayfed.__all__) - {"__version__"})


def test_report_and_sweep(tmp_path: Path, whole: rayfed.RunResult) -> None:
    page = rayfed.report(whole.out, out=tmp_path / "report")
    assert page == tmp_path / "report" / "report.html"
    assert page.is_file()
    with pytest.raises(UserError, match=r"^report: got no folder"):
        rayfed.report()
    with pytest.raises(UserError, match=r"^config: got '.*none.yaml', but there is no such file$"):
        rayfed.sweep(tmp_path / "none.yaml")


def test_a_sweep_takes_a_file_or_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**LOWRANK, "sweep": {"parameters": {"seed": {"grid": [0, 1]}}, "metric": "eval/gap"}}
    pages = []

    def run_sweep(path: Path, *_: Any) -> Any:
        return SimpleNamespace(out=tmp_path, settings=yaml.safe_load(Path(path).read_text()))

    monkeypatch.setattr("rayfed.sweeps.sweep.run_sweep", run_sweep)
    monkeypatch.setattr("rayfed.reports.sweep_page.write_sweep_page", pages.append)
    (tmp_path / "sweep.yaml").write_text(yaml.dump(settings))
    for config in (settings, tmp_path / "sweep.yaml"):
        result: Any = rayfed.sweep(config)
        assert result.settings == settings
    assert pages == [tmp_path, tmp_path]  # every sweep writes its page
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"^sweep.parameters.seed: got .*, but it should be \{grid"):
        rayfed.sweep({"sweep": {"parameters": {"seed": 7}}})
    with pytest.raises(UserError, match=r"^config: got 7, but it is the path of a YAML file, or a mapping"):
        rayfed.sweep(7)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^config: got PosixPath.*, but a setting is a text, a number"):
        rayfed.sweep({"sweep": tmp_path})
