"""Continuing at another rank or density: the same model, and where nothing changes the same bits."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from small_runs import LOWRANK

import rayfed
from rayfed.api.warm_start import check_rank_change, grow, grow_moments, warm_start
from rayfed.config import validate
from rayfed.config.training import Server
from rayfed.lora.adapter import Adapter, LowRank, fresh_adapter, scale_of
from rayfed.methods import METHODS
from rayfed.server.optimizers import ServerOptimizer
from rayfed.tracking import read_metrics

SHAPES = {"a": (6, 10), "b": (9, 4)}
VOLATILE = ("time/round_s", "time/train_s", "time/server_s", "state/chain")  # the chain covers all settings


def trained(rank: int, scale: float, seed: int = 0) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    layers = {
        name: LowRank(torch.randn(out, rank, generator=draw), torch.randn(rank, inner, generator=draw), scale)
        for name, (out, inner) in SHAPES.items()
    }
    return Adapter(layers, {"head.weight": torch.randn(3, 5, generator=draw)})


def fresh(rank: int, scale: float) -> Adapter:
    return fresh_adapter(SHAPES, {"head.weight": torch.zeros(3, 5)}, rank, scale, 7)


@pytest.mark.parametrize(("rank", "rslora"), [(2, False), (4, False), (8, False), (8, True), (6, False), (3, False)])
def test_a_grown_adapter_is_the_same_model(rank: int, rslora: bool) -> None:
    old, new = (scale_of(r, 16.0, rslora) for r in (2, rank))
    before, start = trained(2, old), fresh(rank, new)
    after = start.layout.unflatten(grow(before.flatten(), before.layout, start))
    for name, pair in before.layers.items():
        grown = after.layers[name]
        assert (grown.rank, grown.scale) == (rank, new)
        # Each rank's own product: bit for bit where the scales' ratio is a power of two.
        same = grown.scale * (grown.B[:, :2, None] * grown.A[:2])
        was = pair.scale * (pair.B[..., None] * pair.A)
        torch.testing.assert_close(same, was, rtol=0 if old / new in (1, 2, 4) else 3e-7, atol=0)
        assert not grown.B[:, 2:].any()
        assert torch.equal(grown.A[2:], start.layers[name].A[2:])  # as a run of that rank starts
    assert torch.equal(after.head["head.weight"], before.head["head.weight"])


def test_growing_backwards_is_refused() -> None:
    before, start = trained(4, 4.0), fresh(2, 8.0)
    with pytest.raises(ValueError, match="has rank 4 already"):
        grow(before.flatten(), before.layout, start)


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam", "adamw"])
def test_moments_grow_with_the_adapter(kind: str) -> None:
    """Moments of B are in B's new unit, and new entries know of no step."""
    settings = Server(optimizer=kind, lr=0.1)
    before, start = trained(2, 8.0), fresh(8, 2.0)
    optimizer = ServerOptimizer(kind, settings)
    optimizer.advance("vector", before.flatten(), trained(2, 8.0, seed=1).flatten())
    grown = grow_moments(optimizer.state, before.layout, start, optimizer.eps)
    assert grown.keys() == optimizer.state.keys()
    for name, tensor in grown.items():
        if tensor.ndim == 0:
            assert torch.equal(tensor, optimizer.state[name])
            continue
        old, new = before.layout.unflatten(optimizer.state[name]), start.layout.unflatten(tensor)
        power = 2 if name.endswith(("v", "exp_avg_sq")) else 1
        for layer, pair in old.layers.items():
            assert torch.equal(new.layers[layer].B[:, :2], pair.B * 4.0**power)
            assert torch.equal(new.layers[layer].A[:2], pair.A)
            # fedadam's second moment starts at eps^2 = 1e-6
            assert new.layers[layer].B[:, 2:].unique().tolist() == [pytest.approx(1e-6 * name.endswith(".v"))]
            assert new.layers[layer].A[2:].unique().tolist() == [pytest.approx(1e-6 * name.endswith(".v"))]
        assert torch.equal(new.head["head.weight"], old.head["head.weight"])


def experiment(rounds: int, rank: int = 2, density: float = 0.5, **server) -> rayfed.Experiment:
    return validate(
        LOWRANK
        | {"lora": {"rank": rank, "alpha": 4, "target_modules": ["layer"]}, "method": {"name": "flasc"}}
        | {"wire": {"down": {"density": density}, "up": {"density": density}}}
        | {"server": {"rounds": rounds, "cohort": 2, **server}}
    )


