"""A federation: the data and who holds which rows. Read-only; made once and shared by all workers.

Arrays are flat (NumPy), so that Ray's object store hands them to every worker without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rayfed.config import Experiment
from rayfed.errors import UserError
from rayfed.tasks.data.tokens import Tokens
from rayfed.tasks.known_answer.problem import Problem
from rayfed.tasks.known_answer.regression import Regression, problem_of


@dataclass(frozen=True)
class Federation:
    """Splits, class names (or outputs), and the training rows of client c: rows[starts[c]:starts[c + 1]].

    ``problem`` is there where the answer is known: then nothing needs to be evaluated on data.
    """

    train: Tokens | Regression
    validation: Tokens | Regression
    test: Tokens | Regression
    classes: tuple[str, ...]
    rows: np.ndarray
    starts: np.ndarray
    pad_id: int
    problem: Problem | None = None

    @property
    def clients(self) -> int:
        """Clients in the population, those without data included."""
        return len(self.starts) - 1

    @cached_property
    def sizes(self) -> np.ndarray:
        """Training rows per client (clients,)."""
        return np.diff(self.starts)

    @cached_property
    def holders(self) -> np.ndarray:
        """The clients that hold data, in ascending order: those that can take part."""
        return np.flatnonzero(self.sizes)

    def rows_of(self, client: int) -> np.ndarray:
        return self.rows[self.starts[client] : self.starts[client + 1]]


def form_federation(experiment: Experiment) -> Federation:
    """Loads, partitions and tokenises the run's data. UserError for whatever is wrong with it or too little of it."""
    if experiment.data.source == "lowrank":
        return _known_answer(experiment)
    from rayfed.tasks.data.dataset import load_data
    from rayfed.tasks.data.partition import partition
    from rayfed.tasks.data.tokens import tokenize
    from rayfed.tasks.models.base import load_tokenizer, longest_input

    data = load_data(experiment.data, experiment.seed)
    parts = partition(data.train.labels, data.train.owners, experiment.partition, experiment.seed)
    holders = sum(len(part) > 0 for part in parts)
    if experiment.server.cohort > holders:
        raise UserError(
            f"server.cohort: got {experiment.server.cohort}, but only {holders} of {len(parts)} clients hold data"
        )
    if experiment.eval.early_stop and not len(data.validation.labels):
        raise UserError("eval.early_stop: needs a validation split; set data.validation above 0")
    cut, limit = experiment.data.max_tokens, longest_input(experiment.model)
    tokenizer = load_tokenizer(experiment.model)
    train, validation, test = (tokenize(split, tokenizer, cut) for split in (data.train, data.validation, data.test))
    longest = max(int(split.lengths.max(initial=0)) for split in (train, validation, test))
    if limit is not None and longest > limit:
        raise UserError(
            f"data.max_tokens: got {cut}, but some texts have {longest} tokens and the model takes at most {limit}"
        )
    return Federation(
        train=train,
        validation=validation,
        test=test,
        classes=data.classes,
        rows=np.concatenate(parts).astype(np.int64),
        starts=np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64),
        pad_id=int(tokenizer.pad_token_id),
    )


def _known_answer(experiment: Experiment) -> Federation:
    problem = problem_of(experiment)
    nothing = Regression(problem.features[:0], problem.targets[:0])
    return Federation(
        train=Regression(problem.features, problem.targets),
        validation=nothing,
        test=nothing,
        classes=tuple(f"output {i}" for i in range(problem.targets.shape[1])),
        rows=np.arange(len(problem.owner)),
        starts=np.searchsorted(problem.owner, np.arange(problem.clients + 1)).astype(np.int64),
        pad_id=0,
        problem=problem,
    )
