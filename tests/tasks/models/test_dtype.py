"""A base in bfloat16: what trains and what is sent stays float32, and the results are near those in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rayfed
from rayfed import wire
from rayfed.api import prepare
from rayfed.clients.messages import ClientOrder, EvalJob, TrainJob
from rayfed.clients.trainer import Trainer
from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, LowRank, flatten_changes
from rayfed.methods.base import Trainable
from rayfed.tasks.models.base import FrozenBase, in_dtype, load_base
from rayfed.tasks.text_classification import TextClassification

COARSE = "model.dtype=bfloat16"
HALF = 2.0**-8  # the largest relative error of a number rounded to bfloat16
PADDINGS = ("never", "batch")


@pytest.fixture(params=["mean", "stock", "gpt2"])
def shape(request, tiny_gpt2):
    if request.param == "gpt2":
        return (f"model.name={tiny_gpt2}", "model.pooling=stock", "lora.target_modules=[c_attn]")
    return (f"model.pooling={request.param}",)


def trainer_of(experiment):
    return Trainer(prepare(experiment))


def random_adapter(model_spec):
    g = torch.Generator().manual_seed(4)
    layers = {
        name: LowRank(0.1 * torch.randn(out, 4, generator=g), 0.2 * torch.randn(4, inner, generator=g), 2.0)
        for name, (out, inner) in model_spec.shapes.items()
    }
    return Adapter(layers, {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in model_spec.head.items()})


@pytest.mark.parametrize("padding", PADDINGS)
def test_only_the_frozen_base_is_coarse(tiny, shape, padding):
    trainer = trainer_of(tiny(COARSE, *shape, f"engine.padding={padding}"))
    assert {values.dtype for values in trainer.stack.parameters.values()} == {torch.float32}
    assert {weights.dtype for weights in trainer.model.parameters()} == {torch.bfloat16}


def train(trainer, adapter, base=None):
    """The changes of two clients in one pack, dense."""
    payloads = [wire.encode(adapter.flatten())]
    extra = {}
    if base is not None:
        vector, layout = flatten_changes(base)
        payloads.append(wire.encode(vector))
        extra = {"base": (1, layout)}
    size = adapter.layout.size
    orders = tuple(ClientOrder(c, adapter.layout, 0, Trainable(), size, 1.0, "fp32", **extra) for c in (2, 5))
    result = trainer.execute(TrainJob(0, 0.01, orders), payloads)
    return torch.stack([wire.decode(upload).values for upload in result.uploads]), result.uploads


@pytest.mark.parametrize("below", ["nothing", "pair", "matrix"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_training_and_evaluation_are_near_those_in_float32(tiny, shape, padding, below):
    """Also over a frozen change of the base, as FLoRA and FedEx-LoRA have it: that, too, comes in float32."""
    changes, losses = [], []
    for dtype in ("float32", "bfloat16"):
        settings = tiny(f"model.dtype={dtype}", *shape, f"engine.padding={padding}", "partition.kind=iid")
        trainer = trainer_of(settings)
        adapter = random_adapter(trainer.plan.model)
        g = torch.Generator().manual_seed(1)
        under = {
            name: 0.1 * torch.randn(out, inner, generator=g)
            if below == "matrix"
            else LowRank(0.2 * torch.randn(out, 2, generator=g), 0.2 * torch.randn(2, inner, generator=g), 1.0)
            for name, (out, inner) in trainer.plan.model.shapes.items()
        }
        changes.append(train(trainer, adapter, None if below == "nothing" else under)[0])
        result = trainer.execute(EvalJob("test", 0, 60, adapter.layout), [wire.encode(adapter.flatten())])
        losses.append(result.loss / 60)
    fine, coarse = changes
    distance = float((coarse - fine).norm() / fine.norm())
    assert 1e-4 < distance < 0.05
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=4 * HALF)


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_a_run_repeats_its_bits_and_its_adapter_gives_its_own_evaluation(tiny, tmp_path, head):
    settings = (COARSE, f"model.head={head}", "method.name=fedit", "engine.pack=3", "export.merged=true")
    a, b = (rayfed.run(tiny(*settings), out=tmp_path / name) for name in ("a", "b"))
    assert [r["state/digest"] for r in a.metrics] == [r["state/digest"] for r in b.metrics]
    assert a.summary["export/base_dtype"] == "bfloat16"
    tensors = load_file(a.out / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    model = rayfed.load_model(a.out)
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n or "classifier" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora" not in n and "classifier" not in n} == {
        torch.bfloat16
    }
    federation = prepare(tiny(*settings)).federation
    losses = []
    for row in range(len(federation.test)):
        batch = federation.test.batch(np.array([row]), padded=True)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        assert logits.dtype == torch.float32
        losses.append(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert sum(losses) / len(losses) == pytest.approx(a.metrics[-1]["test/loss"], rel=HALF)


def test_merged_weights_are_the_rounded_base_and_the_change(tiny, tmp_path):
    from transformers import AutoModel

    experiment = tiny(COARSE, "export.merged=true", "method.name=fedit", "server.rounds=1")
    result = rayfed.run(experiment, out=tmp_path / "run")
    merged = AutoModel.from_pretrained(result.out / "merged").state_dict()
    base = load_base(experiment.model, 4, experiment.seed)
    whole = base.model.encoder.state_dict()
    coarse = in_dtype(load_base(experiment.model, 4, experiment.seed), "bfloat16").model.encoder.state_dict()
    name = "embeddings.word_embeddings.weight"
    assert merged[name].dtype == torch.float32
    assert torch.equal(merged[name], coarse[name].float())
    assert not torch.equal(merged[name], whole[name])
    adapted = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(merged[adapted], merged[adapted].bfloat16().float())  # the change is not rounded away


def test_a_model_that_cannot_compute_in_it_is_refused(tiny, monkeypatch):
    """A layer that the checkpoint lacks belongs to the head, so it stays float32, wherever it stands."""
    model = load_base(tiny().model, 4, 0).model
    base = FrozenBase(model, ("classifier", "encoder.encoder.layer.0.output.dense"))
    monkeypatch.setattr(TextClassification, "load_base", lambda *_: base)
    prepare(tiny())
    with pytest.raises(UserError, match=r"^model\.dtype: got 'bfloat16', but '[^\n]*' cannot compute in it [^\n]*$"):
        prepare(tiny(COARSE))
