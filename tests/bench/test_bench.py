"""Benchmarks run at small sizes and report what they measured. No test depends on how fast they are."""

from __future__ import annotations

import json
import time
from itertools import cycle

import pytest
import torch
from image_models import digits, save_vit
from language_models import save_language_model, sentences
from transformers import BertConfig

import rayfed
from rayfed.api import prepare
from rayfed.bench import BENCHMARKS, aggregate, algebra, bare, find, scale, step, train, wire
from rayfed.bench.round import compare
from rayfed.bench.stub import RANK, make_uploads
from rayfed.bench.timing import paired, table, write
from rayfed.cli import main
from rayfed.clients.local_training import PackMember, train_pack
from rayfed.clients.trainer import Trainer
from rayfed.config import validate
from rayfed.errors import UserError


def test_every_benchmark_is_there():
    assert all(callable(find(name)) for name in BENCHMARKS)
    with pytest.raises(UserError, match="bench: got 'algebr', but allowed are aggregate, algebra, round, s"):
        find("algebr")


def test_pairs_run_in_turn_and_the_ratio_is_theirs():
    calls = []
    row = paired("x", ("a", lambda: calls.append("a")), ("b", lambda: calls.append("b")), pairs=3)
    assert calls == ["a", "a", "b", "a", "b", "a", "b"]
    assert row.ratio_low <= row.ratio <= row.ratio_high
    assert row.cpu_ratio > 0


def test_processor_time_is_not_wall_time():
    def work():
        sum(range(2_000_000))

    row = paired("x", ("work", work), ("sleep", lambda: time.sleep(0.05)), pairs=2)
    assert row.seconds_b >= 0.05
    assert row.cpu_b < row.seconds_b / 2


def test_algebra_is_exact_where_it_says_so(tmp_path):
    rows = algebra.measure(size=96, layers=2, width=40)
    assert rows[0].facts["error"] < 1e-5
    assert rows[1].facts["excess error, flat spectrum"] < 0.1
    write(tmp_path / "b.json", "algebra", rows)
    written = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in rows]
    assert written["machine"]["cores"] >= 1
    assert all(row.name in table(rows) for row in rows)


def check_bare_loop(plan, *paddings):
    start, client = plan.start(), int(plan.federation.sizes.argmax())
    vector, everything = start.flatten(), torch.ones(start.layout.size, dtype=torch.bool)
    member = PackMember(client, start.layout, vector, everything, plan.federation.rows_of(client))
    (mine,) = train_pack(Trainer(plan).context, [member], lr=plan.client.lr, t=0)
    model, parameters = bare.bare_model(plan)
    for pad_to in paddings:
        theirs = bare.train_client(model, parameters, plan, vector, client, 0, pad_to)
        assert float((mine.vector - theirs).norm() / (theirs - vector).norm()) < 1e-5


def test_the_bare_loop_trains_a_client_as_rayfed_does(tiny):
    check_bare_loop(prepare(tiny("data.max_tokens=16")), None, 16)


@pytest.mark.slow
def test_the_bare_loop_of_images_and_of_language_models_does_so_too(tmp_path):
    settings = {
        "partition": {"kind": "iid", "clients": 4}, "method": {"name": "fedit"}, "server": {"cohort": 2},
        "lora": {"rank": 2, "alpha": 4, "target_modules": "all-linear"}, "engine": {"kind": "local"},
    }  # fmt: skip
    images = validate({**settings, "model": {"name": str(save_vit(tmp_path / "vit"))}})
    check_bare_loop(prepare(images, task=rayfed.ImageClassification(train=digits(0, 60))), None)
    texts = validate({**settings, "model": {"name": str(save_language_model(tmp_path / "llama", "llama"))}})
    texts = texts.with_("data.max_tokens=40")
    check_bare_loop(prepare(texts, task=rayfed.CausalLM(train=sentences(40))), None, 40)


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
    parts = [row.facts[f"s {part}"] for row in rows for part in ("in packs", "on the server", "for records")]
    assert 0 < min(parts) < max(parts) < 10


def test_a_step_is_divided_among_operators(tiny_bert):
    settings = {"model.name": str(tiny_bert), "data.examples": 60, "data.max_tokens": 16, "partition.clients": 5}
    rows = {row.name: row for row in step.measure(pairs=1, pack=2, **settings)}
    assert list(rows) == [step.BASE, step.OTHER, *step.GROUPS, step.REST, "all"]
    parts = [row for name, row in rows.items() if name != "all"]
    assert sum(row.seconds_a for row in parts) == pytest.approx(rows["all"].seconds_a)
    assert all(row.seconds_a > 0 for row in parts if row.name != step.REST)
    assert all(rows[step.BASE].facts[f"share of the rate, {dtype}"] > 0 for dtype in step.FORMATS)


SMALL = {"layers": 3, "width": 50}
ENTRIES = 2 * RANK * 3 * 50


def test_uploads_are_what_they_say():
    one, other, *_ = make_uploads(ENTRIES)
    assert len(one.change.indices) == ENTRIES // 16
    assert not torch.equal(one.change.indices, other.change.indices)
    assert torch.equal(make_uploads(ENTRIES)[0].change.values, one.change.values)


