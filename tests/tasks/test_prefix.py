"""The states below the lowest adapter: found where a model's blocks are a chain, and as good as computing them anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from rayfed.lora.batch import Segment
from rayfed.tasks.flat import Flat, FlatModel, choose
from rayfed.tasks.models import MeanPooledClassifier
from rayfed.tasks.prefix import Prefix, PrefixedTokens, Skipper, find
from rayfed.tasks.tokens import Tokens

COMMON = {"vocab_size": 60, "num_labels": 4, "pad_token_id": 1, "initializer_range": 0.2}
WIDE = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 80,
}  # fmt: skip
KINDS = {
    "bert": (lambda: transformers.BertConfig(**COMMON, **WIDE), "bert.encoder.layer", "attention.self.query"),
    "roberta": (lambda: transformers.RobertaConfig(**COMMON, **WIDE), "roberta.encoder.layer", "output.dense"),
    "gpt2": (
        lambda: transformers.GPT2Config(
            **COMMON, n_embd=32, n_layer=4, n_head=4, n_positions=80, bos_token_id=0, eos_token_id=0
        ),
        "transformer.h",
        "attn.c_attn",
    ),
    "llama": (
        lambda: transformers.LlamaConfig(**COMMON, **WIDE, num_key_value_heads=2, bos_token_id=0, eos_token_id=0),
        "model.layers",
        "self_attn.q_proj",
    ),
    "mean": (lambda: transformers.BertConfig(**COMMON, **WIDE), "encoder.encoder.layer", "attention.self.value"),
}


def model_of(kind):
    torch.manual_seed(0)
    config = KINDS[kind][0]()
    if kind == "mean":
        model = MeanPooledClassifier(transformers.BertModel(config, add_pooling_layer=False), 4, normalize=True)
    else:
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    return model.eval().requires_grad_(False)


def layers(kind, *blocks):
    _, name, target = KINDS[kind]
    return [f"{name}.{i}.{target}" for i in blocks]


@pytest.fixture(scope="module")
def tokens():
    lengths = [9, 3, 40, 1, 5, 5, 2]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    drawn = np.random.default_rng(4).integers(2, 60, offsets[-1])
    return Tokens(drawn.astype(np.int32), offsets, np.arange(len(lengths)) % 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_below_the_lowest_adapter_are_found(kind):
    model = model_of(kind)
    how = choose(model, 40)
    assert isinstance(how, Flat)
    before = {name: module.forward for name, module in model.named_modules()}
    assert find(model, layers(kind, 3, 2), how) == Prefix(KINDS[kind][1], 2, 32)
    assert find(model, layers(kind, 0, 3), how) is None
    assert find(model, [], how) is None
    assert find(model, [*layers(kind, 2), "classifier"], how) is None  # an adapter outside of the blocks
    assert {name: module.forward for name, module in model.named_modules()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_logits_from_kept_states_are_those_of_the_whole_model(kind, tokens):
    """States computed text by text, logits of other batches: the same but for rounding, and the head's gradients."""
    model = model_of(kind)
    how = choose(model, 40)
    flat = FlatModel(model, how)
    skipper = Skipper(flat, find_prefix(kind, how))
    each = [
        skipper.states_of(tokens.flat(np.array([i])), [Segment(0, 1, lengths=[int(tokens.lengths[i])])])
        for i in range(len(tokens))
    ]
    kept = PrefixedTokens(tokens, torch.cat(each).numpy())
    for rows in (np.array([5, 0, 2]), np.arange(7)[::-1]):
        segments = [Segment(0, len(rows), lengths=tokens.lengths[rows].tolist())]
        top = model.get_submodule(layers(kind, 3)[0]).weight.requires_grad_(True)
        whole = skipper(tokens.flat(rows), segments)
        (wanted,) = torch.autograd.grad(whole.square().sum(), top)
        quick = skipper(kept.batch(rows, 1), segments)
        (found,) = torch.autograd.grad(quick.square().sum(), top)
        torch.testing.assert_close(quick, whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_frozen_blocks_do_not_run(tokens):
    model = model_of("bert")
    how = choose(model, 40)
    skipper = Skipper(FlatModel(model, how), find_prefix("bert", how))
    rows, segments = np.arange(7), [Segment(0, 7, lengths=tokens.lengths.tolist())]
    inputs = {**tokens.flat(rows), "states": torch.zeros(1, int(tokens.offsets[-1]), 32)}
    ran = []
    for i, block in enumerate(model.bert.encoder.layer):
        block.attention.register_forward_hook(lambda *_, i=i: ran.append(i))
    skipper(inputs, segments)
    assert ran == [2, 3]
    skipper.states_of(tokens.flat(rows), segments)
    assert ran == [2, 3, 0, 1]
    skipper(tokens.flat(rows), segments)
    assert ran == [2, 3, 0, 1, 0, 1, 2, 3]


def test_blocks_that_are_no_chain_all_run():
    model = model_of("bert")
    how = choose(model, 40)
    adapted = layers("bert", 2)
    assert find(model, adapted, how) is not None
    # What comes in passes by the block as well: let through, it would count twice.
    model.bert.encoder.layer[1].register_forward_hook(lambda _, args, output: output + args[0])
    assert find(model, adapted, how) is None


def find_prefix(kind, how):
    prefix = find(model_of(kind), layers(kind, 3, 2), how)
    assert prefix is not None
    return prefix
