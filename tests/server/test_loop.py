"""A run's records and files: bytes as they were encoded, checkpoints, evaluation of the exported model."""

from __future__ import annotations

import itertools
import json
import time
from contextlib import closing

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from small_runs import lowrank

import rayfed
from rayfed import wire
from rayfed.api import prepare
from rayfed.clients.messages import EvalJob
from rayfed.clients.trainer import Trainer
from rayfed.engine.local_executor import LocalExecutor
from rayfed.errors import RunError
from rayfed.lora.adapter import Layout
from rayfed.server import checkpoint as checkpoints
from rayfed.server import star
from rayfed.server.executor import SubmissionResult, in_order
from rayfed.server.loop import Server
from rayfed.tasks.models.base import load_base
from rayfed.tracking import Sink

KEYS = {
    "round", "train/loss", "eval/loss", "eval/accuracy", "bytes/down", "bytes/up", "bytes/total", "params/down",
    "params/up", "time/round_s", "time/train_s", "time/server_s", "clients/ok", "clients/retried", "clients/split",
    "state/digest", "state/chain",
}  # fmt: skip


@pytest.fixture(scope="module")
def sparse_run(tiny, tmp_path_factory):
    """A finished sparse run and every payload that passed, in order: (direction, bytes)."""
    passed: list[tuple[str, bytes]] = []
    add = wire.Ledger.add

    def spy(self, **row):
        passed.append((row["direction"], bytes(row["payload"])))
        add(self, **row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire.Ledger, "add", spy)
        experiment = tiny(
            "server.rounds=4", "wire.down.density=0.25", "wire.up.density=0.0625", "eval.every=2",
            "eval.diagnostics=true",  # so that the server sees every upload, not the sums alone
        )  # fmt: skip
        result = rayfed.run(experiment, out=tmp_path_factory.mktemp("sparse") / "run")
    return experiment, result, passed


def test_every_record_has_the_public_keys(sparse_run):
    _, result, _ = sparse_run
    assert [record["round"] for record in result.metrics] == [1, 2, 3, 4]
    assert all(set(record) >= KEYS for record in result.metrics)
    assert [record["eval/accuracy"] is None for record in result.metrics] == [True, False, True, False]
    assert result.metrics[-1]["test/accuracy_masked"] is not None


def test_the_servers_seconds_are_those_in_which_it_does_not_wait_for_clients(tiny, tmp_path, monkeypatch):
    execute = Trainer.execute
    monkeypatch.setattr(Trainer, "execute", lambda *given: time.sleep(0.05) or execute(*given))
    for record in rayfed.run(tiny("eval.every=2"), out=tmp_path / "run").metrics:  # three packs of one client
        assert record["time/train_s"] - record["time/server_s"] >= 3 * 0.05
        assert 0 < record["time/server_s"] < record["time/train_s"] <= record["time/round_s"]


def test_the_ledger_is_the_sum_of_the_encoded_lengths(sparse_run):
    _, result, passed = sparse_run
    table = pq.read_table(result.out / "ledger.parquet").to_pandas()
    assert len(table) == len(passed) == 4 * 3 * 2
    for direction in ("down", "up"):
        lengths = sum(len(payload) for d, payload in passed if d == direction)
        assert table[table.direction == direction].bytes.sum() == lengths
        assert sum(record[f"bytes/{direction}"] for record in result.metrics) == lengths
        values = sum(wire.decode(payload).count for d, payload in passed if d == direction)
        assert sum(record[f"params/{direction}"] for record in result.metrics) == values
    assert result.metrics[-1]["bytes/total"] == sum(len(payload) for _, payload in passed)
    assert (table.bytes == table.bytes_header + table.bytes_indices + table.bytes_values).all()


def test_messages_have_the_density_of_the_settings(sparse_run):
    experiment, _, passed = sparse_run
    n = wire.decode(passed[0][1]).n
    for direction, payload in passed:
        density = getattr(experiment.wire, direction).density
        assert wire.decode(payload).count == wire.keep_count(n, density)


def test_the_adapter_gives_the_runs_own_evaluation(sparse_run):
    experiment, result, _ = sparse_run
    same_evaluation(experiment, result, rayfed.load_model(result.out))


def same_evaluation(experiment, result, model):
    """The model on the test split: loss and accuracy of the last record."""
    federation = prepare(experiment).federation
    loss, correct = 0.0, 0
    for row in range(len(federation.test)):
        batch = federation.test.batch(np.array([row]), padded=True)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        loss += float(torch.nn.functional.cross_entropy(logits, labels))
        correct += int(logits.argmax(-1) == labels)
    assert correct / len(federation.test) == result.metrics[-1]["test/accuracy"]
    assert loss / len(federation.test) == pytest.approx(result.metrics[-1]["test/loss"], rel=1e-5)


