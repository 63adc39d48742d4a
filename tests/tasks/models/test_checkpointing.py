"""Gradient checkpointing gives the same bits and stores much less for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import rayfed
from rayfed import wire
from rayfed.api import prepare
from rayfed.clients.messages import ClientOrder, EvalJob, TrainJob
from rayfed.clients.trainer import Trainer
from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods.base import Trainable
from rayfed.tasks.models.checkpointing import layers_of
from rayfed.tasks.text_classification import TextClassification

AGAIN = "engine.gradient_checkpointing=true"
TRAINING = ("lora.dropout=0.2", "client.clip_norm=0.5", "client.batch_size=4", "client.optimizer=adamw")


def trainer_of(experiment):
    return Trainer(prepare(experiment))


def trained(trainer, saved: list[int]):
    """The uploads and losses of a pack of three, from a random B; ``saved`` gets the sizes of what autograd saves."""
    g = torch.Generator().manual_seed(4)
    layers = {
        name: LowRank(0.1 * torch.randn(out, 4, generator=g), 0.2 * torch.randn(4, inner, generator=g), 2.0)
        for name, (out, inner) in trainer.plan.model.shapes.items()
    }
    adapter = Adapter(layers, trainer.plan.model.head)
    size = adapter.layout.size
    orders = tuple(ClientOrder(c, adapter.layout, 0, Trainable(), size, 1.0, "fp32") for c in (2, 5, 7))

    def save(tensor):
        saved.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        result = trainer.execute(TrainJob(0, 0.01, orders), [wire.encode(adapter.flatten())])
    evaluated = trainer.execute(EvalJob("test", 0, 60, adapter.layout), [wire.encode(adapter.flatten())])
    return result.uploads, result.losses, evaluated.loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padding", ["never", "batch"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_same_bits_with_less_memory(tiny, tiny_gpt2, kind, padding, dtype):
    shape = [f"model.name={tiny_gpt2}", "model.pooling=stock", "lora.target_modules=[c_attn,c_fc]"]
    settings = [*TRAINING, f"engine.padding={padding}", f"model.dtype={dtype}", *(shape if kind == "gpt2" else [])]
    whole, part = [], []
    expected = trained(trainer_of(tiny(*settings)), whole)
    found = trained(trainer_of(tiny(*settings, AGAIN)), part)
    assert found == expected
    assert sum(part) < 0.5 * sum(whole)


def test_a_layer_is_computed_twice_in_a_training_step_and_once_in_an_evaluation(tiny, monkeypatch):
    from transformers.models.bert.modeling_bert import BertSelfOutput

    calls = []
    forward = BertSelfOutput.forward
    monkeypatch.setattr(BertSelfOutput, "forward", lambda self, *a: calls.append(1) or forward(self, *a))
    trainer = trainer_of(tiny(AGAIN, *TRAINING))
    layers = len(layers_of(trainer.model))
    losses = []
    loss = TextClassification.loss
    monkeypatch.setattr(TextClassification, "loss", lambda *a: losses.append(1) or loss(*a))
    calls.clear()
    trained(trainer, [])
    evaluated = -(-60 // 16)
    assert layers == 2
    assert len(calls) == layers * (2 * (len(losses) - evaluated) + evaluated)


def test_it_does_not_decide_the_result(tiny, tmp_path):
    assert tiny().digest() == tiny(AGAIN).digest()
    a, b = rayfed.run(tiny(), out=tmp_path / "a"), rayfed.run(tiny(AGAIN), out=tmp_path / "b")
    assert [r["state/digest"] for r in a.metrics] == [r["state/digest"] for r in b.metrics]


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(UserError, match=r"^engine\.gradient_checkpointing: got true, but Linear has no layers [^\n]*$"):
        layers_of(nn.Linear(2, 2))
