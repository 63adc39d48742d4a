"""The two averages every method is compared with, on a real run."""

from __future__ import annotations

import pytest
import torch

import rayfed
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods.base import Profile, Update
from rayfed.server.evaluation.diagnostics import Diagnostics

PRODUCTS, MEANS = "diagnostics/to_mean_of_products", "diagnostics/to_product_of_means"


def records(tiny, tmp_path, *overrides: str):
    settings = ("eval.diagnostics=true", "server.rounds=3", "server.weights=examples", *overrides)
    return rayfed.run(tiny(*settings), out=tmp_path / "run").metrics


def test_averaging_factors_is_the_product_of_means_and_no_mean_of_products(tiny, tmp_path):
    for record in records(tiny, tmp_path, "method.name=fedit"):
        assert record[MEANS] < 1e-6
        assert record[PRODUCTS] > 1e-4


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "flexlora"])
def test_exact_methods_are_the_mean_of_products(tiny, tmp_path, name):
    for record in records(tiny, tmp_path, f"method.name={name}"):
        assert record[PRODUCTS] < 1e-6
        assert record[MEANS] > 1e-4


def test_mixed_ranks_scales_and_a_base_against_plain_matrices():
    g = torch.Generator().manual_seed(0)
    pairs = [LowRank(torch.randn(5, r, generator=g), torch.randn(r, 4, generator=g), 8 / r) for r in (1, 3)]
    bases = [torch.randn(5, 4, generator=g), None]
    W = torch.randn(5, 4, generator=g)
    watch = Diagnostics()
    for k, (pair, base) in enumerate(zip(pairs, bases)):
        adapter = Adapter({"layer": pair}, {})
        vector = adapter.flatten()
        update = Update(Profile(k, pair.rank), 1.0 + k, torch.zeros_like(vector), vector, adapter.layout)
        watch.add(update, {} if base is None else {"layer": base})
    p = (1 / 3, 2 / 3)
    under = p[0] * bases[0]
    D = under + sum(share * pair.dense() for share, pair in zip(p, pairs))
    B, A = torch.zeros(5, 3), torch.zeros(3, 4)
    for share, pair in zip(p, pairs):
        B[:, : pair.rank] += share * pair.scale * pair.B
        A[: pair.rank] += share * pair.A
    P = under + B @ A

    class Fixed:
        def delta(self, state, layer):
            return W

    report = watch.report(Fixed(), None)
    assert report[PRODUCTS] == pytest.approx(float((W - D).norm() / D.norm()), rel=1e-5)
    assert report[MEANS] == pytest.approx(float((W - P).norm() / P.norm()), rel=1e-5)


@pytest.mark.parametrize("name", ["flasc", "fedit", "rolora"])
@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_looking_changes_nothing(tiny, tmp_path, name, values):
    """With the diagnostics on, the server adds up what the packs' workers add up without: to the bit, byte by byte."""
    settings = ["server.rounds=2", "server.cohort=7", "engine.pack=3", f"method.name={name}"]
    settings += [f"wire.up.values={values}"] + ["wire.up.density=0.25"] * (name == "flasc")
    looks = [
        rayfed.run(tiny(f"eval.diagnostics={look}", *settings), out=tmp_path / look).metrics
        for look in ("true", "false")
    ]
    for seen, unseen in zip(*looks):
        assert PRODUCTS in seen
        assert PRODUCTS not in unseen
        same = [key for key in unseen if not key.startswith("time/") and key != "state/chain"]  # it covers the settings
        assert {key: seen[key] for key in same} == {key: unseen[key] for key in same}
