"""Central training of a small base model on rows that no client has, for `rayfed pretrain`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from rayfed import seeding
from rayfed.config.pretrain import Pretrain
from rayfed.device import to_device
from rayfed.errors import RunError
from rayfed.lora.packed.segments import Segment
from rayfed.tasks.base import Metric, Task
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.models.unpadded import Padded

REPORTS = 20  # of a training
CLIP_NORM = 1.0


def train(
    task: Task, model: nn.Module, federation: Federation, settings: Pretrain, seed: int, device: torch.device,
    report: Callable[[str], None],
) -> dict[str, Metric]:  # fmt: skip
    """Trains all weights of the model, in place, on the training rows; returns `loss` and metrics of held-out rows.

    Every draw is keyed by ``seed``. ``report`` gets a line some 20 times. RunError where the loss is not finite.
    """
    order = seeding.numpy_rng(seed, "pretrain.split").permutation(len(federation.train))
    held_out, rows = np.split(order, [math.floor(settings.validation * len(order))])
    model.to(device).train().requires_grad_(True)
    loss_of = _Loss(task, model, federation, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    begun, recent, every = time.perf_counter(), [], max(1, settings.steps // REPORTS)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeding.derive_seed(seed, "pretrain.dropout"))
        for step, chosen in enumerate(_batches(rows, settings, seed), 1):
            sums, counts, *_ = loss_of(chosen, seeding.derive_seed(seed, "pretrain.augment", step))
            loss = sums.sum() / counts.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
            recent.append(loss.detach())
            if step % every == 0 or step == settings.steps:
                mean = float(torch.stack(recent).mean())
                if not math.isfinite(mean):
                    raise RunError(f"step {step}: the loss is {mean}; pretrain.lr={settings.lr} may be too large")
                report(f"step {step:>7} of {settings.steps}: loss {mean:.4f}, {time.perf_counter() - begun:.0f} s")
                recent = []
    model.eval()
    return loss_of.measured(held_out, settings.batch_size) if len(held_out) else {}


class _Loss:
    """The task's losses of rows of the federation, under the model."""

    def __init__(self, task: Task, model: nn.Module, federation: Federation, device: torch.device) -> None:
        self.task, self.federation, self.device = task, federation, device
        self.forward = task.make_forward(model, Padded("all rows of a batch train one model"))

    def __call__(self, rows: np.ndarray, key: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(sums (rows,), counts (rows,), predictions, labels). ``key`` None: the rows are not augmented."""
        batch = self.federation.train.batch(rows, True)
        if key is not None:
            batch = self.task.augment(batch, [(key, len(rows))])
        batch = {name: to_device(tensor, self.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        outputs = self.forward(batch, [Segment(0, len(rows))]).float()
        return *self.task.loss(outputs, labels), self.task.predictions(outputs), labels

    @torch.no_grad()
    def measured(self, rows: np.ndarray, size: int) -> dict[str, Metric]:
        found = [self(rows[i : i + size], None) for i in range(0, len(rows), size)]
        sums, counts, predictions, labels = (torch.cat(parts).cpu() for parts in zip(*found))
        metrics = self.task.metrics(predictions, labels, self.federation)
        return {"loss": float(sums.double().sum() / counts.double().sum()), **metrics}


def _batches(rows: np.ndarray, settings: Pretrain, seed: int) -> Iterator[np.ndarray]:
    """The batches of all steps: in every epoch a new order, and no last batch that is smaller."""
    size, left = min(settings.batch_size, len(rows)), settings.steps
    epoch = 0
    while left:
        order = rows[seeding.numpy_rng(seed, "pretrain.batches", epoch).permutation(len(rows))]
        for i in range(0, min(len(order) // size, left)):
            yield order[i * size : (i + 1) * size]
        left -= min(len(order) // size, left)
        epoch += 1


def _rate(step: int, settings: Pretrain) -> float:
    """The factor on the learning rate before this step (from 0)."""
    rising = settings.warmup * settings.steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(settings.steps - rising, 1))
