"""The states below the lowest adapter: computed once, before the first round, and sent along with every job.

Which splits are worth it is a function of the settings and the data, since it decides bits: those whose texts the run
reads twice or more, as far as `engine.cache_gb` reaches. They are computed in jobs that the data alone cut, so the
states do not depend on who computed them; a resumed run computes them again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from rayfed.clients.blueprint import Blueprint
from rayfed.clients.jobs import Reading, SplitName, StatesJob, StatesResult
from rayfed.config import Experiment
from rayfed.server.crew import Crew, Done, Handle, Task, in_order
from rayfed.server.evaluate import spans
from rayfed.server.packs import client_costs
from rayfed.tasks.federation import Federation

PAYS = 2.0  # how often a run reads a text, on average, for its states to be kept


class Informed:
    """A crew whose jobs all come with the states of the split they read, where they are known."""

    def __init__(self, crew: Crew, states: Mapping[SplitName, Handle]) -> None:
        self.crew, self.states = crew, states

    def put(self, payload: Any) -> Handle:
        return self.crew.put(payload)

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        return self.crew.run([self._informed(task) for task in tasks])

    def drain_events(self) -> list[str]:
        return self.crew.drain_events()

    def close(self) -> None:
        self.crew.close()

    def _informed(self, task: Task) -> Task:
        job = task.job
        if not isinstance(job, Reading) or job.split not in self.states:
            return task
        return Task(replace(job, states=len(task.payloads)), (*task.payloads, self.states[job.split]))


def kept(experiment: Experiment, federation: Federation, blueprint: Blueprint) -> dict[SplitName, int]:
    """The splits whose states are kept, and how many bytes each takes."""
    if blueprint.prefix is None:
        return {}
    found: dict[SplitName, int] = {}
    left = experiment.engine.cache_gb * 1e9
    for split, reads in _reads(experiment, federation).items():
        size = 4 * blueprint.prefix.width * int(getattr(federation, split).lengths.sum())
        if reads >= PAYS and 0 < size <= left:
            found[split] = size
            left -= size
    return found


def informed(crew: Crew, experiment: Experiment, federation: Federation, blueprint: Blueprint) -> tuple[Crew, str]:
    """(the crew, with what is kept; what was done, in words): the same crew and no words where nothing is kept."""
    prefix, sizes = blueprint.prefix, kept(experiment, federation, blueprint)
    if prefix is None or not sizes:
        return crew, ""
    begun = time.perf_counter()
    states = {split: crew.put(_states(crew, federation, split, experiment.eval.batch_size)) for split in sizes}
    told = (
        f"the first {prefix.count} blocks have no adapters; their outputs are kept: {', '.join(sizes)}, "
        f"{sum(sizes.values()) / 1e6:.0f} MB, {time.perf_counter() - begun:.1f} s"
    )
    return Informed(crew, states), told


def _reads(experiment: Experiment, federation: Federation) -> dict[SplitName, float]:
    """How often the run reads a text of each split, on average."""
    server, settings = experiment.server, experiment.eval
    each = client_costs(federation, experiment.client)[federation.holders].mean()
    trained = server.rounds * server.cohort * each / max(int(federation.train.lengths.sum()), 1)
    models = 1 + (settings.masked and experiment.wire.down.density < 1)
    measured = -(-server.rounds // settings.every) * models
    return {
        "train": float(trained) + settings.controls,
        "validation": measured + settings.controls,
        "test": measured + settings.controls,
    }


def _states(crew: Crew, federation: Federation, split: SplitName, batch_size: int) -> np.ndarray:
    """(tokens, width) float32, in the order of the split's tokens."""
    data = getattr(federation, split)
    by_length = np.argsort(data.lengths, kind="stable")  # as jobs count
    cut = spans(len(data), batch_size)
    whole: np.ndarray | None = None
    tasks = [Task(StatesJob(split, start, stop)) for start, stop in cut]
    for done, (start, stop) in zip(in_order(crew.run(tasks)), cut, strict=True):
        found = cast(StatesResult, done.result).states
        if whole is None:
            whole = np.empty((int(data.lengths.sum()), found.shape[1]), np.float32)
        whole[data.places(by_length[start:stop])] = found
    assert whole is not None
    return whole
