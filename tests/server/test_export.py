"""The exported adapter holds the global model: exactly where its rank allows, else the best of its rank."""

from __future__ import annotations

import pytest
import torch

from rayfed.api import prepare
from rayfed.clients.plan import RunPlan
from rayfed.lora.adapter import LowRank
from rayfed.server.export import as_adapter, export
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


def test_peft_loads_an_adapter_of_another_rank(tiny, tmp_path):
    from peft import PeftModel

    experiment = tiny("export.adapter_rank=6")
    plan = prepare(experiment)
    changes = changes_of(plan, 6)
    facts = export(plan, tmp_path, changes, plan.model.head)
    assert facts == {"export/rank": 6, "export/lost_energy": 0.0, "export/base_dtype": "float32"}
    base = load_base(experiment.model, 4, experiment.seed)
    model = PeftModel.from_pretrained(base.model, str(tmp_path / "adapter"))
    for name, pair in changes.items():
        layer = model.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.get_delta_weight("default"), pair.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_merged_weights_load_with_transformers_alone(tiny, tiny_gpt2, tmp_path, kind):
    from transformers import AutoModelForSequenceClassification

    overrides = ["export.merged=true", "model.pooling=stock"]
    if kind == "gpt2":  # Conv1D keeps its weights transposed
        overrides += [f"model.name={tiny_gpt2}", "lora.target_modules=[c_attn]"]
    experiment = tiny(*overrides)
    plan = prepare(experiment)
    changes = {name: pair.dense() for name, pair in changes_of(plan, 9).items()}
    export(plan, tmp_path, changes, plan.model.head)
    base = load_base(experiment.model, 4, experiment.seed).model
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    for name, matrix in changes.items():
        before, after = base.get_submodule(name).weight, merged.get_submodule(name).weight
        difference = after - before
        torch.testing.assert_close(difference.T if kind == "gpt2" else difference, matrix, rtol=1e-4, atol=1e-4)
