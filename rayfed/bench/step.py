"""Where a pack's training spends its time, by operator: the base in bfloat16 against the base in float32.

The settings and data are those of `rayfed bench round`. A and B are packs of the same clients, in this process, in
turn. Each operator of torch is timed as the processor time of the thread that runs it, which other processes disturb
less than wall time. `all` is measured once more, without the clock. Products are those with the frozen weights, and all
others (adapters, attention, head); their `share of the rate` is their operations a second over those of one large
product in the same format.
"""

from __future__ import annotations

import copy
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rayfed.api import prepare
from rayfed.bench.round import SETTINGS
from rayfed.bench.timing import Row, one_thread
from rayfed.clients.local_training import PackMember, train_pack
from rayfed.clients.trainer import Trainer
from rayfed.config import validate
from rayfed.config.load import assign
from rayfed.server.sampling import cohort

FORMATS = ("bfloat16", "float32")
BASE, OTHER, REST = "products with the base", "other products", "Python, autograd, all other operators"
GROUPS = {
    "softmax": ("_softmax", "_softmax_backward_data"),
    "GELU": ("gelu", "gelu_backward"),
    "LayerNorm": ("native_layer_norm", "native_layer_norm_backward"),
    "sums and scales": ("add", "add_", "mul", "mul_"),
    "copies and gathers": ("_to_copy", "copy_", "clone", "index_select", "index_fill_", "cat", "embedding"),
}


@one_thread()
def measure(pairs: int = 5, pack: int = 8, **overrides: Any) -> list[Row]:
    """One row for each group of operators, and one for the whole; ``overrides`` change settings, by dotted keys."""
    runs = {dtype: _Run(dtype, pack, overrides) for dtype in FORMATS}
    found: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in FORMATS}
    for turn in range(pairs + 1):
        for dtype, run in runs.items():
            seconds = run.seconds()
            if turn:  # the first warms up
                found[dtype].append(seconds)
    rates = {dtype: _rate(getattr(torch, dtype)) for dtype in FORMATS}
    return [_row(group, found, runs, rates) for group in (BASE, OTHER, *GROUPS, REST, "all")]


def _row(group: str, found: dict[str, list[dict[str, float]]], runs: dict[str, _Run], rates: dict[str, float]) -> Row:
    a, b = ([seconds[group] for seconds in found[dtype]] for dtype in FORMATS)
    ratios, facts = np.array(b) / np.array(a), dict[str, Any]()
    for dtype, seconds in zip(FORMATS, (a, b)):
        facts[f"share of the time, {dtype}"] = float(np.median([s[group] / s["all"] for s in found[dtype]]))
        if operations := runs[dtype].operations[BASE if group == "all" else group]:
            name = "of the base's products over the whole" if group == "all" else "of the rate"
            facts[f"share {name}, {dtype}"] = operations / float(np.median(seconds)) / rates[dtype]
    medians = float(np.median(a)), float(np.median(b))
    spread = float(np.median(ratios)), float(ratios.min()), float(ratios.max())
    return Row(group, *FORMATS, *medians, *spread, *medians, spread[0], torch.get_num_threads(), facts)


class _Run:
    """A trainer in one format, and a pack of clients of the first round."""

    def __init__(self, dtype: str, pack: int, overrides: dict[str, Any]) -> None:
        settings = copy.deepcopy(SETTINGS)
        changes = {**overrides, "model.dtype": dtype, "engine.kind": "local", "server.cohort": pack}
        for key, value in changes.items():
            assign(settings, key, value, f"{key}={value}")
        plan = prepare(validate(settings))
        trainer, start = Trainer(plan), plan.start()
        vector, everything = start.flatten(), torch.ones(start.layout.size, dtype=torch.bool)
        clients = cohort(plan.federation.holders, pack, plan.seed, 0)
        members = [PackMember(c, start.layout, vector, everything, plan.federation.rows_of(c)) for c in clients]
        self.train = partial(train_pack, trainer.context, members, lr=plan.client.lr, t=0)
        self.frozen = {p.untyped_storage().data_ptr() for p in trainer.model.parameters() if not p.requires_grad}
        self.operations: Counter[str] = Counter()

    def seconds(self) -> dict[str, float]:
        """Trains the pack; processor seconds by group, and of all."""
        with _Clock(self.frozen) as clock:
            self.train()
        self.operations = clock.operations
        timed = {group: clock.seconds[group] for group in (BASE, OTHER, *GROUPS)}
        begun = time.thread_time()
        self.train()
        whole = time.thread_time() - begun
        return {**timed, REST: whole - sum(timed.values()), "all": whole}


class _Clock(TorchDispatchMode):
    """Adds up the time and the operations of torch's operators by group."""

    def __init__(self, frozen: set[int]) -> None:
        super().__init__()
        self.frozen = frozen
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: Counter[str] = Counter()
        self.groups = {name: group for group, names in GROUPS.items() for name in names}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        begun = time.thread_time()
        result = func(*args, **(kwargs or {}))
        seconds = time.thread_time() - begun
        packet = func._overloadpacket
        if packet in flop_registry:
            weights = any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() in self.frozen for t in args)
            group = BASE if weights else OTHER
            self.operations[group] += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        else:
            group = self.groups.get(packet.__name__, REST)
        self.seconds[group] += seconds
        return result


def _rate(dtype: torch.dtype) -> float:
    """Operations a second of one large product, the best of ten."""
    size, seconds = 1024, []
    a = torch.randn(size, size).to(dtype)
    for _ in range(10):
        begun = time.thread_time()
        a @ a
        seconds.append(time.thread_time() - begun)
    return 2 * size**3 / min(seconds)
