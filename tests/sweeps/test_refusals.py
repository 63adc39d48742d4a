"""`rayfed sweep`: what is wrong with any trial is one line, before Ray starts and before anything is written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sweep_files import planned

from rayfed.cli import main
from rayfed.config import dump_config
from rayfed.config.sweep import load_sweep
from rayfed.errors import UserError

RATES = {"client.lr": {"grid": [0.1, 0.2]}}
DRAWN = {"client.lr": {"loguniform": [0.1, 0.2]}}


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> Callable[..., str]:
    for module in ("rayfed.engine.ray_executor", "rayfed.sweeps.on_tune"):
        monkeypatch.setitem(sys.modules, module, None)

    def refused(*arguments: str | Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = main(["sweep", *map(str, arguments)])
        err = capsys.readouterr().err
        assert (code, err.count("\n")) == (2, 1), err
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("rayfed: ").strip()

    return refused


SECTIONS = {
    "no space": ({}, "sweep.parameters: got {}, but a sweep needs parameters or cases"),
    "unknown key": ({"parameters": RATES, "metrc": "x"}, "sweep.metrc: unknown key; did you mean sweep.metric?"),
    "no space, but a value": (
        {"parameters": {"client.lr": 0.1}},
        "sweep.parameters.client.lr: got 0.1, but it should be {grid: [...]}, {choice: [...]}, ",
    ),
    "empty grid": ({"parameters": {"seed": {"grid": []}}}, "sweep.parameters.seed.grid: got [], but it should be a "),
    "a value twice": ({"parameters": {"seed": {"grid": [1, 0, 1]}}}, "sweep.parameters.seed.grid: got 1 twice"),
    "limits the wrong way round": (
        {"parameters": {"client.lr": {"uniform": [2, 1]}}},
        "sweep.parameters.client.lr.uniform: got [2, 1], but it should be [low, high] with low < high",
    ),
    "the logarithm of 0": (
        {"parameters": {"client.lr": {"loguniform": [0, 1]}}},
        "sweep.parameters.client.lr.loguniform: got [0, 1], but it should be [low, high] with low < high, both "
        "in [1e-30, 1e+30]",
    ),
    "no cases": ({"cases": []}, "sweep.cases: got [], but it needs at least one case"),
    "a case that is no mapping": ({"cases": ["flasc"]}, "sweep.cases.1: got 'flasc', but a case is a mapping"),
    "a setting varied twice": (
        {"parameters": RATES, "cases": {"a": {"client.lr": 1.0}}},
        "sweep.cases.a.client.lr: got 1.0, but sweep.parameters already varies that setting",
    ),
    "draws of nothing": ({"parameters": RATES, "samples": 2}, "sweep.samples: got 2, but nothing is drawn"),
    "tuning what does not vary": (
        {"parameters": RATES, "tune": ["server.lr"]},
        "sweep.tune: got 'server.lr', but the settings that vary are client.lr",
    ),
    "seeds that choose nothing": (
        {"parameters": {**RATES, "seed": {"grid": [0, 1]}}, "tune_seeds": 1},
        "sweep.tune_seeds: got 1, but sweep.tune names nothing to choose",
    ),
    "more seeds than there are": (
        {"parameters": {**RATES, "seed": {"grid": [0, 1]}}, "tune": ["client.lr"], "tune_seeds": 3},
        "sweep.tune_seeds: got 3, but sweep.parameters.seed.grid has 2 values",
    ),
    "wrong mode": ({"parameters": RATES, "mode": "most"}, "sweep.mode: got 'most', but it should be max or min"),
    "a metric that is never measured": (
        {"parameters": RATES, "metric": "eval/accuracy"},
        "sweep.metric: got 'eval/accuracy', but trials of this task can be compared by train/loss, eval/loss, "
        "eval/gap, bytes/total (trials client.lr=0.1; client.lr=0.2)",
    ),
    "a wrong value in one trial": (
        {"parameters": {"client.lr": {"grid": [0.1, -1]}, "seed": {"grid": [0, 1]}}},
        "client.lr: got -1, but it should be a number in [1e-30, 1e+30] (trials client.lr=-1, seed=0; "
        "client.lr=-1, seed=1)",
    ),
    "an unknown setting": (
        {"parameters": {"client.lrr": {"grid": [1, 2, 3, 4]}}},
        "client.lrr: unknown key; did you mean client.lr? (allowed are ",
    ),
    "a combination that does not go": (
        {"cases": [{"method.name": "fedit"}, {"method.name": "rbla", "lora.rank": 9}]},
        "lora.rank: got 9, but layer is 6 x 6; at most 6 is allowed (trial method.name=rbla, lora.rank=9)",
    ),
    "a search without its length": (
        {"search": {"kind": "flasc"}},
        "sweep.search.rounds: missing, and there is no default; it should be an integer in [1, 999999]",
    ),
    "a search of another kind": (
        {"search": {"kind": "grid", "rounds": 1}},
        "sweep.search.kind: got 'grid', but it should be flasc, optuna or pbt",
    ),
    "a search without a kind": (
        {"search": {"rounds": 1}},
        "sweep.search.kind: missing, and there is no default; it should be flasc, optuna or pbt",
    ),
    "a search by its name alone": (
        {"search": "pbt"},
        "sweep.search: got 'pbt', but it should be a section whose kind is flasc, optuna or pbt, or null",
    ),
    "a setting of another search": (
        {"search": {"kind": "pbt", "rounds": 1, "trials": 3}, "parameters": DRAWN},
        "sweep.search.trials: unknown key; allowed are kind, population, rounds, quantile, factors, resample",
    ),
    "a search's setting, misspelt": (
        {"search": {"kind": "optuna", "trials": 3, "bacth": 2}, "parameters": DRAWN},
        "sweep.search.bacth: unknown key; did you mean sweep.search.batch? (allowed are kind, trials, batch, ",
    ),
    "optuna and a grid": (
        {"search": {"kind": "optuna", "trials": 3}, "parameters": {"client.lr": {"grid": [0.1, 0.2]}}},
        "sweep.parameters.client.lr: got {'grid': [0.1, 0.2]}, but sweep.search=optuna takes choice, uniform or ",
    ),
    "optuna and a grid in a case": (
        {"search": {"kind": "optuna", "trials": 3}, "cases": {"a": {"lora.rank": {"grid": [1, 2]}}}},
        "sweep.cases.a.lora.rank: got {'grid': [1, 2]}, but sweep.search=optuna takes choice, uniform or ",
    ),
    "optuna and drawn seeds": (
        {"search": {"kind": "optuna", "trials": 3}, "parameters": {**DRAWN, "seed": {"choice": [1, 2]}}},
        "sweep.parameters.seed: got {'choice': [1, 2]}, but a search compares at the same seeds: a grid",
    ),
    "optuna with nothing to choose": (
        {"search": {"kind": "optuna", "trials": 3}, "parameters": {"seed": {"grid": [1, 2]}}},
        "sweep.parameters: got {'seed': {'grid': [...]}}, but sweep.search=optuna needs something to choose: ",
    ),
    "optuna and a list of samples": (
        {"search": {"kind": "optuna", "trials": 3}, "parameters": DRAWN, "samples": 3},
        "sweep.samples: got 3, but sweep.search chooses the trials",
    ),
    "optuna and stopping": (
        {"search": {"kind": "optuna", "trials": 3}, "parameters": DRAWN, "stop": {"kind": "asha", "grace": 1}},
        "sweep.stop: got a section, but sweep.search chooses the trials",
    ),
    "optuna against what is no cost": (
        {"search": {"kind": "optuna", "trials": 3, "against": "time/round_s"}, "parameters": DRAWN},
        "sweep.search.against: got 'time/round_s', but it should be bytes/total, bytes/down, bytes/up, ",
    ),
    "a start that only tpe has": (
        {"search": {"kind": "optuna", "trials": 3, "sampler": "random", "startup": 3}, "parameters": DRAWN},
        "sweep.search.startup: got 3, but that belongs to sampler=tpe, not random",
    ),
    "a generation of one": (
        {"search": {"kind": "optuna", "trials": 3, "sampler": "nsga2", "batch": 1}, "parameters": DRAWN},
        "sweep.search.batch: got 1, but a batch is a generation of nsga2, and needs 2 or more",
    ),
    "an end of a range that is wrong": (
        {"search": {"kind": "optuna", "trials": 3}, "parameters": {"wire.up.density": {"uniform": [0.5, 2]}}},
        "wire.up.density: got 2.0, but it should be a number in (0, 1] (trial wire.up.density=2.0)",
    ),
    "an end of a case's range that is wrong": (
        {"search": {"kind": "optuna", "trials": 3}, "cases": {"a": {"wire.up.density": {"uniform": [0.5, 2]}}}},
        "wire.up.density: got 2.0, but it should be a number in (0, 1] (trial wire.up.density=2.0)",
    ),
    "choices that do not go together": (
        {
            "search": {"kind": "optuna", "trials": 3},
            "parameters": {
                "server.optimizer": {"choice": ["fedavg", "sgd"]},
                "server.lr": {"choice": [None, 0.5]},
            },
        },
        "server.lr: got 0.5, but fedavg has no rate; server.optimizer=sgd has (trial server.optimizer=fedavg, "
        "server.lr=0.5)",
    ),
    "pbt and what cannot change within a run": (
        {"search": {"kind": "pbt", "rounds": 1}, "parameters": {"lora.rank": {"choice": [1, 2]}}},
        "sweep.parameters.lora.rank: got {'choice': [1, 2]}, but pbt changes settings during a run; allowed are "
        "lora.dropout, wire.down.density, ",
    ),
    "pbt and a grid": (
        {"search": {"kind": "pbt", "rounds": 1}, "parameters": {"client.lr": {"grid": [0.1, 0.2]}}},
        "sweep.parameters.client.lr: got {'grid': [0.1, 0.2]}, but sweep.search=pbt takes choice, uniform or ",
    ),
    "pbt and seeds": (
        {"search": {"kind": "pbt", "rounds": 1}, "parameters": {**DRAWN, "seed": {"choice": [0, 1]}}},
        "sweep.parameters.seed: got {'choice': [0, 1]}, but a search compares at the same seeds",
    ),
    "pbt and cases": (
        {"search": {"kind": "pbt", "rounds": 1}, "parameters": DRAWN, "cases": [{"lora.rank": 1}]},
        "sweep.cases: got [{'lora.rank': 1}], but sweep.search chooses the trials",
    ),
    "pbt with nothing to change": (
        {"search": {"kind": "pbt", "rounds": 1}},
        "sweep.parameters: got {}, but sweep.search=pbt needs something to choose",
    ),
    "pbt by an earlier round": (
        {"search": {"kind": "pbt", "rounds": 1}, "parameters": DRAWN, "at": "best"},
        "sweep.at: got 'best', but in sweep.search=pbt trials share rounds; allowed is last",
    ),
    "generations that do not fill a life": (
        {"search": {"kind": "pbt", "rounds": 3}, "parameters": DRAWN},
        "server.rounds: got 4, but it should be two or more generations of sweep.search.rounds=3",
    ),
    "one generation": (
        {"search": {"kind": "pbt", "rounds": 4}, "parameters": DRAWN},
        "server.rounds: got 4, but it should be two or more generations of sweep.search.rounds=4",
    ),
    "pbt and a wrong choice": (
        {"search": {"kind": "pbt", "rounds": 2}, "parameters": {"client.steps": {"choice": [2, 1.5]}}},
        "client.steps: got 1.5, but it should be an integer in [1, 100000] or null (trial client.steps=1.5",
    ),
    "a search and a grid": (
        {"search": {"kind": "flasc", "rounds": 1}, "parameters": RATES},
        "sweep.parameters: got {'client.lr': {'grid': [...]}}, but sweep.search chooses the trials",
    ),
    "a search that starts past its end": (
        {"search": {"kind": "flasc", "rounds": 1, "rank": 8, "max_rank": 4}},
        "sweep.search.rank: got 8, but no rank may exceed sweep.search.max_rank=4",
    ),
    "a search with nowhere to go": (
        {"search": {"kind": "flasc", "rounds": 1, "rank": 4, "max_rank": 6, "density": 0.6, "factor": 2}},
        "sweep.search.factor: got 2, but then the first probe has no neighbour: rank 8 is above max_rank=6 and density "
        "1.2 above max_density=1",
    ),
    "a search beyond the layer": (
        {"search": {"kind": "flasc", "rounds": 1, "factor": 2, "max_rank": 8}},
        "lora.rank: got 8, but layer is 6 x 6; at most 6 is allowed (trial lora.rank=8, ",
    ),
    "a search without a step": (
        {"search": {"kind": "flasc", "rounds": 2, "max_rank": 4, "budget": 9}},
        "sweep.search.budget: got 9, but the first step alone needs 10 rounds: 3 probes of 2 and 4 for the final run "
        "(server.rounds)",
    ),
    "a search by another probe's rounds": (
        {"search": {"kind": "flasc", "rounds": 1}, "at": "best"},
        "sweep.at: got 'best', but in sweep.search=flasc trials share rounds; allowed is last",
    ),
    "nothing to stop": (
        {"parameters": RATES, "stop": {"kind": "asha", "grace": 4}},
        "sweep.stop.grace: got 4, but with server.rounds=4 no trial could be stopped before its last round",
    ),
    "stopping in a search": (
        {"search": {"kind": "flasc", "rounds": 1}, "stop": {"kind": "asha", "grace": 1}},
        "sweep.stop: got a section, but sweep.search chooses the trials",
    ),
    "packs of whatever size each trial finds best": (
        {"parameters": {"engine.pack": {"grid": [1, "auto"]}}},
        "engine.pack: got 'auto', but every trial of a sweep would choose its own; name the number that `rayfed doctor "
        "CONFIG` shows (trial engine.pack=auto)",
    ),
    "what changes nothing": (
        {"parameters": {"tracking.tags": {"grid": [["a"], ["b"]]}}},
        "tracking.tags: a sweep cannot vary it; it changes nothing in the result (trials tracking.tags=",
    ),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_wrong_sweeps_are_one_line(refused, sweep_file, tmp_path: Path, case: str) -> None:
    section, line = SECTIONS[case]
    assert refused(sweep_file(section), "--out", tmp_path / "out").startswith(line)


def test_parameters_may_be_nested(sweep_file) -> None:
    """As the file has them and as overrides make them; null takes one away, an empty mapping is refused by its name."""
    path = sweep_file({"parameters": {"client": {"lr": {"grid": [0.1, 0.2]}}, "lora.rank": {"grid": [1]}}})
    override = "sweep.parameters={lora: {rank: null}, seed: {grid: [3]}}"
    _, sweep = load_sweep(path, ["sweep.parameters.client.lr={grid: [0.5]}", "sweep.parameters.seed={grid: [2, 3]}"])
    assert sweep.parameters == {"client.lr": {"grid": [0.5]}, "lora.rank": {"grid": [1]}, "seed": {"grid": [2, 3]}}
    assert load_sweep(path, [override])[1].parameters == {"seed": {"grid": [3]}}
    with pytest.raises(UserError, match=r"^sweep.parameters.client.steps: got \{\}, but it should be \{grid: "):
        load_sweep(path, ["sweep.parameters.client.steps={}"])


def test_many_trials_with_one_mistake_are_one_line(refused, sweep_file, tmp_path: Path) -> None:
    path = sweep_file({"parameters": {"seed": {"grid": list(range(9))}}}, server={"cohort": 99})
    assert refused(path, "--out", tmp_path / "out") == (
        "server.cohort: got 99, but the population has only 6 clients (partition.clients) "
        "(trials seed=0; seed=1; seed=2; and 6 more)"
    )


def test_overrides_reach_the_sweep_and_cannot_be_in_vain(refused, sweep_file, tmp_path: Path) -> None:
    path, out = sweep_file({"parameters": RATES}), tmp_path / "out"
    assert refused(path, "client.lr=0.3", "--out", out).startswith(
        "client.lr: got 'client.lr=0.3', but the sweep itself sets it"
    )
    assert refused(path, "sweep.cases=[{lora.rank: 1}, {lora.rank: 2}]", "lora.rank=2", "--out", out).startswith(
        "lora.rank: got 'lora.rank=2', but the sweep itself sets it"
    )
    said = refused(path, "sweep.parameters.client.lr=null", "--out", out)
    assert said == "sweep.parameters: got {}, but a sweep needs parameters or cases"
    said = refused(path, "sweep.parameters.client.lr={grid: [-2]}", "--out", out)
    assert said.endswith("(trial client.lr=-2)")
    assert refused(path, "sweep.at=first", "--out", out) == "sweep.at: got 'first', but it should be last or best"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "method.name=fedhl",
            "method.name: got 'fedhl', but sweep.search continues runs at another rank; allowed ",
        ),
        (
            "method={name: flasc, mask: fixed}",
            "method.mask: got 'fixed', but sweep.search changes the density; allowed is refresh",
        ),
        (
            "profiles={kind: tiers, densities_up: [0.1, 0.2]}",
            "profiles.kind: got 'tiers', but sweep.search sets one rank for all clients: same",
        ),
        ("wire.up.density=0.5", "wire.up.density: got 'wire.up.density=0.5', but the sweep itself sets it, so the"),
    ],
)
def test_what_a_search_cannot_continue(refused, sweep_file, tmp_path: Path, override: str, line: str) -> None:
    path = sweep_file({"search": {"kind": "flasc", "rounds": 1, "max_rank": 4}})
    assert refused(path, override, "--out", tmp_path / "out").startswith(line)


def test_what_a_population_cannot_change(refused, sweep_file, tmp_path: Path) -> None:
    density = {"wire.down.density": {"uniform": [0.1, 0.9]}}
    path = sweep_file({"search": {"kind": "pbt", "rounds": 2}, "parameters": density})
    fixed = "method={name: flasc, mask: fixed}"
    said = refused(path, fixed, "--out", tmp_path / "out")
    assert said == "method.mask: got 'fixed', but sweep.search changes the density; allowed is refresh"
    said = refused(path, "method.name=fedex_lora", "--out", tmp_path / "out")
    assert said.startswith("wire.down.density: got below 1, but what fedex_lora sends down must arrive whole (trial")


def test_stopping_needs_figures_on_the_way(refused, tiny, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny("server.rounds=9", "eval.every=8")))
    grid, stop = "sweep.parameters.seed={grid: [0, 1]}", "sweep.stop={kind: asha, grace: 2}"
    said = refused(path, grid, stop, "eval.every=9", "--out", tmp_path / "out")
    assert said.startswith("eval.every: got 9, but sweep.stop compares eval/accuracy from round 2 (grace) to 8, and it")


def test_a_metric_needs_its_data(refused, tiny, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny("data.validation=0")))
    said = refused(path, "sweep.parameters.seed={grid: [0, 1]}", "--out", tmp_path / "out")
    assert said == (
        "sweep.metric: got 'eval/accuracy', but the data have no validation split; set data.validation above 0 "
        "(trials seed=0; seed=1)"
    )


def test_a_sweep_is_no_run_and_a_run_no_sweep(refused, sweep_file, tmp_path: Path, capsys) -> None:
    path = sweep_file({"parameters": RATES})
    assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "rayfed: sweep: this section describes many runs; start them with `rayfed sweep CONFIG`\n"
    )
    plain = tmp_path / "plain.yaml"
    plain.write_text("seed: 1\n")
    assert refused(plain).startswith(f"sweep: {plain} has no section `sweep`; `rayfed run` takes it")


def test_the_directory_must_be_free_or_a_sweeps(refused, sweep_file, tmp_path: Path) -> None:
    path = sweep_file({"parameters": RATES})
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    assert "but it is not empty; continue it with --resume" in refused(path, "--out", used)
    assert "no sweep directory: it has no sweep.yaml" in refused(path, "--out", used, "--resume")
    assert refused(path, "--out", used / "notes.txt").endswith("notes.txt is a file")
    assert refused(path, "--resume") == "--resume: needs --out, the directory to continue"


def test_trials_on_a_gpu_say_how_they_share_it(sweep_file, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    path = sweep_file({"parameters": RATES}, engine={"device": "cuda", "gpus_per_worker": 0})
    with pytest.raises(UserError, match=r"^engine.gpus_per_worker: got 0, but in a sweep it says how much of a GPU"):
        planned(path)
