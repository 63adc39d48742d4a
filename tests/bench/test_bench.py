"""Benchmarks run at small sizes and say what they measured; how fast they are is nobody's test."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model

from rayfed.bench import BENCHMARKS, bare, find
from rayfed.bench.algebra import measure
from rayfed.bench.round import compare
from rayfed.bench.timing import paired, table, write
from rayfed.clients.blueprint import draw_blueprint
from rayfed.clients.learner import Learner
from rayfed.clients.train import Member, train_pack
from rayfed.errors import UserError
from rayfed.lora.inject import peft_config
from rayfed.tasks.federation import form_federation
from rayfed.tasks.models import base_of


def test_every_benchmark_is_there():
    assert all(callable(find(name)) for name in BENCHMARKS)
    with pytest.raises(UserError, match="bench: got 'algebr', but there are algebra"):
        find("algebr")


def test_pairs_run_in_turn_and_the_ratio_is_theirs():
    calls = []
    row = paired("x", ("a", lambda: calls.append("a")), ("b", lambda: calls.append("b")), pairs=3)
    assert calls == ["a", "a", "b", "a", "b", "a", "b"]
    assert row.ratio_low <= row.ratio <= row.ratio_high


def test_algebra_is_exact_where_it_says_so(tmp_path):
    rows = measure(size=96, layers=2, width=40)
    assert rows[0].facts["error"] < 1e-5
    assert rows[1].facts["excess error, flat spectrum"] < 0.1
    write(tmp_path / "b.json", "algebra", rows)
    written = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in rows]
    assert written["machine"]["cores"] >= 1
    assert all(row.name in table(rows) for row in rows)


def test_the_bare_loop_trains_a_client_as_rayfed_does(tiny):
    experiment = tiny("data.max_tokens=16")
    federation = form_federation(experiment)
    blueprint = draw_blueprint(experiment, len(federation.classes))
    start, client = blueprint.start(experiment), int(federation.sizes.argmax())
    vector, rows = start.flatten(), federation.rows_of(client)
    learner = Learner(experiment, federation, blueprint)
    everything = torch.ones(len(vector), dtype=torch.bool)
    (mine,) = train_pack(
        learner.stack, learner._forward, learner.data["train"], federation.pad_id,
        [Member(client, start.layout, vector, everything, rows)], experiment.client, lr=experiment.client.lr, t=0,
        seed=experiment.seed, device=torch.device("cpu"),
    )  # fmt: skip
    base = base_of(experiment, len(federation.classes))
    model = get_peft_model(base.model, peft_config(experiment, base.head)).eval()
    parameters = bare._parameters(model, start.layout)
    for pad_to in (None, 16):
        theirs = bare._client(model, parameters, vector, rows, client, 0, pad_to, experiment, federation)
        assert float((mine.vector - theirs).norm() / (theirs - vector).norm()) < 1e-5


@pytest.mark.slow
def test_a_round_and_the_bare_loop_arrive_at_the_same_weights(tiny):
    """They do the same work, or their times say nothing."""
    experiment = tiny(
        "engine.kind=ray", "engine.pack=2", "method.name=fedit", "server.optimizer=fedavg", "server.weights=examples",
        "server.rounds=4", "eval.every=100", "data.max_tokens=16",
    )  # fmt: skip
    rows = compare("tiny", experiment)
    assert [row.b for row in rows] == ["bare loop, padded to 16", "bare loop, padded to the longest"]
    assert all(0 < row.facts["difference"] < 1e-4 for row in rows)
