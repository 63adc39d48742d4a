"""The rules of supervision, with a clock of the test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError

from rayfed.clients.messages import ClientOrder, EvalJob, FeatureJob, MeasureJob, TrainJob
from rayfed.config.execution import Engine
from rayfed.engine.supervision import FIRST, LONGEST_WAIT, SHORTEST, Losses, Supervision, describe
from rayfed.engine.worker_pool import reason_of
from rayfed.errors import RunError


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def supervision(**settings) -> tuple[Supervision, Clock]:
    clock = Clock()
    return Supervision(Engine(**settings), clock), clock


def training(*clients: int) -> TrainJob:
    return TrainJob(2, 0.1, tuple(ClientOrder(c, None, 0, None, 0, 1.0, "fp32") for c in clients))


def evaluation(rows: int) -> EvalJob:
    return EvalJob("test", 0, rows, None)


def test_a_deadline_is_a_multiple_of_the_slowest_time_a_client_or_row_took():
    rules, _ = supervision()
    assert rules.deadline(training(1), Losses()) == rules.start_deadline() == FIRST
    rules.job_done(training(1, 2), 100.0)
    rules.job_done(training(3), 40.0)
    assert rules.deadline(training(4, 5, 6), Losses()) == 10 * 50 * 3
    assert rules.deadline(evaluation(64), Losses()) == FIRST
    rules.job_done(evaluation(64), 128.0)
    assert rules.deadline(evaluation(32), Losses()) == 10 * 64
    rules.start_done(20.0)
    assert rules.start_deadline() == 200


def test_no_automatic_deadline_is_short_and_each_miss_makes_it_longer():
    rules, _ = supervision()
    rules.job_done(training(1), 0.1)
    losses = Losses()
    assert rules.deadline(training(1), losses) == SHORTEST
    rules.job_lost(training(1), losses, "hung", hung=True)
    assert rules.deadline(training(1), losses) == 4 * SHORTEST
    rules.job_lost(training(1), losses, "died")
    assert rules.deadline(training(1), losses) == 4 * SHORTEST


def test_a_deadline_that_is_set_is_the_deadline_of_jobs_and_null_is_none():
    rules, _ = supervision(deadline=7.0)
    assert rules.deadline(training(1), Losses(missed=3)) == 7
    assert rules.start_deadline() == FIRST
    rules, _ = supervision(deadline=None)
    assert rules.deadline(training(1), Losses()) == rules.start_deadline() == math.inf


def test_a_pack_that_kills_workers_while_others_succeed_ends_the_run():
    rules, _ = supervision(retries=3)
    losses = Losses()
    for _ in range(3):
        rules.job_lost(training(7, 9), losses, "exit code 1")
    for _ in range(100):
        rules.job_done(training(1), 1.0)
    with pytest.raises(RunError) as end:
        rules.job_lost(training(7, 9), losses, "exit code 1")
    assert str(end.value) == (
        "round 3, training clients 7, 9: its worker was lost 4 times in a row, more often than by chance "
        "(engine.retries=3): exit code 1"
    )


def test_with_nothing_but_its_workers_starts_to_compare_with_a_pack_ends_the_run_after_twelve():
    rules, _ = supervision(retries=3)
    losses = Losses()
    for _ in range(11):
        rules.job_lost(training(7), losses, "exit code 1")
        rules.start_done(1.0)
    with pytest.raises(RunError, match="12 times in a row"):
        rules.job_lost(training(7), losses, "exit code 1")


@pytest.mark.parametrize("killed", [0.2, 0.5, 0.8])
def test_evictions_that_strike_all_packs_end_no_run(killed):
    """10,000 packs and as many starts of which each is lost with the same probability."""
    rules, _ = supervision(retries=3)
    draw = np.random.default_rng(0)
    worst = 0
    for _ in range(10_000):
        losses = Losses()
        while draw.random() < killed:
            rules.job_lost(training(1), losses, "evicted")
            while draw.random() < killed:
                rules.start_failed("evicted")
            rules.start_done(1.0)
        rules.job_done(training(1), 1.0)
        worst = max(worst, losses.count)
    assert worst > 3  # the rule that counts losses alone would have ended this run


def test_a_pack_alone_is_no_more_suspect_than_the_starts_that_fail_with_it():
    rules, _ = supervision(retries=0)
    losses = Losses()
    for _ in range(15):
        rules.job_lost(training(1), losses, "evicted")
        rules.start_failed("evicted")
    assert losses.count == 15  # far above engine.retries, and the run goes on


def test_failed_starts_wait_longer_and_longer_and_a_good_one_ends_that():
    rules, _ = supervision()
    assert rules.wait_before_start() == 0
    waits = []
    for _ in range(8):
        rules.start_failed("evicted")
        waits.append(rules.wait_before_start())
    assert waits == [1, 2, 4, 8, 16, LONGEST_WAIT, LONGEST_WAIT, LONGEST_WAIT]
    rules.start_done(1.0)
    assert rules.wait_before_start() == 0


def test_workers_that_raise_at_every_start_end_the_run():
    rules, _ = supervision(retries=2)
    for _ in range(2):
        rules.start_failed("OSError: no weights", raised=True)
        rules.start_failed("evicted")
    with pytest.raises(RunError, match="no worker could be started, tried 3 times: OSError: no weights"):
        rules.start_failed("OSError: no weights", raised=True)


def test_a_run_in_which_nothing_finishes_ends_and_says_why():
    rules, clock = supervision(stall_s=100.0)
    clock.now = 1e6
    rules.check(0.0)  # without a failure a job may take as long as it likes
    rules.start_failed("evicted")
    clock.now += 99
    rules.check(0.0)
    rules.job_done(training(1), 1.0)
    clock.now += 99
    rules.check(0.0)
    rules.start_failed("evicted again")
    clock.now += 101
    rules.check(150.0)  # a running job has its deadline
    with pytest.raises(RunError, match=r"no job has finished for 100 s.*\(engine.stall_s=100\): evicted again"):
        rules.check(50.0)
    with pytest.raises(RunError):
        rules.check(math.inf)  # without deadlines there is nothing to wait for


def test_the_time_between_rounds_is_no_stall():
    rules, clock = supervision(stall_s=100.0)
    rules.idle_lost("node lost")
    rules.placed(False)
    clock.now = 1000.0
    rules.begin()
    rules.check(0.0)


def test_workers_without_a_place_end_the_run_unless_it_waits_for_nodes():
    rules, clock = supervision(stall_s=100.0)
    rules.placed(False)
    clock.now = 99.0
    rules.placed(False)
    rules.check(0.0)
    rules.placed(True)
    clock.now = 150.0
    rules.placed(False)
    clock.now = 260.0
    with pytest.raises(RunError, match="no worker has got a place on the cluster for 100 s"):
        rules.check(1000.0)
    rules, clock = supervision(stall_s=100.0, wait_for_nodes=True)
    rules.idle_lost("node lost")
    clock.now = 1000.0
    rules.placed(False)
    rules.check(0.0)


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (training(5), "round 3, training client 5"),
        (evaluation(64), "evaluation of the test rows 0 to 63 in order of length"),
        (FeatureJob("train", 64, 128), "features of the train rows 64 to 127 in order of length"),
        (MeasureJob((3, 4), (1, 2)), "engine.pack=auto, measuring clients 3, 4"),
    ],
)
def test_a_job_in_words(job, text):
    assert describe(job) == text


def test_out_of_memory_is_named():
    text = "Task was killed due to the node running low on memory.\nMemory on the node ...\nRefer to the documentation"
    named = "killed by Ray because its node ran out of memory"
    assert reason_of(OutOfMemoryError(text)) == named
    assert "\n" not in reason_of(ActorDiedError()) != named
