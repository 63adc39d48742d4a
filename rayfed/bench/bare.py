"""Federated LoRA as one writes it without rayfed: the yardstick of `rayfed bench round`.

PEFT's model in each process; per client the global weights are copied in, a fresh SGD optimizer takes its batches one
by one, padded, and the weights are read out; the processes return weighted sums and the caller takes the mean. Batches
are the ones that rayfed would take, so both do the same work and reach the same weights.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.clients.local_training import batches
from rayfed.config import Experiment
from rayfed.lora.adapter import Layout
from rayfed.lora.peft import lora_config
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.models.base import base_of


class BareLoop:
    """As many processes as there are workers, one thread each. Close it, or use it in a `with`."""

    def __init__(self, experiment: Experiment, federation: Federation, layout: Layout) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(experiment.engine.workers):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, experiment, federation, layout), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()  # the model is loaded

    def train(self, vector: Tensor, t: int, clients: Sequence[Sequence[int]], pad_to: int | None) -> Tensor:
        """The mean, weighted by examples, of what the clients make of ``vector`` (n,) in round ``t``; (n,).

        ``clients``: those of each process. ``pad_to``: tokens of every row; None: as many as the longest of its batch.
        """
        for pipe, own in zip(self.pipes, clients, strict=True):
            pipe.send((vector.numpy(), t, list(own), pad_to))
        parts = [pipe.recv() for pipe in self.pipes]
        return torch.from_numpy(sum(total for total, _ in parts) / sum(weight for _, weight in parts))

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()

    def __enter__(self) -> BareLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection, experiment: Experiment, federation: Federation, layout: Layout) -> None:
    from peft import get_peft_model

    torch.set_num_threads(1)
    base = base_of(experiment, len(federation.classes))
    config = lora_config(**experiment.lora.model_dump(exclude={"train"}), head=base.head)
    model: Any = get_peft_model(base.model, config).eval()
    parameters = _parameters(model, layout)
    pipe.send("ready")
    while True:
        vector, t, clients, pad_to = pipe.recv()
        total, weight = np.zeros_like(vector), 0
        for client in clients:
            rows = federation.rows_of(client)
            trained = _client(
                model, parameters, torch.from_numpy(vector), rows, client, t, pad_to, experiment, federation
            )
            total += len(rows) * trained.numpy()
            weight += len(rows)
        pipe.send((total, weight))


def _client(
    model: nn.Module, parameters: list[nn.Parameter], vector: Tensor, rows: np.ndarray, client: int, t: int,
    pad_to: int | None, experiment: Experiment, federation: Federation,
) -> Tensor:  # fmt: skip
    settings = experiment.client
    with torch.no_grad():
        nn.utils.vector_to_parameters(vector.clone(), parameters)  # they become views of it
    optimizer = torch.optim.SGD(parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    for batch in batches(rows, settings, experiment.seed, t, client):
        inputs = federation.train.batch(batch, federation.pad_id)
        labels = inputs.pop("labels")
        if pad_to is not None:
            extra = (0, pad_to - inputs["input_ids"].shape[1])
            inputs["input_ids"] = nn.functional.pad(inputs["input_ids"], extra, value=federation.pad_id)
            inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], extra)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(parameters).detach()


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
