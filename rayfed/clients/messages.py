"""What the server asks of a worker, and what comes back: plain values that any process can be sent.

Vectors travel beside a job as payloads, ``bytes`` made by `wire`; a job names them by position. Some are traffic (what
a client downloads); others stand for what it holds already, and only the simulation moves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from rayfed.lora.adapter import Layout
from rayfed.methods.base import PackSum, Trainable
from rayfed.wire import Sizes

SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class ClientOrder:
    """One client's part of a training job."""

    client: int
    layout: Layout
    payload: int  # which of the job's payloads it downloads: the entries it does not hold
    trainable: Trainable
    budget: int  # at most so many entries go up
    density_up: float
    values: str  # number format of its upload
    weight: float = 1.0  # of its change in the aggregation
    known: int | None = None  # the payload with the entries it holds already
    base: int | None = None  # the payload with the frozen change of its base
    base_layout: Layout | None = None
    merge: int | None = None  # the payload with a change that it merges into its base before it trains
    merge_layout: Layout | None = None


@dataclass(frozen=True)
class TrainJob:
    """Train a pack of clients: round t (from 0), learning rate, the orders in pack order.

    With ``summed`` the uploads stay where they were made, and their sum comes back.
    """

    t: int
    lr: float
    orders: tuple[ClientOrder, ...]
    summed: bool = False


@dataclass(frozen=True)
class TrainResult:
    """Per order: the encoded upload, the mean training loss over its steps, examples seen and steps done.

    ``personal_values`` holds, encoded, what a client keeps for itself: its personal entries; None where nothing is personal.
    ``sizes`` says what each upload held. A summed job gives ``summed``, a sum for every part, in place of uploads: they
    are counted as if they had come.
    """

    uploads: tuple[bytes, ...]
    personal: tuple[bytes | None, ...]
    losses: tuple[float, ...]
    examples: tuple[int, ...]
    steps: tuple[int, ...]
    ranks: tuple[int, ...]  # the largest rank among the layers that the client trained; 0 without adapters
    seconds: float
    parts: tuple[int, ...]  # how many clients trained together, in order: the pack, or less where memory did not do
    sizes: tuple[Sizes, ...]
    summed: tuple[PackSum, ...] = ()


@dataclass(frozen=True)
class EvalJob:
    """Evaluate payload 0 on rows start to stop of a split, counted in order of length; on some classes' rows alone."""

    split: SplitName
    start: int
    stop: int
    layout: Layout
    classes: tuple[int, ...] | None = None  # None: all


@dataclass(frozen=True)
class EvalResult:
    """The evaluated rows: the sum of their losses and its number of terms; each row's index, prediction and label."""

    loss: float
    count: float
    rows: np.ndarray  # (n,) int64, indices into the split
    predictions: Tensor  # (n, ...), see `Task.predictions`
    labels: Tensor  # (n, ...)


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


@dataclass(frozen=True)
class MeasureJob:
    """Measure packs of these sizes, in ascending order, each of the first clients named; see `clients.measure`."""

    clients: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class PackTiming:
    """A pack of so many clients: tokens and seconds of a step, and the bytes that training it needs at the peak."""

    size: int
    tokens: float
    seconds: float
    bytes: int


@dataclass(frozen=True)
class MeasureResult:
    """The sizes that fit and seemed to pay, and the bytes that the worker may take for its packs."""

    measured: tuple[PackTiming, ...]
    memory: int


Job = TrainJob | EvalJob | FeatureJob | MeasureJob
Result = TrainResult | EvalResult | FeatureResult | MeasureResult
