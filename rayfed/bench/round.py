"""Seconds a round, against the loop that one writes without rayfed: the same clients and batches, in one run.

A is a whole round on Ray: downlink, training, wire, aggregation, books, checkpoint; no evaluation. B is `bare`: nothing
is encoded, counted or written there. B has as many processes as A has workers, with one thread each, and its clients
are dealt out as alike as packs are. Every round is run by all of them in turn, from the same weights; as everything is
sent dense, both must arrive at the same weights, and `difference` says how nearly they do (relative, the largest).

Where A's seconds go, medians of the rounds: `s in packs`, a worker's share of what its packs took themselves (decode,
train, encode); `s waiting besides`, what the server waited longer than that (Ray, and one worker for the other); `s on
the server` until it has the next state; `s for the books`, all that follows.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rayfed.bench.bare import BareLoop
from rayfed.bench.timing import Row, Times, compared, timed
from rayfed.clients.messages import TrainResult
from rayfed.config import Experiment, validate
from rayfed.config.load import assign
from rayfed.engine.driver import stepwise
from rayfed.profiles.client_profiles import profile
from rayfed.server.executor import Executor, Handle, Submission, SubmissionResult
from rayfed.server.loop import Server
from rayfed.server.sampling import cohort, plan_packs
from rayfed.tasks.data.federation import Federation, form_federation
from rayfed.tasks.models.spec import describe_model

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
    federation = form_federation(experiment)
    model_spec = describe_model(experiment, len(federation.classes))
    paddings = {f"to {experiment.data.max_tokens}": experiment.data.max_tokens, "to the longest": None}
    ours: list[Times] = []
    theirs: dict[str, list[Times]] = {padding: [] for padding in paddings}
    difference, where = 0.0, []
    with (
        tempfile.TemporaryDirectory() as folder,
        stepwise(experiment, federation, model_spec, Path(folder)) as server,
        BareLoop(experiment, federation, server.state.layout) as bare,
    ):
        server.executor = executor = _Clocked(server.executor)
        rounds = server.rounds()
        for t in range(experiment.server.rounds - 1):
            before = server.state.vector
            executor.seconds = 0.0
            mine, record = timed(partial(next, rounds))
            ours.append(mine)
            where.append(_where(mine.wall, record, executor.seconds / experiment.engine.workers))
            clients = _dealt(experiment, federation, server, t)
            for padding, pad_to in paddings.items():
                seconds, after = timed(partial(bare.train, before, t, clients, pad_to))
                theirs[padding].append(seconds)
                error = (server.state.vector - after).norm() / (after - before).norm()
                difference = max(difference, float(error))
        pack = server.experiment.engine.pack  # a number, whatever was asked for
    a = f"a round on Ray, {experiment.engine.workers} workers, packs of {pack}"
    rows = []
    for padding, measured in theirs.items():
        row = compared(name, a, f"bare loop, padded {padding}", ours[1:], measured[1:], elsewhere=True)
        medians = {name: statistics.median(part[name] for part in where[1:]) for name in where[0]}
        row.facts.update({"share of its time": 1 / row.ratio, "difference": difference, **medians})
        rows.append(row)
    return rows


def _where(seconds: float, record: dict[str, Any], packs: float) -> dict[str, float]:
    """What a round of so many seconds went to; a worker spent ``packs`` of them on its packs."""
    waited = record["time/train_s"] - record["time/server_s"]
    return {
        "s in packs": packs,
        "s waiting besides": waited - packs,
        "s on the server": record["time/server_s"],
        "s for the books": seconds - record["time/train_s"],
    }


class _Clocked:
    """A executor of which the seconds that packs took on their workers are added up."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.seconds = executor, 0.0

    def put(self, payload: Any) -> Handle:
        return self.executor.put(payload)

    def run(self, tasks: Sequence[Submission]) -> Iterator[SubmissionResult]:
        for done in self.executor.run(tasks):
            self.seconds += done.result.seconds if isinstance(done.result, TrainResult) else 0.0
            yield done

    def drain_events(self) -> list[str]:
        return self.executor.drain_events()

    def close(self) -> None:
        self.executor.close()


def _dealt(experiment: Experiment, federation: Federation, server: Server, t: int) -> list[list[int]]:
    """The round's clients, dealt out to the bare loop's processes so that all have like many tokens."""
    sizes, workers = federation.sizes, experiment.engine.workers
    drawn = cohort(federation.holders, experiment.server.cohort, experiment.seed, t)
    clients = [profile(c, int(sizes[c]), experiment, t) for c in drawn]
    packs = plan_packs(clients, -(-len(clients) // workers), server.costs)
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
