import numpy as np
import pytest

from rayfed.server.sampling import cohort

SIZES = np.array([5, 0, 3, 2, 0, 9, 1, 4])
HOLDERS = np.flatnonzero(SIZES)


def test_a_cohort_is_distinct_and_holds_data():
    for t in range(50):
        drawn = cohort(HOLDERS, 4, seed=0, t=t)
        assert len(set(drawn)) == 4
        assert all(SIZES[c] > 0 for c in drawn)


def test_every_holder_takes_part_equally_often():
    counts = np.zeros(len(SIZES))
    for t in range(3000):
        counts[cohort(HOLDERS, 2, seed=1, t=t)] += 1
    holders = SIZES > 0
    assert (counts[~holders] == 0).all()
    assert np.allclose(counts[holders], 1000, atol=120)  # over four standard deviations


def test_seeds_and_rounds_draw_their_own_cohorts():
    assert cohort(HOLDERS, 3, 0, 1) == cohort(HOLDERS, 3, 0, 1)
    assert [cohort(HOLDERS, 3, 0, t) for t in range(6)] != [cohort(HOLDERS, 3, 1, t) for t in range(6)]
    assert len({tuple(cohort(HOLDERS, 3, 0, t)) for t in range(6)}) > 1


def test_too_few_holders_are_refused():
    with pytest.raises(ValueError, match="larger sample than population"):
        cohort(HOLDERS, 7, 0, 0)
