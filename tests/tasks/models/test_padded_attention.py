"""Attention of padded batches in 16 bits on a CPU: computed in float32, given back in 16 bits."""

from __future__ import annotations

import pytest
import torch
import transformers

from rayfed.api import prepare
from rayfed.clients.trainer import Trainer
from rayfed.tasks.models.padded_attention import NAME, use_float32_attention

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def bert():
    config = transformers.BertConfig(**SIZE, vocab_size=60)
    return transformers.BertForSequenceClassification(config)


def llama():  # causal, and heads share keys
    config = transformers.LlamaConfig(**SIZE, vocab_size=60, num_key_value_heads=1, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


@pytest.mark.parametrize("build", [bert, llama], ids=lambda build: build.__name__)
def test_torchs_function_sees_float32_and_the_logits_stay(build, monkeypatch):
    torch.manual_seed(0)
    model = build().eval().bfloat16()
    ids = torch.randint(1, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    logits, seen = [], []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **options):
        seen.append({t.dtype for t in (query, key, value)})
        return original(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for change in (lambda _: None, use_float32_attention):
        change(model)
        with torch.no_grad():
            logits.append(model(input_ids=ids, attention_mask=mask).logits.float())
    assert seen == 2 * [{torch.bfloat16}] + 2 * [{torch.float32}]
    torch.testing.assert_close(logits[0], logits[1], rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(("dtype", "padding"), [("float32", "batch"), ("bfloat16", "batch"), ("bfloat16", "never")])
def test_only_padded_batches_in_sixteen_bits_use_it(tiny, dtype, padding):
    trainer = Trainer(prepare(tiny(f"model.dtype={dtype}", f"engine.padding={padding}")))
    used = trainer.model.encoder.config._attn_implementation == NAME
    assert used == ((dtype, padding) == ("bfloat16", "batch"))
