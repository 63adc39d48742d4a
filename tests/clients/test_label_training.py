"""Packs of multi-label and regression clients against a plain loop over a real PEFT model, and against members alone.

The loss of the plain loop is transformers' own for its `problem_type`. Clients start from random B: at B = 0 the first
change of A is nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from rayfed.clients.local_training import PackMember, TrainedClient, TrainingContext, batches, train_pack
from rayfed.config.task import Model
from rayfed.config.training import Client
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.packed.stack import Stack, head_values
from rayfed.lora.peft import match_targets
from rayfed.tasks._sequence_classification import SequenceClassification
from rayfed.tasks.data.tokens import Tokens
from rayfed.tasks.models.base import FrozenBase, load_base
from rayfed.tasks.models.unpadded import Padded, Unpadded
from rayfed.tasks.multi_label import MultiLabel
from rayfed.tasks.regression import Regression

LABELS = 5
TASKS: dict[str, SequenceClassification] = {"multi_label": MultiLabel(), "regression": Regression()}
ROWS = {4: range(0, 7), 9: range(45, 60), 2: range(25, 28)}  # of three clients: two steps, four steps, one step
SETTINGS = Client(optimizer="sgd", momentum=0.9, weight_decay=0.02, batch_size=4, clip_norm=1.0)
LR, SEED, ROUND = 0.1, 11, 5


def base_of(folder: Path, task: SequenceClassification) -> FrozenBase:
    return load_base(Model(name=str(folder)), LABELS if task.has_classes else 1, SEED, task.problem_type)


def lora(base: FrozenBase) -> LoraConfig:
    return LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"], modules_to_save=list(base.head)
    )


def member(base: FrozenBase, client: int) -> PackMember:
    g = torch.Generator().manual_seed(client)
    layers = {
        name: LowRank(0.1 * torch.randn(out, 2, generator=g), 0.2 * torch.randn(2, inner, generator=g), 2.0)
        for name, (out, inner) in match_targets(base.model, lora(base), base.head).items()
    }
    adapter = Adapter(layers, head_values(base.model, base.head))
    everything = torch.ones(adapter.layout.size, dtype=torch.bool)
    return PackMember(client, adapter.layout, adapter.flatten(), everything, np.array(ROWS[client]))


def plain_loop(base: FrozenBase, tokens: Tokens, member: PackMember) -> tuple[torch.Tensor, float]:
    model: Any = get_peft_model(base.model, lora(base)).eval()
    inner = model.base_model.model
    parameters = []
    for entry in member.layout.entries:
        if entry.part == "head":
            module, _, kind = entry.name.rpartition(".")
            parameter = inner.get_submodule(module).modules_to_save["default"].get_parameter(kind)
        else:
            parameter = getattr(inner.get_submodule(entry.name), f"lora_{entry.part}")["default"].weight
        parameter.data.copy_(member.start[entry.start : entry.start + entry.numel].view(entry.shape))
        parameters.append(parameter)
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=0.02)
    losses = []
    for rows in batches(member.rows, SETTINGS, SEED, ROUND, member.client):
        batch = tokens.batch(rows, padded=True)
        optimizer.zero_grad()
        loss = model(**{**batch, "labels": batch["labels"].float()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return torch.cat([p.detach().flatten() for p in parameters]), float(np.mean(losses))


@pytest.mark.parametrize(
    "batching", [Unpadded("first"), pytest.param(Padded(""), marks=pytest.mark.slow)], ids=["unpadded", "padded"]
)
@pytest.mark.parametrize("name", TASKS)
def test_a_pack_gives_each_client_what_a_stock_peft_loop_gives_it(
    name: str, batching: Unpadded | Padded, tokens: Tokens, tiny_bert: Path
) -> None:
    task, draw = TASKS[name], np.random.default_rng(0)
    labels = draw.random((60, LABELS)) < 0.3 if name == "multi_label" else draw.normal(size=60).astype(np.float32)
    tokens = Tokens(tokens.ids, tokens.offsets, labels)

    def train(members: list[PackMember]) -> list[TrainedClient]:
        base = base_of(tiny_bert, task)
        stack = Stack(base.model, match_targets(base.model, lora(base), base.head), base.head)
        outputs = task.make_forward(base.model, batching)
        context = TrainingContext(
            stack, lambda inputs: outputs(inputs, stack.batch.segments), task, tokens, isinstance(batching, Padded),
            SETTINGS, SEED, torch.device("cpu"),
        )  # fmt: skip
        return train_pack(context, members, lr=LR, t=ROUND)

    members = [member(base_of(tiny_bert, task), client) for client in ROWS]
    for own, found in zip(members, train(members)):
        vector, loss = plain_loop(base_of(tiny_bert, task), tokens, own)
        (alone,) = train([own])
        for entry in own.layout.entries:
            place = slice(entry.start, entry.start + entry.numel)
            change = (vector[place] - own.start[place]).norm()
            assert change > 1e-3, entry
            for result in (found, alone):
                assert (result.vector[place] - vector[place]).norm() < 1e-4 * change, entry
        assert [found.loss, alone.loss] == pytest.approx([loss, loss], rel=1e-5)
