"""Every method runs end to end: mixed ranks where the method allows them, resumed to the same bits, exported.

All methods run on the problem with a known answer. One method of every kind of state runs on a transformer as well: a
vector of factors, a matrix by layer, personal entries, a change of phase.
"""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from small_runs import lowrank

import rayfed
from rayfed.errors import UserError
from rayfed.methods import METHODS, build
from rayfed.wire import Ledger

ROUNDS = 3
SHORT = (f"server.rounds={ROUNDS}", "client.steps=2", "checkpoint.keep=10")
CASES = [*(("lowrank", name) for name in METHODS), *(("bert", name) for name in ("flasc", "fedhl", "fedsa", "slora"))]
OPTIONS = {"slora": ("method.rounds_sparse=2", "method.rho=0.5")}  # both of its stages
on_every_case = pytest.mark.parametrize(("problem", "name"), CASES)


@pytest.fixture(scope="module")
def settings(tiny):
    """settings(problem, name) -> the settings of a short run of the method, with mixed ranks if it allows them."""

    def make(problem: str, name: str) -> rayfed.Experiment:
        ranks = "[1,2,4]" if problem == "bert" else "[1,2]"
        mix = ("profiles.kind=tiers", f"profiles.ranks={ranks}") if build(name).mixed_ranks else ()
        return (tiny if problem == "bert" else lowrank)(f"method.name={name}", *OPTIONS.get(name, ()), *SHORT, *mix)

    return make


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """finished(problem, name) -> the finished run; each runs once."""
    runs: dict[tuple[str, str], rayfed.RunResult] = {}

    def run(*case: str) -> rayfed.RunResult:
        if case not in runs:
            runs[case] = rayfed.run(settings(*case), out=tmp_path_factory.mktemp("-".join(case)) / "run")
        return runs[case]

    return run


@on_every_case
def test_it_trains_and_counts_every_byte(finished, problem, name):
    result = finished(problem, name)
    metrics, ledger = result.metrics, Ledger.read(result.out / "ledger.parquet")
    assert len({record["state/digest"] for record in metrics}) == ROUNDS
    assert sum(record["bytes/down"] + record["bytes/up"] for record in metrics) == ledger.total_bytes
    for record in metrics:
        assert record["eval/loss"] > 0
        assert record["bytes/down"] > 0
        assert record["bytes/up"] > 0
    ranks = {key for record in metrics for key in record if key.startswith("clients/rank_")}
    if build(name).mixed_ranks:
        assert len(ranks) > 1  # a mix that is configured and never applied is the known trap


@on_every_case
def test_it_resumes_to_the_same_bits(finished, settings, tmp_path, problem, name):
    """As after a kill at the end of round 1: later checkpoints and rows are not there yet."""
    whole = finished(problem, name)
    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    for path in (out / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > 1:
            shutil.rmtree(path)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:1]))
    resumed = rayfed.run(settings(problem, name), out=out, resume=True)
    assert [r["state/digest"] for r in resumed.metrics] == [r["state/digest"] for r in whole.metrics]
    assert [r["bytes/total"] for r in resumed.metrics] == [r["bytes/total"] for r in whole.metrics]
    assert pq.read_table(out / "ledger.parquet").equals(pq.read_table(whole.out / "ledger.parquet"))


@on_every_case
def test_its_adapter_is_finite_and_of_the_rank_asked_for(finished, problem, name):
    out, rank = finished(problem, name).out, 4 if problem == "bert" else 2
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    factors = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    assert settings["r"] == rank
    assert all(rank in tensor.shape and bool(torch.isfinite(tensor).all()) for tensor in factors.values())
    assert any(bool(tensor.any()) for key, tensor in factors.items() if "lora_B" in key)
    assert 0 <= finished(problem, name).summary["export/lost_energy"] < 1


@pytest.mark.parametrize("name", [name for name in METHODS if name != "local"])  # it sends nothing
def test_a_density_that_decays_leaves_one_entry(tmp_path, name):
    """In round 2 a density is under one entry, in round 3 it is below the smallest float."""
    directions = ("up", "down") if build(name).sparse_down else ("up",)
    decays = [f"wire.{way}.{field}" for way in directions for field in ("density=0.5", "decay=1e-200")]
    for record in rayfed.run(lowrank(f"method.name={name}", *SHORT, *decays), out=tmp_path / "run").metrics[1:]:
        assert record["params/up"] == 2  # one entry a client
        assert record["params/down"] >= 2 * (len(directions) - 1)


@pytest.mark.parametrize("name", [name for name in METHODS if not build(name).mixed_ranks])
def test_mixed_ranks_are_refused_where_they_make_no_sense(tmp_path, name):
    with pytest.raises(
        UserError,
        match=rf"profiles\.kind: got 'tiers'.*{name} needs all of them at lora\.rank=2; mixed ranks are taken by fed",
    ):
        rayfed.run(lowrank(f"method.name={name}", "profiles.kind=tiers", "profiles.ranks=[1,2]"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name in METHODS if not build(name).sparse_down])
def test_sparse_downloads_are_refused_where_they_make_no_sense(name):
    for override, field in (("wire.down.density=0.5", "density"), ("wire.down.values=int8", "values")):
        with pytest.raises(UserError, match=rf"wire\.down\.{field}: got .*{name} sends down must arrive"):
            rayfed.run(lowrank(f"method.name={name}", override))
