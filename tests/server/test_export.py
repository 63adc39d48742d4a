"""The exported adapter holds the global model: exactly where its rank allows, else the best of its rank."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

import rayfed
from rayfed.api import prepare
from rayfed.clients.plan import RunPlan
from rayfed.lora.adapter import LowRank
from rayfed.server.export import as_adapter, save_adapter, save_merged
from rayfed.tasks.models.base import load_base


@pytest.fixture
def plan(tiny) -> RunPlan:
    return prepare(tiny())


def changes_of(plan, rank, scale=1.0):
    g = torch.Generator().manual_seed(0)
    return {
        name: LowRank(torch.randn(out, rank, generator=g), torch.randn(rank, inner, generator=g), scale)
        for name, (out, inner) in plan.model.shapes.items()
    }


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_change_that_fits_is_exact_whatever_its_scale(plan, rank):
    changes = changes_of(plan, rank, scale=0.3)
    adapter, lost = as_adapter(plan, changes, plan.model.head, 4)
    assert lost == 0.0
    for name, pair in adapter.layers.items():
        assert (pair.rank, pair.scale) == (4, 2.0)
        torch.testing.assert_close(pair.dense(), changes[name].dense(), rtol=1e-5, atol=1e-5)


def test_a_change_of_higher_rank_is_cut_to_the_best_of_the_rank_and_the_loss_is_stated(plan):
    changes = {name: pair.dense() for name, pair in changes_of(plan, 9).items()}
    adapter, lost = as_adapter(plan, changes, plan.model.head, 4)
    missing = total = 0.0
    for name, matrix in changes.items():
        U, S, Vh = torch.linalg.svd(matrix.double())
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        torch.testing.assert_close(adapter.layers[name].dense().double(), best, rtol=1e-4, atol=1e-4)
        missing += float(S[4:].square().sum())
        total += float(S.square().sum())
    assert lost == pytest.approx(missing / total, rel=1e-6)


def test_a_save_that_fails_half_way_leaves_nothing_and_an_older_folder_as_it_was(plan, tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    adapter, _ = as_adapter(plan, changes_of(plan, 4), plan.model.head, 4)
    save_adapter(plan, path, adapter, "old")
    (path / "left_over.txt").write_text("old")
    save_adapter(plan, path, adapter, "new")
    assert not (path / "left_over.txt").exists()
    monkeypatch.setattr("rayfed.lora.peft_files.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for folder in (path, tmp_path / "other"):
        with pytest.raises(OSError, match="disk full"):
            save_adapter(plan, folder, adapter, "newest")
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "README.md").read_text() == "new"


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_merged_weights_load_with_transformers_alone(tiny, tiny_gpt2, tmp_path, kind):
    from transformers import AutoModelForSequenceClassification

    overrides = ["model.pooling=stock"]
    if kind == "gpt2":  # Conv1D keeps its weights transposed
        overrides += [f"model.name={tiny_gpt2}", "lora.target_modules=[c_attn]"]
    experiment = tiny(*overrides)
    plan = prepare(experiment)
    changes = {name: pair.dense() for name, pair in changes_of(plan, 9).items()}
    save_merged(plan, tmp_path / "merged", changes, plan.model.head)
    base = load_base(experiment.model, 4, experiment.seed).model
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == dict(enumerate(plan.federation.classes))
    for name, matrix in changes.items():
        before, after = base.get_submodule(name).weight, merged.get_submodule(name).weight
        difference = after - before
        torch.testing.assert_close(difference.T if kind == "gpt2" else difference, matrix, rtol=1e-4, atol=1e-4)


def lines_of(card):
    """The lines of Python of a model card."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def by_the_card(run, monkeypatch, texts):
    """(names of the predicted classes, logits) by the card's own lines, where rayfed cannot be imported."""
    namespace = {}
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "rayfed"]:
            patch.setitem(sys.modules, name, None)  # importing it is an ImportError
        patch.chdir(run)
        exec(lines_of((run / "adapter" / "README.md").read_text(encoding="utf-8")), namespace)
        logits = namespace["logits"](texts)
    return [namespace["id2label"][i] for i in logits.argmax(-1).tolist()], logits