def test_masked_metrics_are_of_the_model_under_the_rounds_first_mask(tiny, tmp_path):
    """FLASC's code evaluates P * M with the mask M of the round's start, P after it."""
    experiment = tiny("server.rounds=2", "wire.down.density=0.1", "client.lr=0.5", "checkpoint.keep=2")
    result = rayfed.run(experiment, out=tmp_path / "run")
    folder = result.out / "checkpoints"
    before, after = (load_file(folder / f"round-00000{r}" / "state.safetensors")["method.vector"] for r in (1, 2))
    layout = checkpoints.manifests(folder)[0].facts["layout"]
    plan = prepare(experiment)
    job = EvalJob("test", 0, len(plan.federation.test), Layout.from_json(layout))
    masked = Trainer(plan).execute(job, [wire.encode(after * wire.top_mask(before, 0.1))])
    assert masked.loss / masked.count == pytest.approx(result.metrics[-1]["test/loss_masked"], rel=1e-6)
    assert result.metrics[-1]["test/loss_masked"] != result.metrics[-1]["test/loss"]


def test_training_learns_the_tiny_task(tiny, tmp_path):
    experiment = tiny(
        "server.rounds=8", "server.cohort=12", "method.name=fedit", "client.optimizer=adamw", "client.lr=0.02",
        "client.epochs=3", "eval.every=8", "partition.kind=iid",
    )  # fmt: skip
    result = rayfed.run(experiment, out=tmp_path / "run")
    assert result.metrics[-1]["test/accuracy"] > 0.5  # chance is 0.25, four of its deviations 0.22
    assert result.metrics[-1]["train/loss"] < 0.6 * result.metrics[0]["train/loss"]


