"""`rayfed.tune`: what is wrong is one line before anything starts; trials are runs; Tune's own objects work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray import tune
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler, PopulationBasedTraining
from ray.tune.search.optuna import OptunaSearch
from small_runs import LOWRANK, lowrank, wait_for

import rayfed
from rayfed.errors import UserError
from rayfed.sweeps.on_tune import make_trainable
from rayfed.tracking import read_metrics

GAP: dict[str, Any] = {"metric": "eval/gap", "mode": "min"}


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray must not be started."""

    def fail(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("rayfed.engine.connect.start_ray", fail)
    monkeypatch.setattr("ray.is_initialized", lambda: False)


def pbt(key: str) -> Any:
    return PopulationBasedTraining(time_attr="round", hyperparam_mutations={key: tune.uniform(0.1, 0.9)})


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an unknown setting": (
        {"client.lrr": tune.uniform(0.1, 0.2)},
        {},
        "client.lrr: unknown key; did you mean client.lr? ",
    ),
    "an end of a range": (
        {"wire.up.density": tune.uniform(0.5, 2)},
        {},
        "wire.up.density: got 2, but it should be a number in (0, 1] (trial wire.up.density=2)",
    ),
    "a choice": ({"client.steps": tune.choice([2, 1.5])}, {}, "client.steps: got 1.5, but it should be an integer in"),
    "a value of a grid beyond the model": (
        {"lora.rank": tune.grid_search([2, 9])},
        {},
        "lora.rank: got 9, but layer is 6 x 6; at most 6 is allowed (trial lora.rank=9)",
    ),
    "a range of integers": ({"lora.rank": tune.randint(1, 8)}, {}, "lora.rank: got 7, but layer is 6 x 6; at most 6 "),
    "a value": ({"client.lr": -1}, {}, "client.lr: got -1, but it should be a number in [1e-30, 1e+30] (trial "),
    "a metric that is never measured": (
        {},
        {"metric": "eval/accuracy", "mode": "max"},
        "tune_config.metric: got 'eval/accuracy', but trials of this task can be compared by train/loss, eval/loss, ",
    ),
    "a metric of the scheduler": (
        {},
        {"scheduler": ASHAScheduler(metric="gap", mode="min")},
        "tune_config.metric: got 'gap', but trials of this task can be compared by train/loss, eval/loss, ",
    ),
    "a change in mid-life": (
        {},
        GAP | {"scheduler": pbt("lora.rank")},
        "tune_config.scheduler: got mutations of lora.rank, but a run can change only lora.dropout, ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_one_line(no_ray: None, case: str) -> None:
    space, config, line = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        rayfed.tune.tuner(lowrank(), space, tune.TuneConfig(**config))
    assert str(refusal.value).startswith(line)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("part", [{"search_alg": OptunaSearch()}, {"scheduler": pbt("client.lr")}])
def test_who_reads_every_round_needs_every_round(no_ray: None, tiny, part: dict[str, Any]) -> None:
    config = tune.TuneConfig(metric="eval/accuracy", mode="max", **part)
    with pytest.raises(UserError, match=r"^eval.every: got 3, but \w+ reads the metric of every round: 1$"):
        rayfed.tune.tuner(tiny("eval.every=3"), {}, config)


def test_a_trainable_is_checked_and_knows_its_resources() -> None:
    with pytest.raises(UserError, match=r"^client.lr: got -1"):
        rayfed.tune.trainable({"client": {"lr": -1}})
    engine = {"kind": "ray", "workers": 2, "cpus_per_worker": 0.5, "memory_per_worker": 0.0}
    function: Any = rayfed.tune.trainable(LOWRANK | {"engine": engine})
    assert function._resources({}).bundles == [{"CPU": 1}, {"CPU": 0.5}, {"CPU": 0.5}]
    assert function._resources({"engine.workers": 1}).bundles == [{"CPU": 1}, {"CPU": 0.5}]
    assert len(function._resources({"client.lr": -1}).bundles) == 3  # the trial itself will say what is wrong
    unfinished: Any = make_trainable(LOWRANK | {"engine": engine, "client": {"lr": -1}}, {})  # as the file of a sweep
    assert len(unfinished._resources({"client.lr": 0.1}).bundles) == 3


def test_trials_that_can_never_fit_are_refused(ray_cluster, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^engine.cpus_per_worker: got 1 for each of 9 workers, but Ray has 3 CPUs, beside 1 CPU for"
    ):
        rayfed.tune.tuner(lowrank("engine.kind=ray"), {"engine.workers": tune.grid_search([1, 9])})


def test_a_trial_is_a_run(ray_cluster, tmp_path: Path) -> None:
    """Two trials in one process: the same bits, the same keys, and a failure that stops no other."""
    experiment = lowrank("tracking.group=swept")
    space = {"client.lr": tune.grid_search([0.02, 1e30])}
    results = rayfed.tune.tuner(
        experiment, space, tune.TuneConfig(max_concurrent_trials=1, **GAP),
        tune.RunConfig(name="swept", storage_path=str(tmp_path), verbose=0),
    ).fit()  # fmt: skip
    assert results.num_errors == 1
    assert "training gave values that are not finite" in str(results.errors[0])
    result = results.get_best_result()
    folder = Path(result.path)
    assert result.config == {"client.lr": 0.02}
    assert result.metrics is not None
    assert result.metrics["run_dir"] == str(folder)
    rounds = read_metrics(folder / "metrics.jsonl")
    rayfed.run(experiment.with_({"client.lr": 0.02}), tmp_path / "alone")
    alone = read_metrics(tmp_path / "alone" / "metrics.jsonl")
    assert [own["state/digest"] for own in rounds] == [own["state/digest"] for own in alone]
    for key, value in rounds[-1].items():
        assert result.metrics.get(key) == value or value is None
    assert result.metrics_dataframe is not None
    assert list(result.metrics_dataframe["eval/gap"]) == [own["eval/gap"] for own in rounds]
    assert (folder / "adapter").is_dir()
    settings = rayfed.load_config(folder / "config.yaml")
    assert (settings.name, settings.tracking.group) == (folder.name[: len(settings.name)], "swept")
    assert len([*folder.glob("checkpoint_*")]) == 4


def script(tmp_path: Path, code: str) -> tuple[Path, list[str]]:
    """(the folder of results, the command) of a program that knows `experiment`, `out`, `tune` and `rayfed`."""
    out = tmp_path / "results"
    path = tmp_path / "program.py"
    experiment = LOWRANK | {"server": {"rounds": 12, "cohort": 2}}
    head = f"import rayfed\nfrom ray import tune\nexperiment, out = {experiment!r}, {str(out)!r}\n"
    path.write_text(head + textwrap.dedent(code))
    return out, [sys.executable, str(path)]


@pytest.mark.slow
def test_an_interrupted_tuner_is_restored(tmp_path: Path) -> None:
    """Killed with signal 9 in the middle of both trials; `Tuner.restore` continues them from Tune's checkpoints."""
    code = """
        experiment["server"]["rounds"], experiment["checkpoint"] = 600, {"every": 10}
        run_config = tune.RunConfig(name="swept", storage_path=out, verbose=0)
        if not tune.Tuner.can_restore(f"{out}/swept"):
            tuner = rayfed.tune.tuner(experiment, {"client.lr": tune.grid_search([0.02, 0.05])}, run_config=run_config)
        else:
            tuner = tune.Tuner.restore(f"{out}/swept", rayfed.tune.trainable(experiment))
        for result in tuner.fit():
            print("result", result.path, result.metrics["round"], result.metrics["training_iteration"])
    """
    out, command = script(tmp_path, code)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["TUNE_GLOBAL_CHECKPOINT_S"] = "0"
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert wait_for(lambda: len({path.parent for path in out.glob("swept/rayfed*/checkpoint_*")}) == 2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=environment, timeout=600, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("result")]
    assert [line[2:] for line in lines] == [["600", "600"]] * 2
    for _, path, *_ in lines:
        settings = rayfed.load_config(Path(path) / "config.yaml")
        alone = rayfed.run(settings, tmp_path / settings.name).metrics
        mine = read_metrics(Path(path) / "metrics.jsonl")
        assert [own["state/digest"] for own in mine] == [own["state/digest"] for own in alone]
        assert "resume after round" in (Path(path) / "events.log").read_text()


@pytest.mark.slow
def test_objects_of_tune(ray_cluster, tmp_path: Path) -> None:
    """A searcher and schedulers that stop, that pause, and that copy and change trials."""
    experiment = lowrank("server.rounds=12")
    fit = {"run_config": tune.RunConfig(storage_path=str(tmp_path), verbose=0)}
    space = {"client.lr": tune.loguniform(1e-3, 2e-1), "lora.rank": tune.choice([1, 2, 4])}
    asha = ASHAScheduler(time_attr="round", max_t=12, grace_period=2, reduction_factor=2)
    config = tune.TuneConfig(num_samples=6, scheduler=asha, search_alg=OptunaSearch(seed=0), **GAP)
    results = rayfed.tune.tuner(experiment, space, config, **fit).fit()
    assert results.num_errors == 0
    assert len(results.get_dataframe()) == 6
    assert {row["round"] for row in (result.metrics for result in results)} != {12}  # some were stopped

    hyperband = HyperBandScheduler(time_attr="round", max_t=12, reduction_factor=2)
    config = tune.TuneConfig(num_samples=6, scheduler=hyperband, max_concurrent_trials=2, **GAP)
    assert rayfed.tune.tuner(experiment, space, config, **fit).fit().num_errors == 0

    mutations = {"client.lr": tune.loguniform(1e-3, 2e-1)}
    config = tune.TuneConfig(num_samples=4, scheduler=PopulationBasedTraining(
        time_attr="round", perturbation_interval=3, hyperparam_mutations=mutations, synch=True), **GAP)  # fmt: skip
    results = rayfed.tune.tuner(experiment, mutations, config, **fit).fit()
    assert results.num_errors == 0
    changed = [Path(result.path) for result in results if (Path(result.path) / "continues.json").is_file()]
    assert changed
    for folder in changed:
        note = json.loads((folder / "continues.json").read_text())
        assert note["before"].keys() == {"client.lr"}
        assert note["round"] % 3 == 0
        assert [own["round"] for own in read_metrics(folder / "metrics.jsonl")] == list(range(1, 13))


@pytest.mark.slow
def test_storage_that_is_no_local_path(ray_cluster, tmp_path: Path) -> None:
    """The run directory is on the trial's node; the storage gets Tune's checkpoints and, if asked, all other files."""
    storage = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    run_config = tune.RunConfig(
        storage_path="bucket", storage_filesystem=storage, verbose=0, sync_config=tune.SyncConfig(sync_artifacts=True)
    )
    (result,) = rayfed.tune.tuner(lowrank(), {"client.lr": 0.02}, run_config=run_config).fit()
    assert result.metrics is not None
    own, stored = Path(result.metrics["run_dir"]), tmp_path / result.path
    assert tmp_path not in own.parents
    for name in ("metrics.jsonl", "config.yaml", "adapter/adapter_model.safetensors"):
        assert (stored / name).read_bytes() == (own / name).read_bytes()
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as folder:
        assert (Path(folder) / "metrics.jsonl").read_bytes() == (own / "metrics.jsonl").read_bytes()
