"""A round evaluated beside the next one's training leaves what evaluating at once leaves, at every moment."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import LOWRANK

from rayfed.clients.blueprint import draw_blueprint
from rayfed.clients.jobs import EvalJob, TrainJob
from rayfed.config import validate
from rayfed.engine.local import LocalCrew
from rayfed.errors import RunError
from rayfed.server.crew import Beside, Done, Task, in_order
from rayfed.server.downlink import Downlink
from rayfed.server.loop import Server
from rayfed.server.optimizers import ServerOptimizer
from rayfed.tasks.federation import form_federation
from rayfed.tracking import open_sinks, read_metrics
from rayfed.wire import Ledger

TIMES = ("time/round_s", "time/train_s", "time/server_s")
SPARSE = ("wire.down.density=0.25", "wire.up.density=0.25")
ROUNDS = ("server.rounds=5", "checkpoint.keep=9", "client.steps=2")


class Watched(LocalCrew):
    """A crew of this process that writes down what it is asked, and may fail: ``before`` is called with each job."""

    def __init__(self, experiment, before: Callable[[Any], object] = lambda job: None) -> None:
        self.federation, self.before = form_federation(experiment), before
        self.blueprint = draw_blueprint(experiment, len(self.federation.classes))
        super().__init__(experiment, self.federation, self.blueprint)
        self.asked: list[str] = []  # a word for every run: T for a pack that trains, E for a job that evaluates

    def run(self, tasks) -> Iterator[Done]:
        self.asked.append("".join("T" if isinstance(task.job, TrainJob) else "E" for task in tasks))
        for index, task in enumerate(tasks):
            self.before(task.job)
            yield Done(index, self.learner.execute(task.job, task.payloads))


@contextmanager
def serving(
    experiment, out: Path, overlap: bool = True, crew: Watched | None = None, resume: bool = False
) -> Iterator[Server]:
    crew = crew or Watched(experiment)
    out.mkdir(exist_ok=True)
    sinks = open_sinks(experiment.tracking, out)
    server = Server(experiment, crew.federation, crew.blueprint, crew, out, sinks, resume)
    server.overlap = overlap
    try:
        yield server
    finally:
        sinks.close()


def finish(experiment, out: Path, *args, **named) -> dict[str, Any]:
    """Runs what is left to the end; returns the summary."""
    with serving(experiment, out, *args, **named) as server:
        for _ in server.rounds():
            pass
        return server.finish()


def left_in(out: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The metrics without times, and every other file but the log."""
    metrics = [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(out / "metrics.jsonl")]
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return metrics, {name: data for name, data in files.items() if name not in ("metrics.jsonl", "events.log")}


def newest(out: Path) -> tuple[int, int, int]:
    """The last round of the metrics, of the ledger and of the checkpoints."""
    ledger = Ledger.read(out / "ledger.parquet").table()
    checkpoints = [int(path.name[-6:]) for path in (out / "checkpoints").glob("round-*")]
    return len(read_metrics(out / "metrics.jsonl")), max(ledger["round"].to_pylist()), max(checkpoints)


CASES = {
    "fedadam": (*SPARSE, "server.optimizer=fedadam"),
    "adamw": (*SPARSE, "server.optimizer=adamw"),
    "momentum": (*SPARSE, "server.optimizer=fedavgm"),
    "client state": ("method.name=fedsa",),
    "views": ("method.name=fedview", "profiles.kind=tiers", "profiles.ranks=[1,2,4]"),
    "a changing base": ("method.name=flora", "profiles.kind=tiers", "profiles.ranks=[1,2,4]", "eval.tiers=true"),
    "now and then": (*SPARSE, "server.optimizer=fedadam", "eval.every=2", "checkpoint.every=3"),
    "all that can be asked": (*SPARSE, "eval.tiers=true", "eval.clients=true", "eval.diagnostics=true"),
}


