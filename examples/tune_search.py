"""Ray Tune's own objects over an experiment: python examples/tune_search.py

A search of two settings with early stopping, then Population Based Training of the learning rate. With Optuna,
`search_alg=OptunaSearch()` in the first TuneConfig lets it choose.
"""

from pathlib import Path

from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

import rayfed

ROUNDS = 6
SETTINGS = {
    "data": {"source": "lowrank"},  # a regression problem with a known answer: no download, milliseconds a round
    "partition": {"kind": "natural", "clients": 10},
    "lora": {"rank": 4, "target_modules": ["layer"]},
    "method": {"name": "flasc"},
    "client": {"momentum": 0.0},
    "server": {"rounds": ROUNDS, "cohort": 5, "optimizer": "fedavg"},
    "engine": {"kind": "local"},
    "checkpoint": {"every": 2},
    "tracking": {"console": "off", "wandb": "off"},
}
GOAL = {"metric": "eval/gap", "mode": "min"}  # a key of metrics.jsonl: the share of the gap to the answer that is left


def search(out: str) -> tune.ResultGrid:
    """Four trials; after rounds 2 and 4 only the better half of them goes on."""
    space = {"wire.up.density": tune.loguniform(1 / 16, 1), "lora.rank": tune.choice([2, 4])}
    scheduler = ASHAScheduler(time_attr="round", max_t=ROUNDS, grace_period=2, reduction_factor=2)
    config = tune.TuneConfig(num_samples=4, scheduler=scheduler, **GOAL)
    return rayfed.tune.tuner(SETTINGS, space, config, tune.RunConfig("search", storage_path=out, verbose=1)).fit()


def population(out: str) -> tune.ResultGrid:
    """Two members; every two rounds the worse one continues from the better one's checkpoint, with another rate."""
    space = {"client.lr": tune.loguniform(0.002, 0.02)}
    scheduler = PopulationBasedTraining("round", perturbation_interval=2, hyperparam_mutations=space, synch=True)
    config = tune.TuneConfig(num_samples=2, scheduler=scheduler, **GOAL)
    return rayfed.tune.tuner(SETTINGS, space, config, tune.RunConfig("population", storage_path=out, verbose=1)).fit()


if __name__ == "__main__":
    for results in (search(str(Path("runs/tune").resolve())), population(str(Path("runs/tune").resolve()))):
        print(results.get_dataframe()[["round", "eval/gap", "bytes/total", "run_dir"]])
