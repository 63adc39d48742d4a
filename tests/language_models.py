"""Tiny causal language models over bytes, made by code: ByT5's tokenizer needs no vocabulary file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

COMMON: dict[str, Any] = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.2}
TARGETS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj", "lm_head"]}
"""Modules to adapt. GPT-2's output layer shares its weights with the embeddings; Llama's has weights of its own."""


def language_model(kind: str) -> PreTrainedModel:
    """A GPT-2 or a Llama of 2 layers, 16 wide, with random weights, for rows of up to 64 tokens."""
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**COMMON, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    config = LlamaConfig(
        **COMMON, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_language_model(folder: Path, kind: str) -> Path:
    """The folder, with a model of the kind and its tokenizer."""
    language_model(kind).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of 1 to 40 letters, the letters of three speakers."""
    draw = random.Random(seed)
    speakers = {"Ann": "abcd ", "Bob": "cdef ", "Cay": "efgh "}
    rows = []
    for i in range(count):
        speaker = ("Ann", "Bob", "Cay")[i % 3]
        text = "".join(draw.choices(speakers[speaker], k=draw.randint(1, 40)))
        rows.append({"text": f"{speaker[0]}{text}", "speaker": speaker})
    return rows