@pytest.fixture(scope="module")
def at_once(tiny, tmp_path_factory):
    """at_once(case) -> the settings, the summary and what is left where every round is evaluated at once."""

    @cache
    def run(case: str):
        experiment, out = tiny(*ROUNDS, *CASES[case]), tmp_path_factory.mktemp("at-once")
        return experiment, finish(experiment, out, False), left_in(out)

    return run


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_is_the_same_to_the_byte(at_once, tmp_path, case):
    experiment, expected, left = at_once(case)
    crew = Watched(experiment)
    assert finish(experiment, tmp_path / "run", True, crew) == expected
    assert any("T" in run and "E" in run for run in crew.asked)
    assert left_in(tmp_path / "run") == left


@pytest.mark.parametrize("case", ["momentum", "client state"])
def test_whatever_is_yielded_is_on_the_disk_and_nothing_later(tiny, tmp_path, case):
    out, dense = tmp_path / "run", [0]
    with serving(tiny(*ROUNDS, *CASES[case]), out) as server:
        for record in server.rounds():
            place = out / "checkpoints" / f"round-{record['round']:06d}"
            assert newest(out) == (record["round"],) * 3
            assert Ledger.read(out / "ledger.parquet").total_bytes == record["bytes/total"]
            dense.append(json.loads((place / "checkpoint.json").read_text())["progress"]["dense_bytes"])
            gc.collect()
            assert not any(isinstance(thing, Downlink) for thing in gc.get_objects())  # nor a cohort's payloads
    assert len({later - earlier for earlier, later in itertools.pairwise(dense)}) == 1  # sent dense, rounds are alike


WHOLE = "EE"  # the test split and the validation split, a job each


@pytest.mark.parametrize(
    ("options", "overlap", "runs"),
    [
        ((), True, ["TTT", "TTT" + WHOLE, "TTT" + WHOLE, WHOLE]),
        ((), False, ["TTT", WHOLE] * 3),
        (("eval.early_stop={patience: 9}",), True, ["TTT", WHOLE] * 3),
        (("eval.every=2",), True, ["TTT", "", "TTT", "TTT" + WHOLE, WHOLE]),
        (("eval.every=9",), True, ["TTT", "", "TTT", "", "TTT", WHOLE]),
        (("engine.pack=2",), True, ["TT", "TT" + WHOLE, "TT" + WHOLE, WHOLE]),
    ],
)
def test_what_is_asked_of_the_crew(tiny, tmp_path, options, overlap, runs):
    """Evaluation stands behind the training, in one run; not where the next round depends on it, or there is none."""
    experiment = tiny("server.rounds=3", "client.steps=1", "method.name=fedit", *options)
    crew = Watched(experiment)
    finish(experiment, tmp_path / "run", overlap, crew)
    assert crew.asked == runs


def test_a_known_answer_waits_for_nobody(tmp_path):
    experiment = validate(LOWRANK)
    crew = Watched(experiment)
    with serving(experiment, tmp_path / "run", True, crew) as server:
        assert [(record["round"], crew.asked.count("TT")) for record in server.rounds()] == [
            (r, r) for r in range(1, 5)
        ]


def interrupted(kind: type, t: int, error: type[BaseException]) -> Callable[[Any], None]:
    """Raises ``error`` at the first job of that kind from the moment on when round ``t`` (from 0) trains."""
    begun = []

    def before(job: Any) -> None:
        if isinstance(job, TrainJob) and job.t == t:
            begun.append(t)
        if begun and isinstance(job, kind):
            raise error("here")

    return before


@pytest.mark.parametrize(("case", "kind"), [("fedadam", TrainJob), ("client state", EvalJob)])
def test_who_is_killed_within_the_next_round_resumes_to_the_same(at_once, tmp_path, case, kind):
    (experiment, _, left), out = at_once(case), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        finish(experiment, out, True, Watched(experiment, interrupted(kind, 3, KeyboardInterrupt)))
    assert newest(out) == (2, 2, 2)  # round 3 was trained, and is trained again
    finish(experiment, out, resume=True)
    assert left_in(out) == left


