"""Five clients on a ring, each with a quadratic loss of its own, in float64: a network made of NumPy alone.

f_i(x) = 1/2 (x - c_i)^T H_i (x - c_i),   H_i and c_i differ
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rayfed.config.training import Client

CLIENTS, SIZE = 5, 6
RING = np.eye(CLIENTS) / 3 + np.roll(np.eye(CLIENTS), 1, 0) / 3 + np.roll(np.eye(CLIENTS), -1, 0) / 3
COMPLETE = np.full((CLIENTS, CLIENTS), 1 / CLIENTS)
ALPHA = 0.05

_draw = np.random.default_rng(7)
_roots = _draw.normal(size=(CLIENTS, SIZE, SIZE))
H = 0.5 * np.eye(SIZE) + _roots @ _roots.transpose(0, 2, 1) / SIZE
CENTRES = _draw.normal(size=(CLIENTS, SIZE))


def gradients(x: np.ndarray) -> np.ndarray:
    """Each client's gradient (CLIENTS, SIZE) at its row of ``x``."""
    return np.einsum("kij,kj->ki", H, x - CENTRES)


def soft(v: np.ndarray, threshold: float) -> np.ndarray:
    return np.sign(v) * np.maximum(np.abs(v) - threshold, 0)


def central(weight: float, steps: int = 4000) -> np.ndarray:
    """The minimiser (SIZE,) of the mean loss plus ``weight`` times the l1 norm, by ISTA."""
    x = np.zeros(SIZE)
    for _ in range(steps):
        x = soft(x - 0.2 * gradients(np.tile(x, (CLIENTS, 1))).mean(0), 0.2 * weight)
    return x


class Quadratics:
    """The clients as an algorithm sees them (`rayfed.topologies.Network`); ``seen`` has every x of a gradient."""

    def __init__(self, W: np.ndarray, steps: int, momentum: float = 0.0) -> None:
        self.W, self.lr, self.seen = W, ALPHA, list[np.ndarray]()
        self.settings = Client(steps=steps, momentum=momentum)
        self.columns = torch.arange(SIZE)
        self.exchanges = 0

    def exchange(self, values: Tensor) -> Tensor:
        self.exchanges += 1
        return torch.from_numpy(self.W @ values.numpy())

    def gradients(self, x: Tensor, step: int) -> Tensor:
        self.seen.append(x.numpy())
        return torch.from_numpy(gradients(x.numpy()))

    def train(self, x: Tensor) -> Tensor:
        values = x.numpy()
        for _ in range(self.settings.steps or 1):
            values = values - self.lr * gradients(values)
        return torch.from_numpy(values)
