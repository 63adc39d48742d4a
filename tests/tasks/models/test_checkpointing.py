"""Layers computed anew give the bits of layers that were kept, and keep much less."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import rayfed
from rayfed import wire
from rayfed.clients import local_training
from rayfed.clients.messages import ClientOrder, EvalJob, TrainJob
from rayfed.clients.trainer import Trainer
from rayfed.config import validate
from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods.base import Trainable
from rayfed.tasks.data.federation import form_federation
from rayfed.tasks.models.checkpointing import layers_of
from rayfed.tasks.models.spec import describe_model

AGAIN = "engine.gradient_checkpointing=true"
TRAINING = ("lora.dropout=0.2", "client.clip_norm=0.5", "client.batch_size=4", "client.optimizer=adamw")


def learner_of(experiment):
    federation = form_federation(experiment)
    return Trainer(experiment, federation, describe_model(experiment, len(federation.classes)))


def trained(trainer, kept: list[int]):
    """The uploads and losses of a pack of three, from a random B; ``kept`` gets the entries kept for the way back."""
    g = torch.Generator().manual_seed(4)
    layers = {
        name: LowRank(0.1 * torch.randn(out, 4, generator=g), 0.2 * torch.randn(4, inner, generator=g), 2.0)
        for name, (out, inner) in trainer.model_spec.shapes.items()
    }
    adapter = Adapter(layers, trainer.model_spec.head)
    size = adapter.layout.size
    orders = tuple(ClientOrder(c, adapter.layout, 0, Trainable(), size, 1.0, "fp32") for c in (2, 5, 7))

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = trainer.execute(TrainJob(0, 0.01, orders), [wire.encode(adapter.flatten())])
    evaluated = trainer.execute(EvalJob("test", 0, 60, adapter.layout), [wire.encode(adapter.flatten())])
    return result.uploads, result.losses, evaluated.loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padding", ["never", "batch"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_same_bits_with_less_kept(tiny, tiny_gpt2, kind, padding, dtype):
    shape = [f"model.name={tiny_gpt2}", "model.pooling=stock", "lora.target_modules=[c_attn,c_fc]"]
    settings = [*TRAINING, f"engine.padding={padding}", f"model.dtype={dtype}", *(shape if kind == "gpt2" else [])]
    whole, part = [], []
    expected = trained(learner_of(tiny(*settings)), whole)
    found = trained(learner_of(tiny(*settings, AGAIN)), part)
    assert found == expected
    assert sum(part) < 0.5 * sum(whole)


def test_a_layer_is_computed_twice_for_a_step_and_once_for_an_answer(tiny, monkeypatch):
    from transformers.models.bert.modeling_bert import BertSelfOutput

    calls = []
    forward = BertSelfOutput.forward
    monkeypatch.setattr(BertSelfOutput, "forward", lambda self, *a: calls.append(1) or forward(self, *a))
    trainer = learner_of(tiny(AGAIN, *TRAINING))
    layers = len(layers_of(trainer.model))
    steps = []
    real = local_training.row_losses
    monkeypatch.setattr(local_training, "row_losses", lambda *a: steps.append(1) or real(*a))
    calls.clear()
    trained(trainer, [])
    answers = -(-60 // 16)
    assert layers == 2
    assert len(calls) == layers * (2 * len(steps) + answers)


def test_it_is_no_matter_of_the_result_so_a_run_may_go_on_with_it(tiny, tmp_path):
    assert tiny().digest() == tiny(AGAIN).digest()
    a, b = rayfed.run(tiny(), out=tmp_path / "a"), rayfed.run(tiny(AGAIN), out=tmp_path / "b")
    assert [r["state/digest"] for r in a.metrics] == [r["state/digest"] for r in b.metrics]


def test_what_has_no_layers_to_compute_anew_is_refused():
    with pytest.raises(UserError, match=r"^engine\.gradient_checkpointing: got true, but Linear has no layers [^\n]*$"):
        layers_of(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"^engine\.gradient_checkpointing: got true, but the model of [^\n]*$"):
        validate({
            "data": {"source": "lowrank"}, "partition": {"kind": "natural"}, "engine": {"gradient_checkpointing": True}
        })  # fmt: skip
