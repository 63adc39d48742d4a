"""Federated LoRA as one writes it without rayfed: the reference of `rayfed bench round`.

Each process has PEFT's model. For a client, the global weights are copied in, a fresh SGD optimizer takes the client's
batches one by one, padded, and the weights are read out. The processes return weighted sums, and the caller takes the
mean. The batches are those of rayfed, so both do the same work and reach the same weights.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.clients.local_training import batches
from rayfed.clients.plan import RunPlan
from rayfed.lora.adapter import Layout
from rayfed.lora.peft import lora_config
from rayfed.tasks.data.tokens import Tokens


class BareLoop:
    """As many processes as the plan has workers, with one thread each. Use it in a `with`."""

    def __init__(self, plan: RunPlan) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        plan = replace(plan, profiles=cast(Any, None))  # not needed here, and its rule may be a lambda
        for _ in range(plan.engine.workers):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, plan), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()  # the model is loaded

    def train(self, vector: Tensor, t: int, clients: Sequence[Sequence[int]], pad_to: int | None) -> Tensor:
        """The clients' weights after round ``t``, from ``vector`` (n,): their mean (n,), weighted by examples.

        ``clients``: those of each process. ``pad_to``: tokens of every row; None: as many as the longest of its batch.
        """
        for pipe, own in zip(self.pipes, clients, strict=True):
            pipe.send((vector.numpy(), t, list(own), pad_to))
        parts = [pipe.recv() for pipe in self.pipes]
        return torch.from_numpy(sum(total for total, _ in parts) / sum(weight for _, weight in parts))

    def __enter__(self) -> BareLoop:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def bare_model(plan: RunPlan) -> tuple[nn.Module, list[nn.Parameter]]:
    """PEFT's model of the plan, and its trained parameters in the order of the adapter's layout."""
    from peft import get_peft_model

    base = plan.task.load_base(plan.federation)
    config = lora_config(**plan.lora.model_dump(exclude={"train"}), head=base.head)
    model = get_peft_model(cast(Any, base.model), config).eval()
    return model, _parameters(model, plan.start().layout)


def train_client(
    model: nn.Module, parameters: list[nn.Parameter], plan: RunPlan, vector: Tensor, client: int, t: int,
    pad_to: int | None,
) -> Tensor:  # fmt: skip
    """The client's weights (n,) after round ``t``, from ``vector`` (n,)."""
    settings, data = plan.client, cast(Tokens, plan.federation.train)
    with torch.no_grad():
        nn.utils.vector_to_parameters(vector.clone(), parameters)  # they become views of it
    optimizer = torch.optim.SGD(parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    for batch in batches(plan.federation.rows_of(client), settings, plan.seed, t, client):
        inputs = data.batch(batch, padded=True)
        labels = inputs.pop("labels")
        if pad_to is not None:
            extra = (0, pad_to - inputs["input_ids"].shape[1])
            inputs["input_ids"] = nn.functional.pad(inputs["input_ids"], extra, value=data.pad_id)
            inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], extra)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(parameters).detach()


def _serve(pipe: Connection, plan: RunPlan) -> None:
    torch.set_num_threads(1)
    model, parameters = bare_model(plan)
    pipe.send("ready")
    while True:
        vector, t, clients, pad_to = pipe.recv()
        total, weight = np.zeros_like(vector), 0
        for client in clients:
            examples = len(plan.federation.rows_of(client))
            trained = train_client(model, parameters, plan, torch.from_numpy(vector), client, t, pad_to)
            total += examples * trained.numpy()
            weight += examples
        pipe.send((total, weight))


def _parameters(model: nn.Module, layout: Layout) -> list[nn.Parameter]:
    """The model's trained parameters in the layout's order; no others train."""
    named = dict(model.named_parameters())
    model.requires_grad_(False)
    parameters = []
    for entry in layout.entries:
        module, _, kind = entry.name.rpartition(".")
        name = f"{module}.modules_to_save.default.{kind}" if entry.part == "head" else ""
        parameters.append(named[f"base_model.model.{name or f'{entry.name}.lora_{entry.part}.default.weight'}"])
        parameters[-1].requires_grad_(True)
    return parameters
