"""Models run without padding against themselves with padding: logits, gradients of every trained tensor, the choice."""

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.segments import Segment
from rayfed.lora.packed.stack import Stack, head_layers, head_values
from rayfed.lora.peft import layer_shape
from rayfed.tasks.data.tokens import Tokens
from rayfed.tasks.models.base import MeanPooledClassifier
from rayfed.tasks.models.unpadded import Padded, Unpadded, UnpaddedModel, choose_batching

LENGTHS = [9, 3, 70, 1, 5, 5, 2]
ROWS = (3, 2, 2)  # of three clients
COMMON = {"vocab_size": 60, "num_labels": 4, "pad_token_id": 1, "initializer_range": 0.2}
WIDE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 80,
}  # fmt: skip
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**COMMON, **WIDE),
    "roberta": lambda: transformers.RobertaConfig(**COMMON, **WIDE),
    "distilbert": lambda: transformers.DistilBertConfig(
        **COMMON, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=80
    ),
    "gpt2": lambda: transformers.GPT2Config(
        **COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=80, bos_token_id=0, eos_token_id=0
    ),
    "llama": lambda: transformers.LlamaConfig(**COMMON, **WIDE, num_key_value_heads=2, bos_token_id=0, eos_token_id=0),
    "mistral": lambda: transformers.MistralConfig(
        **COMMON, **WIDE, num_key_value_heads=2, sliding_window=30, bos_token_id=0, eos_token_id=0
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **COMMON,
        **WIDE,
        classifier_pooling="mean",
        local_attention=160,
        cls_token_id=0,
        sep_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "deberta": lambda: transformers.DebertaV2Config(**COMMON, **WIDE),
    "albert": lambda: transformers.AlbertConfig(**COMMON, **WIDE, embedding_size=16),
}
HEADS = ("classifier", "score", "pre_classifier")


def model_of(kind):
    """A model with random weights; "mean" is a BERT under our own head."""
    torch.manual_seed(0)
    if kind == "mean":
        encoder = transformers.BertModel(CONFIGS["bert"](), add_pooling_layer=False)
        model = MeanPooledClassifier(encoder, 4, normalize=True)
    else:
        model = transformers.AutoModelForSequenceClassification.from_config(CONFIGS[kind]())
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    draw = np.random.default_rng(4)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    return Tokens(draw.integers(2, 60, offsets[-1]).astype(np.int32), offsets, np.arange(len(LENGTHS)) % 4, pad_id=1)


def stacked(kind):
    """Three slots, an adapter with random factors on every linear layer below the head in each."""
    model = model_of(kind)
    head = [name for name, _ in model.named_children() if name in HEADS]
    inside = set(head_layers(model, head))
    shapes = {
        name: layer_shape(module)
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and name not in inside
    }
    values = head_values(model, head)
    stack = Stack(model, shapes, head)
    g = torch.Generator().manual_seed(6)
    adapters = []
    for _ in range(3):
        layers = {
            name: LowRank(0.1 * torch.randn(out, 2, generator=g), 0.2 * torch.randn(2, inner, generator=g), 1.5)
            for name, (out, inner) in shapes.items()
        }
        adapters.append(Adapter(layers, {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in values.items()}))
    stack.load(adapters)
    return model, stack


def trained(kind, tokens, how):
    """Logits of a pack of three clients, and the gradients of their mean losses' sum, by tensor."""
    model, stack = stacked(kind)
    order = np.array([2, 0, 4, 6, 1, 3, 5])
    bounds = np.cumsum((0, *ROWS))
    lengths = tokens.lengths[order]
    segments = [Segment(i, n, None, lengths[bounds[i] : bounds[i + 1]].tolist()) for i, n in enumerate(ROWS)]
    batch = tokens.batch(order, padded=isinstance(how, Padded))
    labels = batch.pop("labels")
    with stack.using(segments):
        logits = UnpaddedModel(model, how)(batch, segments) if isinstance(how, Unpadded) else model(**batch).logits
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        torch.stack([part.mean() for part in losses.split(ROWS)]).sum().backward()
    return logits.detach(), stack.views({part: values.grad for part, values in stack.parameters.items()})


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("mean", Unpadded("mean")),
        ("bert", Unpadded("first")),
        ("roberta", Unpadded("first", first_position=2)),
        ("distilbert", Unpadded("first")),
        ("gpt2", Unpadded("last")),
        ("llama", Unpadded("last")),
        ("modernbert", Unpadded("all")),
    ],
)
def test_without_padding_a_model_computes_what_it_computes_with_padding(tokens, kind, how):
    """Every linear layer adapted, a pooler's included; three clients of different texts, one of a single token."""
    assert choose_batching(model_of(kind), 70) == how
    padded, expected = trained(kind, tokens, Padded("to compare"))
    flat, found = trained(kind, tokens, how)
    torch.testing.assert_close(flat, padded, rtol=1e-5, atol=2e-6)
    assert any(grad is not None and part == "A" for (_, part), grad in expected.items())
    for name, grad in expected.items():
        assert (grad is None) == (found[name] is None), name
        if grad is not None:  # a last layer's keys, say, may have a gradient of 0 but for rounding
            assert float((found[name] - grad).norm()) <= 2e-5 * float(grad.norm()) + 1e-6, name


@pytest.mark.parametrize(
    ("kind", "longest", "reason"),
    [
        ("mistral", 31, "a text of 31 tokens is longer than the window of 30"),
        ("deberta", 20, "its logits differ without padding"),  # its attention is its own
        ("albert", 20, "its pooler does not see every token's state"),
    ],
)
def test_a_model_that_cannot_be_run_without_padding_is_run_with_it(kind, longest, reason):
    found = choose_batching(model_of(kind), longest)
    assert isinstance(found, Padded)
    assert found.reason.endswith(f"ForSequenceClassification: {reason}")
    assert reason in str(found)


def test_a_window_that_no_text_exceeds_does_not_matter():
    assert choose_batching(model_of("mistral"), 30) == Unpadded("last")


@pytest.mark.parametrize("longest", [1, 2, 64, 65])
@pytest.mark.parametrize("kind", ["gpt2", "mean"])
def test_the_choice_stands_whatever_the_longest_text(kind, longest):
    found = choose_batching(model_of(kind), longest)
    assert isinstance(found, Unpadded)
    assert longest == 1 or found.head_input == {"gpt2": "last", "mean": "mean"}[kind]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "mean", "mistral"])
def test_choosing_leaves_the_model_as_it_was(tokens, kind):
    model = model_of(kind)
    before = copy.deepcopy(model)
    batch = tokens.batch(np.arange(len(tokens)), padded=True)
    batch.pop("labels")
    choose_batching(model, 64)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before(**batch).logits)
    for a, b in zip(model.modules(), before.modules(), strict=True):
        assert (len(a._forward_hooks), len(a._forward_pre_hooks)) == (len(b._forward_hooks), len(b._forward_pre_hooks))
    config, then = (getattr(m, "encoder", m).config for m in (model, before)) if kind == "mean" else (
        model.config, before.config,
    )  # fmt: skip
    assert config.to_dict() == then.to_dict()
    assert config._attn_implementation == then._attn_implementation


def test_a_model_of_no_known_build_is_padded():
    found = choose_batching(nn.Linear(3, 3), 10)
    assert found == Padded("Linear: it has no encoder apart from its head")


def test_the_choice_is_said_in_words():
    assert str(Unpadded("last")) == "none (the head reads the last of a text's tokens)"
    assert str(Padded("engine.padding=batch")) == "to the longest of a batch (engine.padding=batch)"