@pytest.mark.parametrize("server", [{"optimizer": "fedavgm", "momentum": 0.5}, {"optimizer": "adamw", "lr": 0.01}])
def test_continued_unchanged_it_is_the_unbroken_run(tmp_path: Path, server: dict) -> None:
    rayfed.run(experiment(3, **server), tmp_path / "a")
    longer = experiment(6, **server)
    (tmp_path / "b").mkdir()
    warm_start(tmp_path / "a", tmp_path / "b", longer)
    rayfed.run(longer, tmp_path / "b", resume=True)
    whole = rayfed.run(longer, tmp_path / "whole")
    ledgers = [pq.read_table(tmp_path / name / "ledger.parquet") for name in ("b", "whole")]
    assert ledgers[0].equals(ledgers[1])
    for ours, theirs in zip(read_metrics(tmp_path / "b" / "metrics.jsonl"), whole.metrics, strict=True):
        assert {k: v for k, v in ours.items() if k not in VOLATILE} == {
            k: v for k, v in theirs.items() if k not in VOLATILE
        }


@pytest.mark.parametrize(
    ("method", "objective"),
    [*((method, "plain") for method in METHODS), *(("fedit", name) for name in ("fedbc", "fedglomo", "scaffold"))],
)
def test_continued_at_another_rate_it_is_the_run_whose_rate_changed(
    tmp_path: Path, method: str, objective: str
) -> None:
    """With all state of every method and its clients: a warm-up of four rounds is 1/4, 2/4, 3/4 of the rate."""
    options = {"name": method} | ({"rounds_sparse": 1} if method == "slora" else {})
    settings = LOWRANK | {"method": options, "objective": {"name": objective}}

    def at(rate: float, rounds: int, **schedule) -> rayfed.Experiment:
        client = settings["client"] | {"lr": rate, "schedule": schedule}
        return validate(settings | {"client": client, "server": {"rounds": rounds, "cohort": 3}})

    source = tmp_path / "1"
    rayfed.run(at(0.02, 1), source)
    for rounds, rate in ((2, 0.04), (3, 0.06)):
        folder = tmp_path / str(rounds)
        folder.mkdir()
        warm_start(source, folder, at(rate, rounds))
        rayfed.run(at(rate, rounds), folder, resume=True)
        source = folder
    whole = rayfed.run(at(0.08, 3, warmup=4), tmp_path / "whole").metrics
    for ours, theirs in zip(read_metrics(source / "metrics.jsonl"), whole, strict=True):
        assert {k: v for k, v in ours.items() if k not in VOLATILE} == {
            k: v for k, v in theirs.items() if k not in VOLATILE
        }


def test_continued_at_another_density_it_is_the_run_whose_density_decayed(tmp_path: Path) -> None:
    first = experiment(1, density=0.5)
    rayfed.run(first, tmp_path / "a")
    (tmp_path / "b").mkdir()
    warm_start(tmp_path / "a", tmp_path / "b", experiment(2, density=0.25))
    ours = rayfed.run(experiment(2, density=0.25), tmp_path / "b", resume=True).metrics
    falling = {"density": 0.5, "decay": 0.5}
    whole = experiment(2).model_dump(mode="json") | {"wire": {"down": falling, "up": falling}}
    theirs = rayfed.run(validate(whole), tmp_path / "whole").metrics
    assert [(r["state/digest"], r["bytes/total"]) for r in ours] == [
        (r["state/digest"], r["bytes/total"]) for r in theirs
    ]


def test_vectors_of_an_objective_have_one_rank() -> None:
    check_rank_change(validate(LOWRANK | {"objective": {"name": "fedprox"}}))
    with pytest.raises(rayfed.UserError, match=r"^objective\.name: got 'scaffold', but sweep\.search continues runs"):
        check_rank_change(validate(LOWRANK | {"objective": {"name": "scaffold"}}))
    texts = {key: value for key, value in LOWRANK.items() if key not in ("problem", "partition")}
    check_rank_change(validate(texts | {"data": {"source": "stdlib"}, "objective": {"name": "fedimpro"}}))


def test_continued_at_another_rank_it_starts_from_the_same_gap(tmp_path: Path) -> None:
    """At a rate near 0, with all entries sent, the grown model has the same gap."""
    first = rayfed.run(experiment(3), tmp_path / "a")
    grown = experiment(4, rank=4, density=1.0, optimizer="fedavg")
    still = grown.client.model_copy(update={"lr": 1e-30, "momentum": 0.0, "steps": 1})
    grown = grown.model_copy(update={"client": still})
    (tmp_path / "b").mkdir()
    warm_start(tmp_path / "a", tmp_path / "b", grown)
    last = rayfed.run(grown, tmp_path / "b", resume=True).metrics
    assert [record["round"] for record in last] == [1, 2, 3, 4]
    assert last[3]["eval/gap"] == pytest.approx(first.metrics[-1]["eval/gap"], rel=1e-6)
    assert last[3]["bytes/down"] > 2 * last[2]["bytes/down"]
    assert last[3]["bytes/total"] == last[2]["bytes/total"] + last[3]["bytes/down"] + last[3]["bytes/up"]
