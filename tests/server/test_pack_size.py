"""The size of packs is a function of the measurements; a run that chose it is the run that was given it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rayfed
from rayfed.api import prepare
from rayfed.clients.messages import PackTiming
from rayfed.clients.pack_timing import measure, train_pack
from rayfed.config import load_config
from rayfed.engine.local_executor import LocalExecutor
from rayfed.errors import RunError, UserError
from rayfed.server.loop import Server
from rayfed.server.pack_size import LinearFit, choose_size, line, measure_job
from rayfed.server.sampling import client_costs, cohort

PLENTY = 10**9


def measured(sizes, fixed, each, taken=lambda k: 1):
    """Steps of ``fixed + each k`` seconds; a client has 10 tokens."""
    return [PackTiming(k, 10.0 * k, fixed + each * k, taken(k)) for k in sizes]


def size_of(fixed, each, cohort=12, workers=1, sizes=(1, 2, 4, 8, 12), memory=PLENTY, taken=lambda k: 1):
    return choose_size(measured(sizes, fixed, each, taken), cohort, workers, memory).size


def test_the_size_by_hand():
    # 12 clients, steps of 4 + k: packs of 12, 8, 4 take 16, 2 x 10, 3 x 8
    assert size_of(4, 1) == 12
    assert size_of(4, 1, workers=2) == 6  # larger packs leave a worker idle
    assert size_of(4, 1, workers=5) == 3  # 4 packs at once take 7; of 2 there are 6, in two turns of 6
    assert size_of(4, 1, workers=12) == size_of(4, 1, workers=40) == 1
    assert size_of(4, 1, workers=3, sizes=(1, 2, 4)) == 4
    assert size_of(4, 1, sizes=(1, 2, 4, 8)) == 6  # two packs either way, of 6 as of 8; never more than was measured
    assert size_of(0, 1) == 1  # nothing to gain
    assert size_of(0.02, 1) == 1  # 12 packs take 12.24, one takes 12.02: too little
    assert size_of(0.08, 1) == 3  # 12.96, 12.48, 12.32, ...: at most 3 % longer than the shortest, 12.08


def test_memory_limits_the_size():
    def taken(k):
        return 100 + 50 * k

    assert size_of(4, 1, memory=(100 + 50 * 12) * 10 // 8, taken=taken) == 12
    assert size_of(4, 1, memory=(100 + 50 * 5) * 10 // 8, taken=taken) == 4  # 5 fit; 3 packs either way
    assert size_of(4, 1, memory=10, taken=taken) == 1
    uneven = [PackTiming(1, 10, 5, 100), PackTiming(2, 20, 6, 400), PackTiming(3, 30, 7, 300)]
    bytes_ = choose_size(uneven, 3, 1, PLENTY).bytes
    assert all(bytes_.at(m.tokens) >= m.bytes * (1 - 1e-12) for m in uneven)


def test_a_line_by_hand():
    assert line([10], [5]) == LinearFit(0.0, 0.5)
    assert line([10, 20, 40], [7, 9, 13]) == LinearFit(pytest.approx(5), pytest.approx(0.2))
    assert line([10, 20], [1, 4]).fixed == 0  # its own would be negative
    assert line([10, 20], [4, 4 - 1e-3]).slope == 0
    assert line([10, 20], [0, 0]).at(30) == pytest.approx(0, abs=1e-9)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 10), st.integers(0, 10**9)), min_size=1, max_size=7),
    st.integers(1, 300), st.integers(1, 20), st.integers(0, 10**10),
)  # fmt: skip
def test_any_measurements_give_a_size_that_leaves_no_worker_idle(found, cohort, workers, memory):
    sizes = [PackTiming(k, 7.0 * k, seconds, taken) for k, seconds, taken in found]
    chosen = choose_size(sizes, cohort, workers, memory)
    assert 1 <= chosen.size <= min(-(-cohort // workers), max(k for k, *_ in found))
    assert min(chosen.seconds.fixed, chosen.seconds.slope, chosen.bytes.fixed, chosen.bytes.slope) >= 0
    assert choose_size(sizes, cohort, workers, memory) == chosen


def test_what_is_measured(tiny):
    plan = prepare(tiny("server.cohort=5", "engine.kind=ray", "engine.workers=2", "partition.kind=iid"))

    def sizes(cohort, workers=1, clients=12):
        changed = replace(
            plan,
            server=plan.server.model_copy(update={"cohort": cohort}),
            engine=plan.engine.model_copy(update={"workers": workers}),
            federation=replace(plan.federation, starts=np.linspace(0, 128, clients + 1).astype(int)),
        )
        return measure_job(changed).sizes

    assert sizes(10, workers=2) == (1, 2, 4, 5)
    assert sizes(10) == (1, 2, 4, 8, 10)
    assert sizes(8) == (1, 2, 4, 8)
    assert sizes(1) == (1,)
    assert sizes(100, clients=120)[-2:] == (32, 64)
    job = measure_job(plan)
    costs = client_costs(plan.federation, plan.client.model_copy(update={"steps": 1}))
    drawn = sorted(cohort(plan.federation.holders, 5, plan.seed, 0), key=lambda c: -costs[c])
    assert list(job.clients) == drawn[:3]


RUN = ("server.cohort=4", "server.rounds=3", "client.batch_size=4")


@pytest.fixture(scope="module")
def chosen(tiny, tmp_path_factory):
    """A run that chose for itself, and was stopped after its first round, and the number it chose."""
    out = tmp_path_factory.mktemp("auto") / "run"
    real = Server._round

    def stopped(self, t, *beside):
        if t == 1:
            raise RunError("stopped")
        return real(self, t, *beside)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "_round", stopped)
        with pytest.raises(RunError, match="stopped"):
            rayfed.run(tiny(*RUN, "engine.pack=auto"), out=out)
    return out, load_config(out / "config.yaml").engine.pack


def test_the_number_is_written_down_with_what_it_was_chosen_from(chosen):
    out, size = chosen
    record = json.loads((out / "pack.json").read_text())
    found = [PackTiming(**m) for m in record["measured"]]
    assert [m.size for m in found][:2] == [1, 2]
    assert all(m.seconds > 0 and m.bytes >= 0 for m in found)
    assert (record["cohort"], record["workers"]) == (4, 1)
    again = choose_size(found, record["cohort"], record["workers"], record["memory"])
    assert size == record["size"] == again.size
    assert json.loads(json.dumps(asdict(again))) == record
    assert f"engine.pack=auto: packs of {size} (a step: " in (out / "events.log").read_text()


def test_a_run_that_chose_resumes_with_its_number_and_no_other(tiny, tmp_path, chosen, monkeypatch):
    out, size = chosen
    other = size % 4 + 1
    with pytest.raises(UserError, match="was made with other settings"):
        rayfed.run(tiny(*RUN, f"engine.pack={other}"), out=out, resume=True)
    monkeypatch.setattr("rayfed.engine.rounds.choose_pack", lambda *_: pytest.fail("chosen again"))
    with pytest.raises(UserError, match="was made with other settings"):
        rayfed.run(tiny(*RUN, "engine.pack=auto", "seed=9"), out=out, resume=True)
    result = rayfed.run(tiny(*RUN, "engine.pack=auto"), out=out, resume=True)
    pinned = rayfed.run(tiny(*RUN, f"engine.pack={size}"), out=tmp_path / "pinned")
    assert [r["state/digest"] for r in result.metrics] == [r["state/digest"] for r in pinned.metrics]
    assert not (pinned.out / "pack.json").exists()
    assert rayfed.run(tiny(*RUN, f"engine.pack={size}"), out=out, resume=True).rounds == 3


def test_a_worker_that_has_no_room_for_a_client_is_said_in_one_line(tiny, tmp_path, monkeypatch):
    def train_pack(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("rayfed.clients.pack_timing.train_pack", train_pack)
    with pytest.raises(RunError, match=r"^client \d+: training it alone needs more memory than cpu has; lower [^\n]*$"):
        rayfed.run(tiny(*RUN, "engine.pack=auto"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_measuring_ends_where_memory_does(tiny):
    plan = prepare(tiny(*RUN, "engine.pack=auto", "server.cohort=6"))
    executor, job = LocalExecutor(plan), measure_job(plan)
    tried = []

    def small(context, members, **named):
        tried.append(len(members))
        if len(members) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_pack(context, members, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayfed.clients.pack_timing.train_pack", small)
        assert [m.size for m in measure(executor.trainer, job.clients, job.sizes, PLENTY)] == [1, 2]
        assert tried == [1] * 4 + [2] * 4 + [4]
    assert [m.size for m in measure(executor.trainer, job.clients, job.sizes, -1)] == [1]
    assert job.sizes == (1, 2, 4, 6)
    executor.close()
