"""The averages every method is compared with, and what clients are sent against what they trained."""

from __future__ import annotations

import pytest
import torch
from small_runs import lowrank

import rayfed
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import METHODS, build
from rayfed.methods.base import Profile, Update
from rayfed.server.evaluation.diagnostics import FIGURES, Diagnostics, Model

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
        fixed_gauge = True

        def delta(self, state, layer):
            return W

    starts = [Model({"layer": pairs[1]}, {"layer": W}), Model({"layer": pairs[0]}, {})]
    report = watch.figures(Fixed(), None, lambda client: starts[client.client])
    M = [bases[0] + pairs[0].dense(), pairs[1].dense()]
    S = [W + pairs[1].dense(), pairs[0].dense()]
    sent, excess, least = (
        [(x - y).double().square().sum() for x, y in zip(*own)] for own in ((S, M), (S, [D, D]), (M, [D, D]))
    )
    for suffix, squares in (("", sent), ("_excess", excess), ("_least", least)):
        expected = (p[0] * squares[0] + p[1] * squares[1]) ** 0.5
        assert report[f"diagnostics/R{suffix}"] == pytest.approx(float(expected), rel=1e-5)
    assert report["diagnostics/R_max"] == pytest.approx(float(max(sent)) ** 0.5, rel=1e-5)
    assert report["diagnostics/R_B"] is report["diagnostics/R_A_least"] is None  # the ranks differ
    assert report[PRODUCTS] == pytest.approx(float((W - D).norm() / D.norm()), rel=1e-5)
    assert report[MEANS] == pytest.approx(float((W - P).norm() / P.norm()), rel=1e-5)


def test_what_is_sent_to_all_is_off_by_the_spread_and_the_excess(tiny, tmp_path):
    """R^2 = R_least^2 + R_excess^2; FedIT sends the mean of factors, of which B's and A's spread is the least."""
    for record in records(tiny, tmp_path, "method.name=fedit"):
        R, largest, least, excess = (record[f"diagnostics/R{suffix}"] for suffix in FIGURES)
        assert pytest.approx(least**2 + excess**2) == R**2
        assert largest > R > least > excess > 0
        for part in ("B", "A"):
            R, largest, least, excess = (record[f"diagnostics/R_{part}{suffix}"] for suffix in FIGURES)
            assert excess < 1e-6 < least
            assert pytest.approx(least) == R
            assert largest > R


@pytest.mark.parametrize("name", [name for name in METHODS if not build(name).personal])
def test_the_identity_holds_for_every_method_of_one_rank(tmp_path, name):
    for record in rayfed.run(lowrank(f"method.name={name}", "eval.diagnostics=true"), tmp_path / "run").metrics:
        R, largest, least, excess = (record[f"diagnostics/R{suffix}"] for suffix in FIGURES)
        assert pytest.approx(least**2 + excess**2, rel=1e-6) == R**2
        assert largest >= R >= least > 0


def test_an_exact_method_has_no_excess_and_moving_factors_have_no_distance(tiny, tmp_path):
    for record in records(tiny, tmp_path, "method.name=fedex_lora"):
        assert record["diagnostics/R_excess"] < 1e-5 * record["diagnostics/R_least"]
        assert record["diagnostics/R"] == pytest.approx(record["diagnostics/R_least"])
        assert record["diagnostics/R_B"] is None


def test_what_was_cut_off_counts(tiny, tmp_path):
    """Sparse downloads and small ranks are further from what clients trained than the mean is."""
    sparse = ("method.name=flasc", "server.optimizer=fedavg", "server.weights=uniform", "wire.down.density=0.1")
    for record in records(tiny, tmp_path / "sparse", *sparse):
        assert record["diagnostics/R_B_excess"] > 1e-3
    mixed = ("method.name=flexlora", "profiles={kind: tiers, ranks: [1, 4]}", "server.cohort=6")
    for record in records(tiny, tmp_path / "mixed", *mixed):
        assert record["diagnostics/R_excess"] > 1e-3
        assert record[PRODUCTS] < 1e-6


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