@pytest.mark.parametrize("case", ["fedadam", "client state"])
def test_a_round_that_fails_leaves_the_one_before_it_whole(at_once, tmp_path, case):
    (experiment, _, left), out = at_once(case), tmp_path / "run"
    crew = Watched(experiment, interrupted(TrainJob, 3, RunError))
    with serving(experiment, out, True, crew) as server:
        rounds = server.rounds()
        assert [next(rounds)["round"] for _ in range(3)] == [1, 2, 3]
        with pytest.raises(RunError, match="here"):
            next(rounds)
    assert newest(out) == (3, 3, 3)
    finish(experiment, out, resume=True)
    assert left_in(out) == left


def test_a_sum_that_fails_leaves_the_round_before_it_whole(at_once, tmp_path, monkeypatch):
    """As where training diverges: the server itself fails, when the moments have moved on and the crew is at work."""
    (experiment, _, left), out = at_once("adamw"), tmp_path / "run"
    with monkeypatch.context() as patch, serving(experiment, out) as server:
        optimizer, advance = server.axes.optimizer, ServerOptimizer.advance

        def fails(*given: Any) -> Any:
            moved = advance(*given)
            if optimizer.state["vector.step"] == 3:
                raise RunError("diverged")
            return moved

        patch.setattr(ServerOptimizer, "advance", fails)
        with pytest.raises(RunError, match="diverged"):
            list(server.rounds())
    assert newest(out) == (2, 2, 2)
    finish(experiment, out, resume=True)
    assert left_in(out) == left


def test_where_nothing_can_be_evaluated_either_the_first_error_goes_on(tiny, tmp_path):
    def before(job: Any) -> None:
        if isinstance(job, EvalJob):
            raise RunError("no evaluation")
        if job.t == 1:
            raise RunError("no training")

    experiment = tiny(*ROUNDS)
    with pytest.raises(RunError, match="no training"):
        finish(experiment, tmp_path / "run", True, Watched(experiment, before))
    assert not (tmp_path / "run" / "ledger.parquet").exists()


@pytest.mark.parametrize(
    ("overlap", "seconds"), [(True, [3, 3 + 20 + 100, 3 + 20 + 100 + 20]), (False, [23, 123, 123])]
)
def test_rounds_add_up_to_the_run_and_training_is_training_alone(tiny, tmp_path, monkeypatch, overlap, seconds):
    """By a clock of its own: a pack takes 1 s, an evaluation twice 10, and who takes the records 100 for each."""
    clock = 0

    def passes(job: Any) -> None:
        nonlocal clock
        clock += 1 if isinstance(job, TrainJob) else 10

    for module in ("loop", "round"):
        monkeypatch.setattr(f"rayfed.server.{module}.time", SimpleNamespace(perf_counter=lambda: clock))
    experiment, records = tiny("server.rounds=3", "client.steps=1"), []
    with serving(experiment, tmp_path / "run", overlap, Watched(experiment, passes)) as server:
        for record in server.rounds():
            records.append(record)
            clock += 100
    assert [record["time/round_s"] for record in records] == seconds
    assert sum(seconds) == clock - 100
    assert [(record["time/train_s"], record["time/server_s"]) for record in records] == [(3, 0)] * 3


def test_further_tasks_come_last_and_their_results_apart():
    class Backwards:
        def run(self, tasks):
            self.tasks = tasks
            return (Done(index, f"{tasks[index].job} done") for index in reversed(range(len(tasks))))

    backwards = Backwards()
    crew = Beside(backwards, [Task("c"), Task("d")])
    assert [(done.index, done.result) for done in crew.run([Task("a"), Task("b")])] == [(0, "a done"), (1, "b done")]
    assert [task.job for task in backwards.tasks] == ["a", "b", "c", "d"]
    assert crew.rest() == ["c done", "d done"]
    assert crew.rest() == []
    alone = Beside(backwards, [])
    assert [done.result for done in in_order(alone.run([Task("a")]))] == ["a done"]
    assert alone.rest() == []
