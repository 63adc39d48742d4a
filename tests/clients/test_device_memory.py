"""Out of memory is recognised, the pack is split by its rule, and nothing that was half trained is used."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

import rayfed
from rayfed.clients import device_memory, trainer
from rayfed.errors import RunError

CPU = torch.device("cpu")
RUN = ("engine.pack=5", "server.cohort=5", "client.momentum=0.9", "lora.dropout=0.1", "client.batch_size=2")


def test_what_torch_raises_where_memory_does_not_do():
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    assert device_memory.ran_out(error.value)
    assert device_memory.ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    assert not device_memory.ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not device_memory.ran_out(RunError("client 3: training gave values that are not finite"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_a_peak_is_seen_forgotten_and_seen_again():
    size = 1 << 27
    for _ in range(2):
        held = device_memory.forget_peak(CPU)
        torch.ones(size, dtype=torch.uint8)
        assert 0.9 * size < device_memory.peak(CPU) - held < 1.5 * size  # the kernel counts in batches
    held = device_memory.forget_peak(CPU)
    assert device_memory.peak(CPU) - held < size / 2


def test_workers_share_what_is_free(tiny):
    alone = device_memory.free(tiny().engine)
    assert 0 < device_memory.free(tiny("engine.kind=ray", "engine.workers=4").engine) < alone / 2


@pytest.fixture
def small_memory(monkeypatch):
    """small_memory(2): packs of more than two clients run out of it at their second batch; counts the tries."""
    real, tried = trainer.train_pack, []

    def limit(most):
        def train_pack(context, members, **named):
            batches = []

            def checked(inputs):
                batches.append(inputs)
                if len(members) > most and len(batches) == 2:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return context.forward(inputs)

            tried.append(len(members))
            return real(replace(context, forward=checked), members, **named)

        monkeypatch.setattr(trainer, "train_pack", train_pack)
        return tried

    return limit


def test_a_pack_that_does_not_fit_is_the_plan_with_its_halves(tiny, tmp_path, monkeypatch, small_memory):
    with pytest.MonkeyPatch.context() as patch:

        def halves(clients, size, costs):
            return [list(clients[:2]), list(clients[2:3]), list(clients[3:])]

        patch.setattr("rayfed.server.loop.plan_packs", halves)
        planned = rayfed.run(tiny(*RUN), out=tmp_path / "planned")
    tried = small_memory(2)
    split = rayfed.run(tiny(*RUN), out=tmp_path / "split")
    assert tried == [5, 3, 2, 1, 2] * 2
    assert [r["state/digest"] for r in split.metrics] == [r["state/digest"] for r in planned.metrics]
    assert [r["clients/split"] for r in split.metrics] == [5, 5]
    assert [r["clients/split"] for r in planned.metrics] == [0, 0]
    assert [r["clients/ok"] for r in split.metrics] == [5, 5]
    assert (split.out / "events.log").read_text().count("split") == 1


def test_a_client_that_does_not_fit_alone_ends_the_run(tiny, tmp_path, small_memory):
    assert small_memory(0) == []
    with pytest.raises(RunError, match=r"client \d+: training it alone needs more memory than cpu has; lower [^\n]*$"):
        rayfed.run(tiny(*RUN), out=tmp_path / "run")


def test_a_batch_that_does_not_fit_is_evaluated_by_halves(tiny, tmp_path, monkeypatch):
    """Loss to rounding, accuracy exactly; what the controls see of the frozen base as well."""
    settings = ("engine.padding=batch", "eval.controls=true", "client.batch_size=4")
    whole = rayfed.run(tiny(*settings), out=tmp_path / "whole").metrics[-1]
    forward, rows = trainer.Trainer.forward, []

    def small(self, inputs):
        (rows_of_batch,) = {len(tensor) for tensor in inputs.values()}
        if rows_of_batch > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rows.append(rows_of_batch)
        return forward(self, inputs)

    monkeypatch.setattr(trainer.Trainer, "forward", small)
    monkeypatch.setattr(
        device_memory, "free_unused", lambda device: None
    )  # nothing really ran out, and it takes a second or so
    run = rayfed.run(tiny(*settings), out=tmp_path / "parts")
    assert max(rows) > 2
    for key in ("eval/loss", "test/loss", "eval/accuracy", "test/accuracy"):
        assert run.metrics[-1][key] == pytest.approx(whole[key], rel=1e-5 if "loss" in key else 0)

    def none(self, inputs):
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, inputs)

    monkeypatch.setattr(trainer.Trainer, "forward", none)
    with pytest.raises(RunError, match=r"validation row \d+: evaluating it needs more memory than cpu has; lower"):
        rayfed.run(tiny(*settings), out=tmp_path / "none")


def test_halves_are_a_fixed_rule():
    tried = []

    def work(items):
        tried.append(list(items))
        if len(items) > 2:
            raise MemoryError
        return sum(items)

    assert device_memory.in_halves([1, 2, 3, 4, 5], work, CPU, str) == [3, 3, 9]
    assert tried == [[1, 2, 3, 4, 5], [1, 2, 3], [1, 2], [3], [4, 5]]
    with pytest.raises(ZeroDivisionError):  # not a matter of memory
        device_memory.in_halves([1, 0], lambda items: 1 // items[1], CPU, str)


def test_without_linuxs_account_the_peak_is_the_whole_lifes(monkeypatch, tmp_path):
    monkeypatch.setattr(device_memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(device_memory, "FORGET", tmp_path / "none" / "either")
    held = device_memory.forget_peak(CPU)
    torch.ones(1 << 28, dtype=torch.uint8)
    assert device_memory.peak(CPU) >= held > 0


def test_a_containers_limit_counts(monkeypatch, tmp_path, tiny):
    (tmp_path / "max").write_text("5000000\n")
    (tmp_path / "current").write_text("2000000\n")
    monkeypatch.setattr(device_memory, "LIMIT", tmp_path / "max")
    monkeypatch.setattr(device_memory, "USED", tmp_path / "current")
    assert device_memory.free(tiny().engine) == 3_000_000
    (tmp_path / "max").write_text("max\n")
    assert device_memory.free(tiny().engine) > 3_000_000
