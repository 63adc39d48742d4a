"""A base in 4 bits: which layers are converted, what is refused, and training over them if bitsandbytes is there."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from language_models import save_language_model
from torch import nn

from rayfed import wire
from rayfed.api import check, prepare
from rayfed.clients.messages import ClientOrder, TrainJob
from rayfed.clients.trainer import Trainer
from rayfed.config.schema import Experiment
from rayfed.errors import UserError
from rayfed.lora.adapter import fresh_adapter
from rayfed.methods.base import Trainable
from rayfed.tasks.models import four_bit
from rayfed.tasks.models.base import in_dtype


def test_only_on_a_gpu(tiny):
    with pytest.raises(UserError, match=r"model.load_in_4bit: got true, but engine.device=cpu .* engine.device=cuda$"):
        tiny("model.load_in_4bit=true")


def on_a_gpu_elsewhere(experiment: Experiment, **model: object) -> Experiment:
    """The settings for a GPU of the cluster, which this process need not have."""
    more = {"load_in_4bit": True, **model}
    return experiment.with_(
        {"engine.kind": "ray", "engine.device": "cuda"} | {f"model.{k}": v for k, v in more.items()}
    )


def test_a_base_without_linear_layers_is_refused_before_anything_starts(tiny, tiny_gpt2):
    own = {"name": str(tiny_gpt2), "pooling": "stock"}
    settings = on_a_gpu_elsewhere(tiny("lora.target_modules=[c_attn]"), **own)
    with pytest.raises(UserError, match=r"model.load_in_4bit: got true, but this base has no nn.Linear"):
        check(settings)


def test_the_layers_are_those_below_head_and_output_layer(tiny, tmp_path):
    for settings in (tiny(), tiny("model.pooling=stock")):
        plan = prepare(settings)
        found = four_bit.linear_layers(plan.task.load_base(plan.federation))
        assert found.keys() >= plan.model.shapes.keys()
        assert not any("classifier" in name for name in found)
    model = save_language_model(tmp_path / "llama", "llama")
    own = f"model.name={model}", "model.pooling=stock", "lora.target_modules=[q_proj]"
    plan = prepare(tiny("data.task=causal_lm", "data.max_tokens=64", *own))
    found = four_bit.linear_layers(plan.task.load_base(plan.federation))
    assert len(found) == 7 * len(plan.model.shapes)  # q, k, v, o, gate, up, down; not lm_head
    assert "lm_head" not in found


def test_without_the_package_there_is_one_line(tiny, monkeypatch):
    plan = prepare(tiny())
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.nn", None)
    with pytest.raises(UserError, match="bitsandbytes is not installed; install rayfed with the extra `bitsandbytes`"):
        Trainer(replace(plan, model=replace(plan.model, load_in_4bit=True)))


def test_the_plan_knows_it(tiny):
    plan = prepare(on_a_gpu_elsewhere(tiny(), dtype="bfloat16"))
    assert plan.model.load_in_4bit
    assert plan.model.base_format == "4 bits, computed in bfloat16"
    assert plan.digest != prepare(on_a_gpu_elsewhere(tiny(), dtype="bfloat16", load_in_4bit=False)).digest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_over_4_bits_is_training_over_the_rounded_weights(tiny, dtype):
    """A pack over the base in 4 bits against the same pack over a base of the weights that the 4 bits stand for."""
    functional = pytest.importorskip("bitsandbytes.functional")
    plan = prepare(tiny(f"model.dtype={dtype}"))
    plan = replace(plan, model=replace(plan.model, load_in_4bit=True))  # bitsandbytes' layers also run on a CPU
    coarse = Trainer(plan)
    exact = Trainer(replace(plan, model=replace(plan.model, load_in_4bit=False)))
    base = in_dtype(copy.deepcopy(plan.task.load_base(plan.federation)), dtype)
    layers = four_bit.linear_layers(base)
    differ = 0.0
    for name, layer in _layers(exact.model, layers).items():
        own = _layers(coarse.model, layers)[name].weight
        assert own.dtype == torch.uint8
        _layers(coarse.model, layers)[name].support_avx512bf16_for_cpu = False  # a CPU's own way packs weights again
        weight = functional.dequantize_4bit(own.data, own.quant_state).to(layer.weight.dtype)
        differ = max(differ, (weight - layer.weight).abs().max().item())
        layer.weight.data = weight
    assert differ > 1e-3  # the weights were rounded
    changes = [_train(trainer) for trainer in (coarse, exact)]
    size = changes[1].norm()
    assert size > 0
    assert (changes[0] - changes[1]).norm() <= (1e-4 if dtype == "float32" else 0.02) * size


def _layers(model: nn.Module, names) -> dict[str, nn.Module]:
    """The layers of a model, whether adapters lie over them or not."""
    found = {name: model.get_submodule(name) for name in names}
    return {name: getattr(layer, "base", layer) for name, layer in found.items()}


def _train(trainer: Trainer) -> torch.Tensor:
    adapter = fresh_adapter(trainer.plan.model.shapes, trainer.plan.model.head, 4, 1.0, 0)
    size = adapter.layout.size
    orders = tuple(ClientOrder(c, adapter.layout, 0, Trainable(), size, 1.0, "fp32") for c in (0, 1))
    result = trainer.execute(TrainJob(0, 0.1, orders), [wire.encode(adapter.flatten())])
    return torch.stack([wire.decode(upload).values for upload in result.uploads])
