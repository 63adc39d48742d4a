"""Seconds a round on Ray, against the loop that one writes without rayfed: the same clients and batches, in one run.

A is a whole round on Ray: downlink, training, wire, aggregation, ledger, checkpoint, without evaluation. B is
`rayfed.bench.bare`, which encodes, counts and writes nothing. B has as many processes as A has workers, with one
thread each, and its clients are dealt out as evenly as packs are. A and all variants of B run every round in turn,
from the same weights. Everything is sent dense, so both must arrive at the same weights; `difference` is the largest
relative error. Where A computes in bfloat16, B runs in float32, and once more in torch's autocast to bfloat16.

A's seconds, as medians over the rounds: `s in packs` is a worker's share of the time that the packs took (decode,
train, encode); `s waiting besides` is how much longer the server waited (Ray, and one worker for the other); `s on the
server` is its time until the next state; `s for records` is everything after that.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BertConfig, BertModel

from rayfed.api import prepare
from rayfed.bench.bare import bare_loop
from rayfed.bench.timing import Row, Times, compared, timed
from rayfed.clients.messages import TrainResult
from rayfed.clients.plan import RunPlan
from rayfed.config import Experiment, validate
from rayfed.config.load import assign
from rayfed.config.task import Model
from rayfed.engine.driver import stepwise
from rayfed.server.executor import Executor, Handle, Submission, SubmissionResult
from rayfed.server.sampling import client_costs, cohort, plan_packs
from rayfed.tasks.models.base import load_tokenizer, quiet

SETTINGS: dict[str, Any] = {
    "name": "bench-round",
    "data": {"source": "stdlib", "examples": 10_000, "max_tokens": 64},
    "partition": {"kind": "dirichlet", "clients": 350, "alpha": 0.1},
    "model": {"name": "minilm", "pooling": "mean"},
    "lora": {"rank": 16, "alpha": 16, "target_modules": ["query", "value"]},
    "method": {"name": "fedit"},
    "client": {"lr": 0.05, "momentum": 0.0, "batch_size": 16, "epochs": 1},
    "server": {"rounds": 7, "cohort": 10, "optimizer": "fedavg", "weights": "examples"},
    "eval": {"every": 1000},
    "engine": {"kind": "ray", "workers": 2, "threads": 1, "pack": 5},
    "tracking": {"console": "off", "wandb": "off"},
}
PARTS = ("s in packs", "s waiting besides", "s on the server", "s for records")


def measure(**overrides: Any) -> list[Row]:
    """MiniLM and a BERT of 2 layers, 128 wide, each against both paddings; of another task only `model.name`.

    ``overrides`` change the settings, by dotted keys. Of `server.rounds`, the first warms up and the last, which
    evaluates, is left out.
    """
    settings = copy.deepcopy(SETTINGS)
    for key, value in overrides.items():
        assign(settings, key, value, f"{key}={value}")
    rows = compare(str(settings["model"]["name"]), validate(settings))
    if settings["data"].get("task", "text_classification") != "text_classification":
        return rows
    with tempfile.TemporaryDirectory() as folder:
        settings["model"]["name"] = _small_bert(Path(folder), validate(settings).model)
        return rows + compare("2 layers, 128 wide", validate(settings))


def compare(name: str, experiment: Experiment) -> list[Row]:
    """One row for each variant of the bare loop: padded to `data.max_tokens`, or to the longest of a batch; formats."""
    plan, most = prepare(experiment), experiment.data.max_tokens
    paddings = (("without padding", None),) if experiment.data.images else (
        (f"padded to {most}", most), ("padded to the longest", None),
    )  # fmt: skip
    variants: dict[str, tuple[int | None, bool]] = {
        f"{padding}{', autocast' if autocast else ''}": (pad_to, autocast)
        for autocast in (False, True)[: 1 if plan.model.dtype == "float32" else 2]
        for padding, pad_to in paddings
    }
    times: dict[str, list[tuple[Times, Times]]] = {variant: [] for variant in variants}
    differences, parts = dict.fromkeys(variants, 0.0), []
    with tempfile.TemporaryDirectory() as folder, stepwise(plan, Path(folder)) as server, bare_loop(plan) as bare:
        server.executor = executor = _Clocked(server.executor)
        rounds = server.rounds()
        for t in range(plan.server.rounds - 1):
            before, executor.seconds = server.state.vector, 0.0
            mine, record = timed(partial(next, rounds))
            packs = executor.seconds / plan.engine.workers
            waited = record["time/train_s"] - record["time/server_s"]
            parts.append((packs, waited - packs, record["time/server_s"], mine.wall - record["time/train_s"]))
            clients = _deal(plan, t)
            for variant, options in variants.items():
                theirs, after = timed(partial(bare, before, t, clients, *options))
                times[variant].append((mine, theirs))
                error = float((server.state.vector - after).norm() / (after - before).norm())
                differences[variant] = max(differences[variant], error)
        a = f"a round on Ray, {plan.engine.workers} workers, packs of {server.plan.pack}, {plan.model.dtype}"
    medians = dict(zip(PARTS, np.median(parts[1:], 0).tolist(), strict=True))
    rows = []
    for variant, measured in times.items():
        row = compared(name, a, f"bare loop, {variant}", measured[1:], {}, elsewhere=True)
        row.facts.update({"share of its time": 1 / row.ratio, "difference": differences[variant], **medians})
        rows.append(row)
    return rows


class _Clocked(Executor):
    """An executor that adds up the seconds that packs took on their workers."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.seconds = executor, 0.0

    def put(self, payload: bytes) -> Handle:
        return self.executor.put(payload)

    def run(self, submissions: Sequence[Submission]) -> Iterator[SubmissionResult]:
        for done in self.executor.run(submissions):
            self.seconds += done.result.seconds if isinstance(done.result, TrainResult) else 0.0
            yield done


def _deal(plan: RunPlan, t: int) -> list[list[int]]:
    """The round's clients, dealt out to the bare loop's processes so that all have about the same number of tokens."""
    federation, workers = plan.federation, plan.engine.workers
    drawn = cohort(federation.holders, plan.server.cohort, plan.seed, t)
    clients = [plan.profiles.profile(c, int(federation.sizes[c]), t) for c in drawn]
    packs = plan_packs(clients, -(-len(clients) // workers), client_costs(federation, plan.client))
    return [[client.client for client in pack] for pack in packs] + [[]] * (workers - len(packs))


def _small_bert(folder: Path, model: Model) -> str:
    """A BERT of 2 layers, 128 wide, with random weights and the tokenizer of the ``model``."""
    tokenizer = load_tokenizer(model)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )
    with quiet():
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