def test_wire_compares_the_bytes_with_the_entropy_bound():
    threads = torch.get_num_threads()
    rows = wire.measure(entries=40_000, pairs=1)
    assert torch.get_num_threads() == threads
    assert {row.threads for row in rows} == {1}
    facts = {row.name: row.facts for row in rows}
    assert facts["wire 1"]["index bytes"] == 0
    # By hand: H(1/4) = 0.811278 bits, of 40,000 entries 4056.4 bytes.
    assert facts["wire 1/4"]["entropy bound"] == 4057
    assert abs(facts["wire 1/16"]["over the bound, %"]) < 5
    assert facts["wire 1/16, layers differ"]["over the bound, %"] < 0
    assert all(facts[f"wire {d}"]["GB/s"] > 0 for d in ("1", "1/4", "1/16", "1/64"))
    assert [row.name for row in rows if row.name.startswith("top-k")] == ["top-k 1/4", "top-k 1/16", "top-k 1/64"]


def test_aggregate_runs_the_servers_own_code(monkeypatch):
    monkeypatch.setattr(aggregate, "ROUNDS", 2)
    rows = aggregate.measure(uploads=20, products=6, **SMALL, pairs=1)
    assert [row.name for row in rows] == [
        "flasc, packs of 32", "flasc, packs of 1", "fedit, packs of 32", "fedhl", "flexlora", *["fedview"] * 3,
    ]  # fmt: skip
    state = 4 * ENTRIES / 1e6
    assert rows[0].facts["allowed"] == pytest.approx(3 * 3 * state + 200)  # AdamW has two moments for each entry
    assert rows[2].facts["allowed"] == pytest.approx(3 * state + 200)
    assert all(row.facts["uploads/s"] > 0 for row in rows[:3])
    assert [row.a for row in rows[3:6]] == [
        *["6 clients, 3 layers of 50 x 50"] * 2,
        "10 of 10000 clients, 3 layers of 50 x 50",
    ]
    (only,) = aggregate.measure(products=3, **SMALL, pairs=1, methods=("flexlora",))
    assert only.name == "flexlora"


def test_scale_runs_whole_rounds_of_a_large_population():
    rows = scale.measure(cohorts=(10, 30), population=5_000, rounds=3, **SMALL)
    assert [row.name for row in rows] == [f"cohort {size} of 5000" for size in (10, 30, 30, 30)]
    assert [row.a for row in rows[2:]] == [f"a round, adapter of {ENTRIES}, packs of {pack}" for pack in (1, 32)]
    assert all(row.facts["ms a client"] > 0 and row.facts["ms a client, cpu"] > 0 for row in rows)


def test_scale_compares_the_memory_of_the_last_round_with_that_of_the_third(monkeypatch):
    sizes = cycle([100.0, 150.0, 200.0, 900.0, 250.0])
    monkeypatch.setattr(scale, "forget_peak", lambda device: int(1e6 * next(sizes)))
    for row in scale.measure(cohorts=(10,), population=100, rounds=5, **SMALL):
        facts = {"MB after round 3": 200.0, "after 5": 250.0, "times that": 1.25, "most": 900.0}
        assert facts.items() <= row.facts.items()


def test_sizes_come_from_the_command_line(capsys, tmp_path, monkeypatch):
    def measure(size: int = 4096):
        return [paired(f"size {size}", ("a", int), ("b", int), 1)]

    monkeypatch.setattr(algebra, "measure", measure)
    assert main(["bench", "algebra", "size=7", "--json", str(tmp_path / "b.json")]) == 0
    assert "size 7" in capsys.readouterr().out
    assert json.loads((tmp_path / "b.json").read_text())["rows"][0]["name"] == "size 7"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["algebra", "uploads=5"], "uploads: unknown key; allowed are size, layers, width"),
        (["algebra", "size=4.0"], "size: got 4.0, but it should be an integer above 0"),
        (["aggregate", "methods=[rbla]"], "methods: got 'rbla', but there are flasc, fedit, fedhl, flexlora, fedview"),
        (["aggregate", "uploads=0"], "uploads: got 0, but it should be an integer above 0"),
        (["scale", "rounds=1"], "rounds: got 1, but it should be an integer of at least 2"),
        (["train", "packs=4"], "packs: got 4, but it should be a list of integers above 0"),
        (["train", "packs=[]"], "packs: got [], but it should be a list of integers above 0"),
        (["train", "shapes=[bert]"], "shapes: got 'bert', but there are minilm, gpt2, vit"),
        (["train", "dtype=int8"], "dtype: got 'int8', but it should be float32 or bfloat16"),
        (["round", "client.lrr=1"], "client.lrr: unknown key; did you mean client.lr?"),
    ],
)
def test_a_refusal_is_one_line(capsys, arguments, line):
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"rayfed: {line}")
    assert err.count("\n") == 1


def test_train_counts_clients_and_tokens(monkeypatch):
    config = BertConfig(
        num_labels=train.CLASSES, vocab_size=1000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    tiny = train.Shape(config, "classifier", ("query", "value"), tokens=5)
    monkeypatch.setitem(train.SHAPES, "tiny", tiny)
    (row,) = train.measure(shapes=["tiny"], packs=[3], batch=2, pairs=1, dtype="bfloat16")
    assert row.name == "tiny, 2 rows of 5 tokens"
    # three clients, three steps each, of two rows of five tokens
    assert row.facts["tokens/s"] / row.facts["clients/s"] == pytest.approx(3 * 2 * 5)
    # weights: four of 16 x 16, two of 16 x 8 and the pooler's 16 x 16, four operations each
    share = 4 * (5 * 16 * 16 + 2 * 16 * 8) * row.facts["tokens/s"] / row.facts["share of the bfloat16 rate"]
    assert share > 1e6  # the measured rate, in operations a second
