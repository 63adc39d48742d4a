"""The messages between server and workers: jobs and their results. All are plain values that can be pickled.

Vectors travel beside a job as payloads, ``bytes`` made by `rayfed.wire`; a job refers to them by position. Some
payloads are traffic: what a client downloads. Others stand for what a client has already, and only the simulation moves
them.

The message of an objective beside the adapter is an `EncodedMessage`, see `rayfed.clients.objective_messages`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
from torch import Tensor

from rayfed.lora.adapter import Layout
from rayfed.methods import PackSum, Trainable
from rayfed.wire import Sizes

SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class EncodedMessage:
    """The payloads of an objective's message of one client, see `rayfed.objectives.Message`."""

    vector: bytes | None = None
    numbers: bytes | None = None

    @property
    def payloads(self) -> tuple[bytes, ...]:
        """Those that travel."""
        return tuple(payload for payload in (self.vector, self.numbers) if payload is not None)


@dataclass(frozen=True)
class ObjectiveOrder:
    """What a client's objective receives (``vector``, ``numbers``) and what it stored: positions among the job's
    payloads. None: there is none."""

    vector: int | None = None
    numbers: int | None = None
    stored: int | None = None


@dataclass(frozen=True)
class ClientOrder:
    """One client's part of a training job. ``payload``, ``known`` and the integers of ``base``, ``merge`` and
    ``objective`` are positions among the job's payloads."""

    client: int
    layout: Layout
    payload: int  # its download: the entries that it does not know
    trainable: Trainable
    budget: int  # the largest number of entries that it sends
    density_up: float
    values: str  # number format of its upload
    weight: float = 1.0  # of its change in the aggregation
    known: int | None = None  # the entries that it has already
    base: tuple[int, Layout] | None = None  # the frozen change of its base
    merge: tuple[int, Layout] | None = None  # a change that it merges into its base before it trains; also a download
    objective: ObjectiveOrder | None = None  # of a stateful objective


@dataclass(frozen=True)
class TrainJob:
    """Train a pack of clients in round t (from 0) at the learning rate ``lr``.

    With ``summed`` the worker returns the sum of the uploads instead of the uploads. With ``step`` nothing moves: the
    uploads are the gradients at the start, on the batches of this local step (from 0).
    """

    t: int
    lr: float
    orders: tuple[ClientOrder, ...]
    summed: bool = False
    step: int | None = None


@dataclass(frozen=True)
class Divergence:
    """Why a client's training counts as diverged, see `rayfed.clients.divergence`. ``dropped``: it sends no upload."""

    reason: str
    dropped: bool


@dataclass(frozen=True)
class TrainResult:
    """The results of a pack, one entry a client: upload, mean training loss over its steps, examples seen, steps done.

    ``personal`` holds each client's personal entries, encoded; None where nothing is personal. ``sizes`` describes each
    upload. A summed job has no uploads but ``summed``, one sum a part; its uploads are counted by their sizes.
    ``diverged`` names the clients whose training diverged, by their place in the pack. A dropped client has None as
    upload, personal entries and sizes. A part of which all clients were dropped has no sum. A stateful objective has
    ``messages`` of the clients, and what each of them has ``stored``, encoded; both are None of a dropped client.
    """

    uploads: tuple[bytes | None, ...]
    personal: tuple[bytes | None, ...]
    losses: tuple[float, ...]
    examples: tuple[int, ...]
    steps: tuple[int, ...]
    ranks: tuple[int, ...]  # the largest trained rank over the layers; 0 without adapters
    seconds: float
    parts: tuple[int, ...]  # numbers of clients that trained together: the pack, or less where memory was short
    sizes: tuple[Sizes | None, ...]
    summed: tuple[PackSum, ...] = ()
    diverged: Mapping[int, Divergence] = field(default_factory=dict)
    messages: tuple[EncodedMessage | None, ...] = ()
    stored: tuple[bytes | None, ...] = ()
    statistics: tuple[bytes | None, ...] = ()  # what the weighting needs of each client, encoded; empty: nothing

    @property
    def sent(self) -> tuple[int, ...]:
        """The numbers of uploads of each part, without the parts that have none."""
        return uploads_by_part(self.sizes, self.parts)


def uploads_by_part(uploads: Sequence[object | None], parts: Sequence[int]) -> tuple[int, ...]:
    """How many entries of ``uploads`` are not None in each of the ``parts`` (numbers of clients); no zeros."""
    rest = iter(uploads)
    counts = (sum(upload is not None for upload in islice(rest, part)) for part in parts)
    return tuple(count for count in counts if count)


@dataclass(frozen=True)
class EvalJob:
    """Evaluate payload 0 on rows start to stop of a split, counted in order of length; on some classes' rows alone.

    With ``rows``, start and stop count these rows of the split alone. With ``seen`` the model chooses among these
    classes, ascending, which are those of all rows.
    """

    split: SplitName
    start: int
    stop: int
    layout: Layout
    classes: tuple[int, ...] | None = None  # None: all
    rows: np.ndarray | None = None  # (n,) int64, indices into the split; None: all
    seen: tuple[int, ...] | None = None  # None: all


@dataclass(frozen=True)
class EvalResult:
    """The evaluated rows: the sum of their losses and its number of terms; each row's index, prediction and label."""

    loss: float
    count: float
    rows: np.ndarray  # (n,) int64, indices into the split
    predictions: Tensor  # (n, ...), see `Task.predictions`
    labels: Tensor  # (n, ...)


@dataclass(frozen=True)
class GenerateJob:
    """Write responses of at most ``most`` tokens to the prompts of these rows of a split, as one batch, with payload 0.

    Only for tasks that can, see `Task.generates`.
    """

    split: SplitName
    rows: np.ndarray  # (n,) int64, indices into the split
    layout: Layout
    most: int


@dataclass(frozen=True)
class GenerateResult:
    """The tokens of each row's response."""

    tokens: tuple[np.ndarray, ...]  # (up to `GenerateJob.most`,) int64 each


@dataclass(frozen=True)
class FeatureJob:
    """Compute the frozen base's features (the inputs of its head) for rows start to stop, counted in order of
    length."""

    split: SplitName
    start: int
    stop: int


@dataclass(frozen=True)
class FeatureResult:
    """The features of each row, and the row's label."""

    features: Tensor  # (rows, width) float32
    labels: Tensor  # (rows,) int64


@dataclass(frozen=True)
class MeasureJob:
    """Measure packs of these ascending sizes, each of the first clients named; see `rayfed.clients.pack_timing`."""

    clients: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class PackTiming:
    """A pack of ``size`` clients: tokens and seconds of a step, and the bytes that training needs at the peak."""

    size: int
    tokens: float
    seconds: float
    bytes: int


@dataclass(frozen=True)
class MeasureResult:
    """The sizes that fit into memory and seemed to pay, and the bytes that the worker may take for its packs."""

    measured: tuple[PackTiming, ...]
    memory: int


Job = TrainJob | EvalJob | GenerateJob | FeatureJob | MeasureJob
Result = TrainResult | EvalResult | GenerateResult | FeatureResult | MeasureResult