GPT2 = ("model.name=GPT2", "lora.target_modules=[c_attn]")
STOCK = "model.pooling=stock"
CUT = ("export.adapter_rank=1", "method.name=fedview", "client.optimizer=adamw", "client.lr=0.02", "client.epochs=3")
LEARNS = ("method.name=fedit", "client.optimizer=adamw", "client.lr=0.02")
EXPORTS = {
    "mean": LEARNS,
    "gpt2": (*LEARNS, STOCK, *GPT2),
    "fedview, cut": CUT,
}
MORE_EXPORTS = {
    "stock": (*LEARNS, STOCK),
    "mean gpt2": (*LEARNS, *GPT2),
    "not normalized": (*LEARNS, "model.normalize=false"),
    "all layers": (*LEARNS, "lora.target_modules=all-linear"),
    "a pattern": (*LEARNS, r"lora.target_modules='encoder\.encoder\..*(query|value)'"),
    "numbered layers": (*LEARNS, "lora.layers_to_transform=[1]"),
    "numbered layers of gpt2": (*LEARNS, *GPT2, "lora.layers_to_transform=[1]"),
    "rslora": (*LEARNS, "lora.rslora=true", "export.adapter_rank=6"),
    "bfloat16": (*LEARNS, "model.dtype=bfloat16"),
    "stock bfloat16": (*LEARNS, STOCK, "model.dtype=bfloat16"),
    "frozen head": (*LEARNS, "model.head=frozen"),
    "stock frozen head": (*LEARNS, STOCK, "model.head=frozen"),
    "head alone": (*LEARNS, "lora.train=head"),
    "stock head alone": (*LEARNS, STOCK, "lora.train=head"),
    "flora": (*LEARNS, STOCK, "method.name=flora", "export.adapter_rank=1"),
    "fedex": (*LEARNS, "method.name=fedex_lora", "export.adapter_rank=1"),
    "frozen head, cut": (*CUT, "model.head=frozen"),
}


@pytest.fixture
def exported(tiny, tiny_gpt2, tiny_data, tmp_path):
    """exported(*settings) -> the run, the texts and labels of its test split."""

    def make(*settings):
        settings = [text.replace("GPT2", str(tiny_gpt2)) for text in settings]
        experiment = tiny("server.cohort=12", "partition.kind=iid", "client.epochs=2", "eval.every=2", *settings)
        rows = [json.loads(line) for line in (tiny_data / "test.jsonl").read_text().splitlines()]
        return rayfed.run(experiment, out=tmp_path / "run"), [r["text"] for r in rows], [r["label"] for r in rows]

    return make


def check_export(exported, monkeypatch, settings):
    """What the card states, what its lines reach and what `rayfed.load_model` reaches agree within two test rows."""
    run, texts, labels = exported(*settings)
    reported, lost = run.summary["final/test_accuracy"], run.summary["export/lost_energy"]
    card = (run.out / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"| test accuracy of the run | {100 * reported:.1f} % |" in card
    if any("adapter_rank=1" in text for text in settings):
        assert lost > 0.01
        if settings == CUT:
            assert abs(run.summary["export/test_accuracy"] - reported) * len(labels) > 2  # two figures, not one
        reported = run.summary["export/test_accuracy"]
        assert f"| test accuracy of this adapter | {100 * reported:.1f} % (rank 1 is too small" in card
    else:
        assert lost == 0.0
        assert run.summary["export/test_accuracy"] is None
        assert "of this adapter" not in card
    names, logits = by_the_card(run.out, monkeypatch, texts)
    right = sum(name == label for name, label in zip(names, labels, strict=True))
    assert abs(right - reported * len(labels)) <= 2
    assert float((logits - logits.mean(0)).abs().max()) > 0.1  # it depends on the text
    model = rayfed.load_model(run.out)
    from transformers import AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(run.out / "adapter")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        loaded = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert list(model.config.id2label.values()) == ["app", "card", "loan", "rate"]
    coarse = "model.dtype=bfloat16" in settings
    torch.testing.assert_close(loaded, logits, rtol=0, atol=0.1 if coarse else 1e-4)
    return run


@pytest.mark.parametrize("settings", EXPORTS.values(), ids=EXPORTS)
def test_the_cards_own_lines_reach_what_the_run_reports(exported, monkeypatch, settings):
    check_export(exported, monkeypatch, settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", MORE_EXPORTS.values(), ids=MORE_EXPORTS)
def test_the_lines_of_every_kind_of_card_reach_what_the_run_reports(exported, monkeypatch, settings):
    check_export(exported, monkeypatch, settings)


def test_the_card_is_one_of_the_hub_and_the_table_names_what_the_rank_loses(tiny, tmp_path, capsys):
    from huggingface_hub import ModelCard

    experiment = tiny(*CUT, "tracking.console=plain", "name='a: \"b\"'", "server.rounds=1")
    run = rayfed.run(experiment, out=tmp_path / "run")
    card = ModelCard.load(run.out / "adapter" / "README.md")
    assert card.data.base_model == experiment.model.name
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    assert f"{run.summary['bytes/up_total']:,}" in card.content
    lost, own = run.summary["export/lost_energy"], run.summary["export/test_accuracy"]
    row = rf"adapter/, whose rank of 1 loses {lost:.2%} of the energy +{100 * own:.1f} %"
    assert re.search(row, capsys.readouterr().out)


def test_an_adapter_that_misses_the_optimum_has_a_gap_of_its_own(tmp_path):
    from small_runs import lowrank

    run = rayfed.run(lowrank("method.name=fedhl", "export.adapter_rank=1", "server.rounds=3"), out=tmp_path / "run")
    assert run.summary["final/gap"] < run.summary["export/gap"] < 1
    assert "```python" not in (run.out / "adapter" / "README.md").read_text()
