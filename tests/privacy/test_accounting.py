"""Epsilon: equal to dp-accounting's own, and equal to what is known of FLASC's settings."""

from __future__ import annotations

import math

import pytest

from rayfed.errors import UserError
from rayfed.privacy import accounting
from rayfed.privacy.accounting import Guarantee, Uses, guarantee

DELTA = 1e-5
RDP, PLD = Guarantee(DELTA, "rdp"), Guarantee(DELTA, "pld")


@pytest.fixture(scope="module")
def dp():
    return pytest.importorskip("dp_accounting")


def poisson(rounds):
    return [Uses(rounds, "poisson", 10, 500)]


def test_flascs_settings_cost_what_is_known(dp):
    """10 of 500 clients a round, 200 rounds, z = 1. FLASC's own code reports about 2.2 for cohorts of a fixed size."""
    assert RDP.epsilon(poisson(200), 1.0) == pytest.approx(2.23, abs=0.005)
    assert PLD.epsilon(poisson(200), 1.0) == pytest.approx(1.853, abs=0.005)
    assert RDP.epsilon([Uses(200, "fixed", 10, 500)], 1.0) == pytest.approx(18.68, abs=0.005)
    assert RDP.epsilon([Uses(200, "fixed", 10, 500)], 2.0) == pytest.approx(
        3.417, abs=0.005
    )  # who forgets the 2 in 2 C


def test_epsilon_is_dp_accountings_own(dp):
    relation = dp.NeighboringRelation
    event = dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(0.8))
    ours = dp.rdp.RdpAccountant().compose(event, 30).get_epsilon(DELTA)
    assert RDP.epsilon(poisson(30), 0.8) == pytest.approx(ours, rel=1e-9)
    theirs = dp.pld.PLDAccountant().compose(event, 30).get_epsilon(DELTA)
    assert PLD.epsilon(poisson(30), 0.8) == pytest.approx(theirs, rel=1e-6)
    # Its PLD accountant doubles the sensitivity by itself where one unit is replaced; its RDP accountant does not.
    replaced = dp.pld.PLDAccountant(neighboring_relation=relation.REPLACE_ONE).compose(dp.GaussianDpEvent(20.0), 2)
    assert PLD.epsilon([Uses(2, "all")], 20.0) == pytest.approx(replaced.get_epsilon(DELTA), rel=1e-3)
    replaced = dp.rdp.RdpAccountant(neighboring_relation=relation.REPLACE_ONE).compose(dp.GaussianDpEvent(2.0), 3)
    assert RDP.epsilon([Uses(3, "all")], 4.0) == pytest.approx(replaced.get_epsilon(DELTA), rel=1e-9)


def everyone(rounds):
    """The fastest to account: every client takes part in every round."""
    return [Uses(rounds, "all")]


def test_noise_meets_its_target_and_hardly_less_does(dp):
    z = PLD.noise(everyone(50), 2.0)
    assert PLD.epsilon(everyone(50), z) <= 2.0 < PLD.epsilon(everyone(50), z * 0.998)


def test_a_budget_ends_before_the_round_that_exceeds_it(dp):
    rounds = PLD.rounds(everyone, 20.0, 2.0, 1000)
    assert PLD.epsilon(everyone(rounds), 20.0) <= 2.0 < PLD.epsilon(everyone(rounds + 1), 20.0)
    assert PLD.rounds(everyone, 1.0, 1.0, 1000) == 0
    assert PLD.rounds(everyone, 20.0, 2.0, 7) == 7


def test_the_worst_unit_counts(dp):
    assert PLD.epsilon([Uses(1, "all"), Uses(9, "all")], 2.0) == PLD.epsilon([Uses(9, "all")], 2.0)
    assert PLD.epsilon([Uses(0, "all")], 2.0) == 0.0


def test_without_noise_there_is_no_guarantee():
    assert RDP.epsilon(poisson(1), 0.0) == math.inf


def test_cohorts_of_a_fixed_size_have_no_loss_distribution():
    assert guarantee(DELTA, "auto", "fixed") == RDP
    assert guarantee(DELTA, "auto", "poisson") == PLD
    with pytest.raises(UserError, match=r"privacy\.accountant: got 'pld', but there is no .*poisson"):
        guarantee(DELTA, "pld", "fixed")


def test_a_target_that_no_noise_reaches_is_refused(dp, monkeypatch):
    monkeypatch.setattr(accounting, "MOST_NOISE", 8.0)
    with pytest.raises(UserError, match=r"privacy\.target_epsilon: got 0\.01, but no noise reaches it"):
        RDP.noise([Uses(5, "all")], 0.01)
