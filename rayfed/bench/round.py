"""Seconds a round on Ray, against the loop that one writes without rayfed: the same clients and batches, in one run.

A is a whole round on Ray: downlink, training, wire, aggregation, ledger, checkpoint, without evaluation. B is
`rayfed.bench.bare`, which encodes, counts and writes nothing. B has as many processes as A has workers, with one
thread each, and its clients are dealt out as evenly as packs are. A and both variants of B run every round in turn,
from the same weights. Everything is sent dense, so both must arrive at the same weights; `difference` is the largest
relative error.

A's seconds, as medians over the rounds: `s in packs` is a worker's share of the time that the packs took (decode,
train, encode); `s waiting besides` is how much longer the server waited (Ray, and one worker for the other); `s on the
server` is its time until the next state; `s for records` is everything after that.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rayfed.api import prepare
from rayfed.bench.bare import BareLoop
from rayfed.bench.timing import Row, Times, compared, timed
from rayfed.clients.messages import TrainResult
from rayfed.clients.plan import RunPlan
from rayfed.config import Experiment, validate
from rayfed.config.load import assign
from rayfed.engine.driver import stepwise
from rayfed.server.executor import Executor, Handle, Submission, SubmissionResult
from rayfed.server.sampling import client_costs, cohort, plan_packs

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


def measure(**overrides: Any) -> list[Row]:
    """MiniLM and a BERT of 2 layers, 128 wide, each against both paddings.

    ``overrides`` change the settings, by dotted keys. Of `server.rounds`, the first warms up and the last, which
    evaluates, is left out.
    """
    settings = copy.deepcopy(SETTINGS)
    for key, value in overrides.items():
        assign(settings, key, value, f"{key}={value}")
    rows = compare(str(settings["model"]["name"]), validate(settings))
    with tempfile.TemporaryDirectory() as folder:
        settings["model"]["name"] = _small_bert(Path(folder), validate(settings))
        return rows + compare("2 layers, 128 wide", validate(settings))


def compare(name: str, experiment: Experiment) -> list[Row]:
    """One row for each padding of the bare loop: to `data.max_tokens`, and to the longest of a batch."""
    plan = prepare(experiment)
    paddings = {f"to {experiment.data.max_tokens}": experiment.data.max_tokens, "to the longest": None}
    ours: list[Times] = []
    theirs: dict[str, list[Times]] = {padding: [] for padding in paddings}
    difference, parts = 0.0, []
    with tempfile.TemporaryDirectory() as folder, stepwise(plan, Path(folder)) as server, BareLoop(plan) as bare:
        server.executor = executor = _Clocked(server.executor)
        rounds = server.rounds()
        for t in range(plan.server.rounds - 1):
            before = server.state.vector
            executor.seconds = 0.0
            mine, record = timed(partial(next, rounds))
            ours.append(mine)
            parts.append(_parts(mine.wall, record, executor.seconds / plan.engine.workers))
            clients = _deal(plan, t)
            for padding, pad_to in paddings.items():
                seconds, after = timed(partial(bare.train, before, t, clients, pad_to))
                theirs[padding].append(seconds)
                error = (server.state.vector - after).norm() / (after - before).norm()
                difference = max(difference, float(error))
        pack = server.plan.pack  # a number, also where engine.pack is auto
    a = f"a round on Ray, {plan.engine.workers} workers, packs of {pack}"
    medians = {part: statistics.median(seconds[part] for seconds in parts[1:]) for part in parts[0]}
    rows = []
    for padding, measured in theirs.items():
        row = compared(name, a, f"bare loop, padded {padding}", ours[1:], measured[1:], elsewhere=True)
        row.facts.update({"share of its time": 1 / row.ratio, "difference": difference, **medians})
        rows.append(row)
    return rows


def _parts(seconds: float, record: dict[str, Any], packs: float) -> dict[str, float]:
    """The parts of a round's seconds; a worker spent ``packs`` of them on its packs."""
    waited = record["time/train_s"] - record["time/server_s"]
    return {
        "s in packs": packs,
        "s waiting besides": waited - packs,
        "s on the server": record["time/server_s"],
        "s for records": seconds - record["time/train_s"],
    }


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


def _small_bert(folder: Path, experiment: Experiment) -> str:
    """A BERT of 2 layers, 128 wide, with random weights and the tokenizer of the experiment's model."""
    from transformers import BertConfig, BertModel

    from rayfed.tasks.models.base import load_tokenizer, quiet

    tokenizer = load_tokenizer(experiment.model)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )
    with quiet():
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
