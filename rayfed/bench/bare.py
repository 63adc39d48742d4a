"""Federated LoRA as one writes it without rayfed: the reference of `rayfed bench round`.

Each process has PEFT's model. For a client, the global weights are copied in, a fresh SGD optimizer takes the client's
batches one by one, padded, and the weights are read out. The processes return weighted sums, and the caller takes the
mean. The batches are those of rayfed, so both do the same work and reach the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from multiprocessing import get_context
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.clients.local_training import batches
from rayfed.clients.plan import RunPlan
from rayfed.config.task import Model
from rayfed.lora.adapter import Entry
from rayfed.lora.peft import PREFIX, lora_config
from rayfed.tasks._images import ImageTask
from rayfed.tasks.data.tokens import Tokens
from rayfed.tasks.models.images import load_image_input

TrainRound = Callable[[Tensor, int, Sequence[Sequence[int]], int | None, bool], Tensor]
_this_process: tuple[RunPlan, nn.Module, list[nn.Parameter]]


@contextmanager
def bare_loop(plan: RunPlan) -> Iterator[TrainRound]:
    """As many processes as the plan has workers, with one thread each, and a function that trains a round on them.

    The function takes the weights (n,) before the round, the round, the clients of each process, the tokens of every
    row (None: as many as the longest row of its batch has), and whether to compute in torch's autocast to bfloat16. It
    returns the mean (n,) of the clients' weights after the round, weighted by examples. The processes load the model
    during the first round.
    """
    plan = replace(plan, profiles=cast(Any, None))  # not needed here, and its rule may be a lambda
    with ExitStack() as stack:
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), _load, (plan,)))
            for _ in range(plan.engine.workers)
        ]

        def train(
            vector: Tensor, t: int, clients: Sequence[Sequence[int]], pad_to: int | None, autocast: bool
        ) -> Tensor:
            work = [
                pool.submit(_train, vector.numpy(), t, own, pad_to, autocast)
                for pool, own in zip(pools, clients, strict=True)
            ]
            parts = [future.result() for future in work]
            return torch.from_numpy(sum(total for total, _ in parts) / sum(examples for _, examples in parts))

        yield train


def bare_model(plan: RunPlan) -> tuple[nn.Module, list[nn.Parameter]]:
    """PEFT's model of the plan, and its trained parameters in the order of the adapter's layout; no others train."""
    from peft import get_peft_model

    base = plan.task.load_base(plan.federation)
    config = lora_config(**plan.lora.model_dump(exclude={"train", "compute"}), head=base.head, task_type=base.task_type)
    model = get_peft_model(cast(Any, base.model), config).eval()
    model.requires_grad_(False)
    named = dict(model.named_parameters())
    parameters = [named[_peft_name(entry)] for entry in plan.start().layout.entries]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return model, parameters


def train_client(
    model: nn.Module, parameters: list[nn.Parameter], plan: RunPlan, vector: Tensor, client: int, t: int,
    pad_to: int | None, autocast: bool = False,
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
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = _loss(model, plan, inputs, labels)
        loss.backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(parameters).detach()


def _loss(model: nn.Module, plan: RunPlan, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The batch's mean loss, as one computes it with transformers alone."""
    task = plan.settings["data"]["task"]
    if task == "causal_lm":
        targets = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss: Tensor = model(**inputs, labels=targets).loss
        return loss
    if task == "image_classification":
        inputs = {"pixel_values": _normaliser(cast(ImageTask, plan.task).model_settings)(inputs["pixel_values"])}
    return nn.functional.cross_entropy(model(**inputs).logits.float(), labels)


@lru_cache(1)
def _normaliser(model: Model) -> Callable[[Tensor], Tensor]:
    return load_image_input(model).normaliser(torch.device("cpu"), torch.float32)


def _load(plan: RunPlan) -> None:
    global _this_process
    torch.set_num_threads(1)
    _this_process = (plan, *bare_model(plan))


def _train(
    vector: np.ndarray, t: int, clients: Sequence[int], pad_to: int | None, autocast: bool
) -> tuple[np.ndarray, int]:
    """The sum of the clients' weights (n,), weighted by examples, and the examples."""
    plan, model, parameters = _this_process
    total, examples, start = np.zeros_like(vector), 0, torch.from_numpy(vector)
    for client in clients:
        rows = len(plan.federation.rows_of(client))
        total += rows * train_client(model, parameters, plan, start, client, t, pad_to, autocast).numpy()
        examples += rows
    return total, examples


def _peft_name(entry: Entry) -> str:
    if entry.part != "head":
        return f"{PREFIX}{entry.name}.lora_{entry.part}.default.weight"
    module, _, kind = entry.name.rpartition(".")
    return f"{PREFIX}{module}.modules_to_save.default.{kind}"
