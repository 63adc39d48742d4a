"""What the server asks of a worker, and what comes back: plain values that any process can be sent.

Adapters travel beside a job as payloads, ``bytes`` made by `wire`; a job names them by position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rayfed.lora.adapter import Layout
from rayfed.methods.base import Trainable

SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Order:
    """One client's part of a training job."""

    client: int
    payload: int  # which of the job's payloads it downloads
    trainable: Trainable
    density_up: float
    values: str  # number format of its upload


@dataclass(frozen=True)
class TrainJob:
    """Train a pack of clients: round t (from 0), learning rate, each payload's layout, the orders in pack order."""

    t: int
    lr: float
    layouts: tuple[Layout, ...]
    orders: tuple[Order, ...]


@dataclass(frozen=True)
class TrainResult:
    """Per order: the encoded upload, the mean training loss over its steps, examples seen and steps done."""

    uploads: tuple[bytes, ...]
    losses: tuple[float, ...]
    examples: tuple[int, ...]
    steps: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class EvalJob:
    """Evaluate payload 0 on rows start to stop of a split, counted in order of length."""

    split: SplitName
    start: int
    stop: int
    layout: Layout


@dataclass(frozen=True)
class EvalResult:
    """Sums over the rows: cross-entropy in nats, correct predictions, rows."""

    loss: float
    correct: int
    count: int


@dataclass(frozen=True)
class FeatureJob:
    """The frozen base's features (what its head sees) for rows start to stop of a split, in order of length."""

    split: SplitName
    start: int
    stop: int


@dataclass(frozen=True)
class FeatureResult:
    """What a head sees of each row, and the row's class."""

    features: Tensor  # (rows, width) float32
    labels: Tensor  # (rows,) int64


Job = TrainJob | EvalJob | FeatureJob
Result = TrainResult | EvalResult | FeatureResult
