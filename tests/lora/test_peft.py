"""What is written is what PEFT reads: a fresh base plus the folder computes the run's own logits."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.segments import Segment
from rayfed.lora.packed.stack import Stack, head_values
from rayfed.lora.peft import lora_config, match_targets, peft_settings
from rayfed.lora.peft_files import write_peft

CLASSES = 4
TARGETS = {"bert": ["query", "output.dense"], "mean": ["query", "intermediate.dense"], "gpt2": ["c_attn", "c_fc"]}


def save(path, adapter, config, base, conv1d):
    path.mkdir()
    write_peft(path, adapter, peft_settings(config, adapter.layers, base=base, conv1d=conv1d))


def config_for(base, targets, rank=2, alpha=5, **options):
    return LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        modules_to_save=list(base.head),
        **options,
    )


@pytest.fixture
def saved(base, inputs, random_adapter, tmp_path):
    """saved(kind, targets, **options) -> folder, adapter, the stacked model's logits."""

    def make(kind, targets, rslora=False, **options):
        fresh = base(kind)
        config = config_for(fresh, targets, use_rslora=rslora, **options)
        shapes = match_targets(fresh.model, copy.deepcopy(config), fresh.head)
        scale = 5 / 2**0.5 if rslora else 5 / 2
        adapter = random_adapter(shapes, head_values(fresh.model, fresh.head), 2, scale, seed=3)
        stack = Stack(fresh.model, shapes, fresh.head)
        stack.load([adapter])
        with torch.no_grad(), stack.using([Segment(0, 6)]):
            logits = fresh.model(**inputs).logits
        save(tmp_path / "adapter", adapter, config, "the-base", kind == "gpt2")
        return tmp_path / "adapter", adapter, logits

    return make


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["bert", "mean", "gpt2"])
def test_peft_loads_what_was_saved_and_computes_the_same(base, inputs, saved, assert_close_float32, kind, rslora):
    folder, adapter, logits = saved(kind, TARGETS[kind], rslora)
    fresh = base(kind).model
    before = fresh(**inputs).logits
    loaded = PeftModel.from_pretrained(fresh, str(folder)).eval()
    with torch.no_grad():
        after = loaded(**inputs).logits
    assert_close_float32(after, logits)
    assert float((after - before).detach().abs().max()) > 0.1
    for name, value in adapter.head.items():
        module, _, part = name.rpartition(".")
        read = loaded.base_model.model.get_submodule(module).modules_to_save["default"].get_parameter(part)
        assert torch.equal(read, value)


@pytest.mark.parametrize(("kind", "folder_of"), [("bert", "tiny_bert"), ("gpt2", "tiny_gpt2")])
def test_a_stock_model_needs_no_rayfed_to_be_read(request, inputs, saved, assert_close_float32, kind, folder_of):
    """A fresh head drawn by transformers is replaced by the adapter's own."""
    folder, _, logits = saved(kind, TARGETS[kind])
    path = request.getfixturevalue(folder_of)
    torch.manual_seed(99)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=CLASSES, pad_token_id=0)
    loaded = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        assert_close_float32(loaded(**inputs).logits, logits)


@pytest.mark.parametrize(
    ("kind", "targets", "options"),
    [
        ("bert", None, {}),
        ("bert", "all-linear", {}),
        ("bert", r".*layer\.1\..*(query|value)", {}),
        ("bert", ["query", "dense"], {"layers_to_transform": [1]}),
        ("bert", None, {"layers_to_transform": [0]}),
        ("mean", "all-linear", {}),
        ("gpt2", "all-linear", {}),
    ],
)
def test_every_way_to_name_the_layers_comes_back(base, inputs, saved, assert_close_float32, kind, targets, options):
    folder, _, logits = saved(kind, targets, **options)
    loaded = PeftModel.from_pretrained(base(kind).model, str(folder)).eval()
    with torch.no_grad():
        assert_close_float32(loaded(**inputs).logits, logits)


def test_the_folder_holds_no_pickle_and_says_what_it_is(saved):
    folder, _, _ = saved("gpt2", TARGETS["gpt2"])
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "the-base"
    assert config["fan_in_fan_out"] is True
    assert config["inference_mode"] is True
    assert (config["r"], config["lora_alpha"]) == (2, 5)
    assert config["target_modules"] == ["c_attn", "c_fc"]  # sorted: equal runs write equal bytes
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def plain_config(rank=2, alpha=4, targets=("a", "b")):
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))


def pair_adapter():
    return Adapter({name: LowRank(torch.ones(3, 2), torch.ones(2, 5), 2.0) for name in "ab"}, {})


def test_saving_leaves_the_callers_config_as_it_was(tmp_path):
    config = plain_config()
    before = config.to_dict()
    save(tmp_path / "adapter", pair_adapter(), config, "b", True)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("targets", "layers", "stored"),
    [(("a", "b"), (1,), ({"a", "b"}, [1])), ("all-linear", None, ("all-linear", None)), (None, (0,), (None, [0]))],
)
def test_the_config_has_pefts_names(targets, layers, stored):
    config = lora_config(
        rank=3,
        alpha=2.5,
        rslora=True,
        dropout=0.25,
        target_modules=targets,
        layers_to_transform=layers,
        head=("score",),
    )
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (3, 2.5, True, 0.25)
    assert (config.target_modules, config.layers_to_transform) == stored
    assert (config.task_type, config.modules_to_save) == ("SEQ_CLS", ["score"])
