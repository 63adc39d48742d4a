"""Packs of causal language models against a plain loop over a real PEFT model, and against members trained alone.

Rows are texts, or prompts with responses, of which only the latter count.

Clients start from random B, not from zero: at B = 0 the first change of A is nothing, and comparing it says nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from language_models import TARGETS, language_model
from peft import LoraConfig, get_peft_model

from rayfed.clients.local_training import PackMember, TrainedClient, TrainingContext, batches, train_pack
from rayfed.config.training import Client
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.stack import Stack
from rayfed.lora.peft import match_targets
from rayfed.tasks.causal_lm import CausalLM
from rayfed.tasks.data.prompt_tokens import PromptTokens
from rayfed.tasks.data.tokens import Tokens
from rayfed.tasks.models.unpadded import Padded, Unpadded

LENGTHS = (7, 2, 30, 5, 12, 40, 3, 2, 9, 20)
ROWS = {4: [0, 2, 5, 7, 8], 9: [1, 3], 2: [4, 6, 9]}  # of three clients, whose batches differ in size
SETTINGS = Client(optimizer="adamw", weight_decay=0.1, batch_size=3, epochs=2, clip_norm=1.0)
LR, SEED, ROUND = 0.01, 11, 5


@pytest.fixture(scope="module", params=["causal_lm", "instruction"])
def tokens(request: pytest.FixtureRequest) -> Tokens:
    draw = np.random.default_rng(0)
    ids = draw.integers(3, 300, sum(LENGTHS)).astype(np.int32)
    parts = ids, np.cumsum([0, *LENGTHS]), np.zeros(len(LENGTHS), np.int64), 0
    if request.param == "causal_lm":
        return Tokens(*parts)
    nothing = {"responses": np.zeros(0, np.uint8), "ends": np.zeros(len(LENGTHS) + 1, np.int64)}
    return PromptTokens(*parts, prompts=draw.integers(1, LENGTHS), **nothing)


def lora(kind: str) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2"
    )


def member(kind: str, client: int) -> PackMember:
    g = torch.Generator().manual_seed(client)
    layers = {
        name: LowRank(0.1 * torch.randn(out, 2, generator=g), 0.2 * torch.randn(2, inner, generator=g), 2.0)
        for name, (out, inner) in match_targets(language_model(kind), lora(kind), ()).items()
    }
    adapter = Adapter(layers, {})
    everything = torch.ones(adapter.layout.size, dtype=torch.bool)
    return PackMember(client, adapter.layout, adapter.flatten(), everything, np.array(ROWS[client]))


def train(kind: str, tokens: Tokens, members: list[PackMember], batching: Unpadded | Padded) -> list[TrainedClient]:
    model, task = language_model(kind), CausalLM()
    stack = Stack(model, match_targets(model, lora(kind), ()), ())
    outputs = task.make_forward(model, batching)
    context = TrainingContext(
        stack, lambda inputs: outputs(inputs, stack.batch.segments), task, tokens, isinstance(batching, Padded),
        SETTINGS, SEED, torch.device("cpu"),
    )  # fmt: skip
    return train_pack(context, members, lr=LR, t=ROUND)


def plain_loop(kind: str, tokens: Tokens, member: PackMember) -> tuple[torch.Tensor, float]:
    """One client's round with stock PEFT: the loss is transformers' own, with labels of -100 where none counts."""
    model: Any = get_peft_model(language_model(kind), lora(kind)).eval()
    inner = model.base_model.model
    parameters = []
    for entry in member.layout.entries:
        parameter = getattr(inner.get_submodule(entry.name), f"lora_{entry.part}")["default"].weight
        parameter.data.copy_(member.start[entry.start : entry.start + entry.numel].view(entry.shape))
        parameters.append(parameter)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(map(id, parameters))
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=SETTINGS.weight_decay)
    losses = []
    for rows in batches(member.rows, SETTINGS, SEED, ROUND, member.client):
        texts = [torch.tensor(tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]]).long() for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)
        mask = (labels >= 0).long()
        if isinstance(tokens, PromptTokens):
            for label, prompt in zip(labels, tokens.prompts[rows]):
                label[:prompt] = -100
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return torch.cat([p.detach().reshape(-1) for p in parameters]), float(np.mean(losses))


@pytest.mark.parametrize("batching", [Unpadded("all"), Padded("")], ids=["unpadded", "padded"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_pack_gives_each_client_what_a_stock_peft_loop_gives_it(
    kind: str, batching: Unpadded | Padded, tokens: Tokens
) -> None:
    members = [member(kind, client) for client in ROWS]
    for own, found in zip(members, train(kind, tokens, members, batching)):
        vector, loss = plain_loop(kind, tokens, own)
        (alone,) = train(kind, tokens, [own], batching)
        moved = (vector - own.start).abs()
        assert (moved > 1e-3).float().mean() > 0.9  # and the tolerance is far below that
        for result in (found, alone):
            torch.testing.assert_close(result.vector, vector, rtol=0, atol=1e-4)
            assert result.loss == pytest.approx(loss, rel=1e-5)