def test_head_only_training_sends_the_head_and_exports_a_silent_adapter(tiny, tmp_path):
    result = rayfed.run(tiny("lora.train=head"), out=tmp_path / "run")
    assert result.metrics[0]["params/down"] == 3 * (4 * 32 + 4)
    tensors = load_file(result.out / "adapter" / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    assert sum("lora_A" in name for name in tensors) == 4
    rayfed.load_model(result.out)


def test_a_frozen_head_is_neither_trained_nor_sent_but_exported(tiny, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    experiment = tiny(
        "model.head=frozen", "model.pooling=stock", "method.name=fedit", "client.lr=0.5", "eval.controls=true",
        "lora.target_modules=all-linear",
    )  # fmt: skip
    result = rayfed.run(experiment, out=tmp_path / "run")
    tensors = load_file(result.out / "adapter" / "adapter_model.safetensors")
    (weight,) = (tensor for name, tensor in tensors.items() if name.endswith("classifier.weight"))
    torch.testing.assert_close(weight @ weight.T, torch.eye(4), atol=1e-5, rtol=0)
    assert not any("classifier" in name and "lora" in name for name in tensors)
    factors = sum(tensor.numel() for name, tensor in tensors.items() if "lora" in name)
    assert result.metrics[-1]["params/up"] == 3 * factors
    assert result.metrics[-1]["test/loss"] != result.metrics[0]["test/loss"]
    assert result.summary["head_only/test_accuracy"] is None
    base = AutoModelForSequenceClassification.from_pretrained(experiment.model.name, num_labels=4)  # its head: any
    same_evaluation(experiment, result, PeftModel.from_pretrained(base, str(result.out / "adapter")).eval())


def test_a_frozen_heads_rows_are_keyed_by_the_seed(tiny):
    def rows(seed: int, pooling: str) -> torch.Tensor:
        settings = tiny("model.head=frozen", f"model.pooling={pooling}").model
        return load_base(settings, 40, seed).model.get_submodule("classifier").weight

    for pooling in ("stock", "mean"):
        first, again, other = rows(0, pooling), rows(0, pooling), rows(1, pooling)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        # 40 classes of 32 features: the columns are orthonormal
        torch.testing.assert_close(first.T @ first, torch.eye(32), atol=1e-5, rtol=0)


def test_the_control_is_the_head_only_run(tiny, tmp_path):
    """Measured on stored features, the control gives what a run that trains the head alone gives, step for step."""
    settings = ("server.rounds=6", "server.cohort=6", "eval.every=6", "client.lr=0.5")
    whole = rayfed.run(tiny(*settings, "eval.controls=true", "wire.up.density=0.1"), out=tmp_path / "whole")
    same = ("lora.train=head", "method.name=fedit", "server.weights=uniform", "server.optimizer=adamw")
    alone = rayfed.run(tiny(*settings, *same), out=tmp_path / "alone")
    assert whole.summary["head_only/test_accuracy"] == alone.summary["final/test_accuracy"]
    untrained = rayfed.run(tiny(*settings, *same, "client.lr=1e-9", "server.optimizer=fedavg"), out=tmp_path / "none")
    assert untrained.summary["final/test_accuracy"] != alone.summary["final/test_accuracy"]
    assert 0.25 < whole.summary["head_only/test_accuracy_central"] <= 1


@pytest.mark.parametrize("options", [("method.train=masked",), ("method.mask=fixed", "method.train=masked")])
def test_masked_training_moves_only_what_travelled_and_sends_no_indices(tiny, tmp_path, options):
    """Federated Select and SparseAdapter: both sides know the mask, so uploads are values alone.

    The density is high, since a mask that leaves out all of B = 0 and the small head leaves nothing that can move.
    """
    experiment = tiny(
        "server.rounds=3", "server.optimizer=fedavg", "wire.down.density=0.6", "wire.up.density=0.6", *options,
        "checkpoint.keep=3",
    )  # fmt: skip
    result = rayfed.run(experiment, out=tmp_path / "run")
    folder = result.out / "checkpoints"
    states = [load_file(folder / f"round-00000{r}" / "state.safetensors") for r in (1, 2, 3)]
    masks = []
    for before, after in itertools.pairwise(states):
        mask = wire.top_mask(before.get("method.anchor", before["method.vector"]), 0.6)
        moved = before["method.vector"] != after["method.vector"]
        assert moved.any()
        assert not (moved & ~mask).any()
        masks.append(mask)
    if "method.mask=fixed" in options:
        assert torch.equal(masks[0], masks[1])
        n = len(states[0]["method.vector"])
        sparse = 3 * wire.keep_count(n, 0.6)
        assert [r["params/down"] for r in result.metrics] == [3 * n, sparse, sparse]  # one dense round
        assert [r["params/up"] for r in result.metrics] == [sparse] * 3
    table = pq.read_table(result.out / "ledger.parquet").to_pandas()
    uploads = table[(table.direction == "up") & (table["round"] > 1)]
    assert (uploads.bytes_indices == 0).all()


@pytest.mark.parametrize("values", ["bf16", "fp16", "int8", "qsgd8"])
def test_coarse_numbers_halve_the_bytes_and_still_train(tiny, tmp_path, values):
    coarse = rayfed.run(tiny(f"wire.down.values={values}", f"wire.up.values={values}"), out=tmp_path / "coarse")
    fine = rayfed.run(tiny(), out=tmp_path / "fine")
    assert coarse.summary["bytes/total"] < 0.6 * fine.summary["bytes/total"]
    assert coarse.metrics[-1]["train/loss"] == pytest.approx(fine.metrics[-1]["train/loss"], rel=0.05)


def test_early_stop_stops_and_stays_stopped(tiny, tmp_path):
    stop = ("server.rounds=30", "client.lr=1e-9", "eval.early_stop={patience: 2}", "server.optimizer=fedavg")
    result = rayfed.run(tiny(*stop), out=tmp_path / "run")
    assert result.rounds == 3  # the first evaluation sets the mark, two more do not beat it
    again = rayfed.run(tiny(*stop), out=tmp_path / "run", resume=True)
    assert again.rounds == 3
    assert len(again.metrics) == 3


def test_a_limit_on_traffic_ends_the_run_with_an_evaluated_round(tiny, tmp_path):
    settings = ("server.rounds=30", "eval.every=30")
    one = rayfed.run(tiny(*settings, "server.rounds=1"), out=tmp_path / "one").metrics[0]["bytes/total"]
    limit = ("server.max_mb=" + str(2.5 * one / 1e6), *settings)
    result = rayfed.run(tiny(*limit), out=tmp_path / "run")
    assert result.rounds == 3  # the first in which all messages together reach the limit
    assert result.metrics[-1]["eval/accuracy"] is not None
    assert result.metrics[-2]["eval/accuracy"] is None
    assert rayfed.run(tiny(*limit), out=tmp_path / "run", resume=True).rounds == 3


def test_resume_of_a_finished_run_changes_nothing(tiny, tmp_path):
    first = rayfed.run(tiny(), out=tmp_path / "run")
    before = {p: p.read_bytes() for p in first.out.rglob("*") if p.is_file() and p.name != "events.log"}
    again = rayfed.run(tiny(), out=tmp_path / "run", resume=True)
    assert {p: p.read_bytes() for p in again.out.rglob("*") if p.is_file() and p.name != "events.log"} == before
    assert again.summary == first.summary


def test_checkpoints_are_thinned_and_hold_no_pickle(tiny, tmp_path):
    out = rayfed.run(tiny("server.rounds=5", "checkpoint.every=2", "checkpoint.keep=2"), out=tmp_path / "run").out
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["round-000004", "round-000005"]
    files = {p.name for p in out.rglob("*") if p.is_file()}
    assert files == {
        "config.yaml", "metrics.jsonl", "summary.json", "events.log", "state.safetensors", "checkpoint.json",
        "part-000002.parquet", "part-000004.parquet", "part-000005.parquet",
        "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "classes.json", "README.md",
        "tokenizer.json", "tokenizer_config.json", "partition.json",
    }  # fmt: skip
    assert json.loads((out / "adapter" / "classes.json").read_text()) == ["app", "card", "loan", "rate"]


def test_divergence_is_one_line_not_a_silent_nan(tiny, tmp_path):
    with pytest.raises(RunError, match="not finite"):
        rayfed.run(tiny("client.lr=1e30", "client.epochs=4"), out=tmp_path / "run")


def test_the_digest_sees_every_bit():
    a = {"x": torch.zeros(3)}
    digest = checkpoints.state_digest(1, a, {})
    assert digest == checkpoints.state_digest(1, {"x": torch.zeros(3)}, {})
    assert digest != checkpoints.state_digest(2, a, {})
    assert digest != checkpoints.state_digest(1, {"x": -torch.zeros(3)}, {})
    assert digest != checkpoints.state_digest(1, {"y": torch.zeros(3)}, {})
    assert digest != checkpoints.state_digest(1, {}, a)
    assert digest != checkpoints.state_digest(1, {"x": torch.zeros(3, 1)}, {})
    assert digest != checkpoints.state_digest(1, a, {}, objective=a)
    assert checkpoints.state_digest(1, {}, a) != checkpoints.state_digest(1, {}, {}, objective=a)


@pytest.mark.parametrize("pack", [1, 2])
def test_the_server_decodes_no_upload_where_a_sum_is_enough(tmp_path, monkeypatch, pack):
    settings = (f"engine.pack={pack}", "server.cohort=5", "wire.up.density=0.1")
    decoded = rayfed.run(lowrank(*settings, "eval.diagnostics=true"), out=tmp_path / "decoded").metrics
    monkeypatch.setattr(star, "_decoded", None)
    summed = rayfed.run(lowrank(*settings), out=tmp_path / "summed").metrics
    for key in ("state/digest", "bytes/up", "clients/ok"):
        assert [record[key] for record in summed] == [record[key] for record in decoded]


def test_results_are_put_in_order_as_soon_as_they_can_be():
    taken = []

    def arrivals():
        for index in (2, 0, 1, 4, 3):
            taken.append(index)
            yield SubmissionResult(index, None)  # type: ignore[arg-type]

    seen = [(done.index, len(taken)) for done in in_order(arrivals())]
    assert [index for index, _ in seen] == [0, 1, 2, 3, 4]
    assert seen[0][1] == 2  # task 0 was handed on before 1, 4 and 3 had arrived


def test_events_of_workers_are_out_when_they_happen(tmp_path):
    calls = []

    class Calls(Sink):
        def start(self, info):
            calls.append("start")

        def event(self, text):
            calls.append(text)

        def round(self, record):
            calls.append("round")

    class Eventful(LocalExecutor):
        def subscribe(self, event):
            event("a worker did not start")
            self.event = event

        def run(self, submissions):
            self.event("a worker died")
            yield from super().run(submissions)

    plan = prepare(lowrank("server.rounds=1")).with_pack(2)
    with closing(Eventful(plan)) as executor:
        assert len(list(Server(plan, executor, tmp_path, Calls(), False).rounds())) == 1
    assert calls == ["start", "a worker did not start", "a worker died", "round"]


def test_a_resume_on_another_capability_is_told(tmp_path, monkeypatch):
    for capability, rounds in (("Vendor AVX2", 1), ("Vendor AVX2", 2), ("Vendor AVX512", 3), ("Vendor AVX512", 4)):
        monkeypatch.setattr("rayfed.clients.plan.capability", lambda _, found=capability: found)
        rayfed.run(lowrank(f"server.rounds={rounds}"), tmp_path / "run", resume=rounds > 1)
    told = [line for line in (tmp_path / "run" / "events.log").read_text().splitlines() if "a worker trains on" in line]
    assert len(told) == 2
    assert "a worker trains on Vendor AVX512, and this run began on Vendor AVX2: they may round differently" in told[0]
