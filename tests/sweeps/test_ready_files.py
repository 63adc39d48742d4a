"""The sweeps that come with rayfed run, shortened: few rounds, and a tiny model on tiny data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rayfed.reports.sweep_page import write_sweep_page
from rayfed.sweeps.sweep import SweepResult, run_sweep

FOLDER = Path(__file__).parents[2] / "configs" / "sweeps"
TEXT = (
    "data.source=files", "data.examples=null", "partition.clients=4", "lora.layers_to_transform=null",
    "eval.subset=null", "client.batch_size=4",
)  # fmt: skip
DENSITY = (
    "data={source: files, path: data}", "partition={kind: dirichlet, clients: 4}", "model.dtype=float32",
    "lora={rank: 8, alpha: 8, target_modules: [query, value]}", "sweep.cases.lora rank 4={lora.rank: 4, lora.alpha: 4}",
    "sweep.metric=eval/accuracy_masked", "sweep.fallback=eval/accuracy", "sweep.mode=max", "server.rounds=1",
    "server.cohort=2", "eval.subset=null", "sweep.parameters.client.lr={grid: [0.01]}",
    "sweep.parameters.seed={grid: [0]}",
)  # fmt: skip
SKEW = (
    "data={source: files, path: data}", "lora={rank: 8, alpha: 8, target_modules: [query, value]}",
    "model.dtype=float32", "server.rounds=1", "server.cohort=2", "sweep.parameters.client.lr={grid: [0.01]}",
    "sweep.parameters.partition={grid: [{kind: dirichlet, clients: 4}]}", "sweep.parameters.seed={grid: [0]}",
)  # fmt: skip
SHORT: dict[str, tuple[str, ...]] = {
    "bfloat16": (
        *TEXT, "server.rounds=1", "server.cohort=2", "client.steps=1", "lora.rank=8",
        "sweep.cases.fedhl.profiles={kind: tiers, ranks: [2, 4, 8]}", "sweep.parameters.seed={grid: [0]}",
        "sweep.cases.fedview.profiles={kind: tiers, ranks: [2, 4, 8]}",
    ),
    **{f"density_{task}": DENSITY for task in ("banking77", "cifar10", "goemotions", "shakespeare")},
    "class_sequence": (
        *TEXT, "partition.sequence.experiences=2", "server.rounds=2", "server.cohort=2", "client.epochs=1",
        "sweep.parameters.client.lr={grid: [0.01]}", "sweep.parameters.seed={grid: [0]}",
    ),
    "density_rank": (*TEXT, "server.rounds=1", "sweep.parameters.lora.rank={grid: [1, 2, 4]}"),
    "fair_over_the_air": (
        *TEXT, "server.rounds=1", "server.cohort=2", "lora.rank=8", "sweep.parameters.channel.snr={grid: [10.0]}",
        "sweep.parameters.client.lr={grid: [0.01]}", "sweep.parameters.seed={grid: [0]}",
    ),
    "fedhl_rate": (
        "sweep.parameters.server.rounds={grid: [1, 2]}", "sweep.parameters.client.lr={grid: [0.02]}",
        "sweep.parameters.seed={grid: [0]}",
    ),
    **{f"label_skew_{task}": SKEW for task in ("banking77", "cifar10")},
    "flasc_search": (
        *TEXT, "server.rounds=3", "sweep.search.rank=1", "sweep.search.max_rank=16", "sweep.search.rounds=1",
        "sweep.search.budget=12",
    ),
    "graph": (
        *TEXT, "data.test_examples=null", "partition={kind: iid, clients: 16}", "server.rounds=1", "client.steps=1",
        "lora.rank=8", "sweep.parameters.client.lr={grid: [0.01]}", "sweep.parameters.seed={grid: [0]}",
    ),
    "known_answer": (
        "server.rounds=1", "sweep.parameters.partition.clients={grid: [6]}",
        "sweep.parameters.client.steps={grid: [1]}", "sweep.parameters.client.lr={grid: [0.02]}",
        "sweep.parameters.seed={grid: [0]}",
    ),
    "learning_rates": (*TEXT, "server.rounds=4", "eval.every=1", "sweep.stop.grace=2"),
    "methods_banking77": (
        *TEXT, "server.rounds=1", "server.cohort=2", "client.steps=1", "profiles.ranks=[1, 2, 4, 8]", "lora.rank=8",
        "sweep.parameters.client.lr={grid: [0.01]}", "sweep.parameters.seed={grid: [0]}",
    ),
    "mixed_ranks": (
        *TEXT, "server.rounds=1", "server.cohort=2", "client.steps=1", "profiles.ranks=[1, 2, 4, 8]", "lora.rank=8",
        "lora.alpha=8", "sweep.parameters.seed={grid: [0]}",
    ),
    "optuna_accuracy_bytes": (
        *TEXT, "server.rounds=1", "sweep.search.trials=4", "sweep.search.batch=2", "sweep.search.startup=2",
        "sweep.parameters.lora.rank={choice: [1, 2, 4]}",
    ),
    "personal_cifar10": (
        "data={source: files, path: data}", "partition={kind: dirichlet, clients: 4, alpha: 0.5}",
        "lora={rank: 8, alpha: 8, target_modules: [query, value]}", "server.rounds=2", "server.cohort=2",
        "sweep.parameters.client.lr={grid: [0.01]}", "sweep.parameters.seed={grid: [0]}",
    ),
    "privacy": (
        *TEXT, "data.test_examples=null", "server.rounds=2", "server.cohort=2", "client.steps=1", "lora.rank=8",
        "sweep.parameters.privacy.noise_multiplier={grid: [0.0]}", "sweep.parameters.server.lr={grid: [0.01]}",
        "sweep.parameters.seed={grid: [0]}",
    ),
    "privacy_flasc": (
        *TEXT, "data.test_examples=null", "server.rounds=2", "server.cohort=2", "client.steps=1", "lora.rank=8",
        "sweep.parameters.privacy.noise_multiplier={grid: [0.0]}", "sweep.parameters.server.lr={grid: [0.01]}",
        "sweep.parameters.seed={grid: [0]}",
    ),
    "pbt": (
        *TEXT, "server.rounds=2", "eval.every=1", "lora.rank=4", "sweep.search.rounds=1", "sweep.search.population=3",
    ),
}  # fmt: skip


@pytest.fixture
def run_short(tiny_bert: Path, tiny_data: Path, tmp_path: Path) -> Callable[[str], SweepResult]:
    def run(name: str) -> SweepResult:
        place = (
            (f"data.path={tiny_data}", f"model.name={tiny_bert}") if name not in ("known_answer", "fedhl_rate") else ()
        )
        overrides = [*SHORT[name], *place, "tracking.console=off", "tracking.wandb=off"]
        return run_sweep(FOLDER / f"{name}.yaml", overrides, out=tmp_path / "out")

    return run


def test_each_file_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SHORT)


@pytest.mark.usefixtures("here")
def test_density_rank(run_short: Callable[[str], SweepResult]) -> None:
    result = run_short("density_rank")
    assert not result.failed
    assert [row[:2] for row in result.table.rows[:4]] == [("1/4", "1"), ("1/4", "2"), ("1/4", "4"), ("1/16", "1")]
    assert len(result.rows) == len(result.table.rows) == 9


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", SHORT)
def test_on_ray(run_short: Callable[[str], SweepResult], name: str) -> None:
    result = run_short(name)
    assert not result.failed
    assert result.table.rows
    write_sweep_page(result.out)
    assert (result.out / "report.html").is_file()
