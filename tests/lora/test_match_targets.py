"""Target modules: the same layers as by PEFT, and what is refused."""

import copy

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from rayfed.errors import UserError
from rayfed.lora.peft import layer_shape, match_targets

BERT_REGEX = r".*layer\.1\.(attention\.self\.key|output\.dense)"
GPT2_REGEX = r"transformer\.h\.0\.(attn\.c_attn|mlp\.c_fc)"


def config_for(base, targets, rank=2, **options):
    return LoraConfig(
        task_type="SEQ_CLS", r=rank, target_modules=targets, modules_to_save=list(base.head),
        fan_in_fan_out=hasattr(base.model, "transformer"), **options,
    )  # fmt: skip


def adapted_by_peft(model, config) -> list[str]:
    wrapped = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).base_model.model
    return [name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize(
    ("kind", "targets", "options"),
    [
        ("bert", ["query", "value"], {}),
        ("bert", ["output.dense"], {}),
        ("bert", ["bert.encoder.layer.0.attention.self.key", "dense"], {}),
        ("bert", BERT_REGEX, {}),
        ("bert", "all-linear", {}),
        ("bert", None, {}),
        ("bert", ["query", "dense"], {"layers_to_transform": [1]}),
        ("bert", None, {"layers_to_transform": [0]}),
        ("mean", ["query", "value"], {}),
        ("mean", BERT_REGEX, {}),
        ("mean", "all-linear", {}),
        ("mean", None, {}),
        ("mean", ["dense"], {"layers_to_transform": [1]}),
        ("gpt2", ["c_attn", "c_fc", "c_proj"], {}),
        ("gpt2", GPT2_REGEX, {}),
        ("gpt2", "all-linear", {}),
        ("gpt2", None, {}),
        ("gpt2", ["c_proj"], {"layers_to_transform": [1]}),
    ],
)
def test_the_same_layers_are_adapted_as_by_peft(base, kind, targets, options):
    fresh = base(kind)
    config = config_for(fresh, targets, **options)
    expected = adapted_by_peft(fresh.model, config)
    assert expected
    shapes = match_targets(fresh.model, config, fresh.head)
    assert list(shapes) == expected
    assert all(shapes[name] == layer_shape(fresh.model.get_submodule(name)) for name in shapes)


def test_shapes_are_out_by_in_also_where_the_weight_is_stored_transposed(base):
    fresh = base("gpt2")
    shapes = match_targets(fresh.model, config_for(fresh, ["c_attn", "c_fc"]), fresh.head)
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    assert shapes["transformer.h.0.mlp.c_fc"] == (128, 32)
    assert fresh.model.transformer.h[0].mlp.c_fc.weight.shape == (32, 128)


def test_a_target_that_matches_nothing_lists_the_linear_layers(base):
    fresh = base("gpt2")
    with pytest.raises(UserError) as refusal:
        match_targets(fresh.model, config_for(fresh, ["query", "value"]), fresh.head)
    assert str(refusal.value) == (
        "lora.target_modules: got ['query', 'value'], but it matches no layer; "
        "this model's linear layers are c_attn, c_fc, c_proj"
    )


def test_the_head_is_no_target(base):
    fresh = base("mean")
    with pytest.raises(UserError, match="matches no layer"):
        match_targets(fresh.model, config_for(fresh, ["classifier"]), fresh.head)


@pytest.mark.parametrize(
    ("targets", "named"),
    [(["LayerNorm"], "LayerNorm"), (".*attention", "BertAttention"), (["word_embeddings"], "Embedding")],
)
def test_a_target_that_is_no_linear_layer_is_refused(base, targets, named):
    fresh = base("bert")
    with pytest.raises(UserError, match=rf"lora\.target_modules: got .* but it matches bert\..*, a {named};"):
        match_targets(fresh.model, config_for(fresh, targets), fresh.head)


def test_a_target_that_is_no_regular_expression_is_refused(base):
    fresh = base("bert")
    with pytest.raises(UserError, match=r"lora\.target_modules: got '\*query', but .*regular expression"):
        match_targets(fresh.model, config_for(fresh, "*query"), fresh.head)


def test_a_model_that_peft_has_no_default_for_is_refused():
    with pytest.raises(UserError, match=r"lora\.target_modules: got null, but PEFT has no default for 'custom'"):
        match_targets(nn.Sequential(nn.Linear(4, 4)), LoraConfig(), ())


@pytest.mark.parametrize(("kind", "most"), [("bert", 32), ("gpt2", 32)])
def test_a_rank_above_a_layers_size_is_refused(base, kind, most):
    fresh = base(kind)
    match_targets(fresh.model, config_for(fresh, "all-linear", rank=most), fresh.head)
    with pytest.raises(UserError, match=rf"lora\.rank: got {most + 1}, but .* at most {most} is allowed"):
        match_targets(fresh.model, config_for(fresh, "all-linear", rank=most + 1), fresh.head)


@pytest.mark.parametrize("numbers", [[2], [0, 99], [99, 1, 7]])
def test_a_layer_number_that_the_model_lacks_is_refused(base, numbers):
    fresh = base("bert")
    config = config_for(fresh, ["query"], layers_to_transform=numbers)
    missing = [number for number in numbers if number > 1]
    with pytest.raises(UserError) as refusal:
        match_targets(fresh.model, config, fresh.head)
    assert str(refusal.value) == (
        f"lora.layers_to_transform: got {missing}, but the layers with modules that match are 0, 1"
    )
    assert config.layers_to_transform == numbers
