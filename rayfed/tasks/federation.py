"""A federation: tokenised data and who holds which rows. Read-only; made once and shared by all workers.

Arrays are flat (NumPy), so that Ray's object store hands them to every worker without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayfed.config import Experiment
from rayfed.errors import UserError
from rayfed.tasks.tokens import Tokens


@dataclass(frozen=True)
class Federation:
    """Splits as token ids, class names, and the training rows of client c: rows[starts[c]:starts[c + 1]]."""

    train: Tokens
    validation: Tokens
    test: Tokens
    classes: tuple[str, ...]
    rows: np.ndarray
    starts: np.ndarray
    pad_id: int

    @property
    def clients(self) -> int:
        """Clients in the population, those without data included."""
        return len(self.starts) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Training rows per client (clients,)."""
        return np.diff(self.starts)

    def rows_of(self, client: int) -> np.ndarray:
        return self.rows[self.starts[client] : self.starts[client + 1]]


def form_federation(experiment: Experiment) -> Federation:
    """Loads, partitions and tokenises the run's data. UserError for whatever is wrong with it or too little of it."""
    from rayfed.tasks.data import load_data
    from rayfed.tasks.models import load_tokenizer, longest_input
    from rayfed.tasks.partition import partition
    from rayfed.tasks.tokens import tokenize

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
    splits = {name: tokenize(getattr(data, name), tokenizer, cut) for name in ("train", "validation", "test")}
    longest = max(int(split.lengths.max(initial=0)) for split in splits.values())
    if limit is not None and longest > limit:
        raise UserError(
            f"data.max_tokens: got {cut}, but some texts have {longest} tokens and the model takes at most {limit}"
        )
    return Federation(
        **splits,
        classes=data.classes,
        rows=np.concatenate(parts).astype(np.int64),
        starts=np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64),
        pad_id=int(tokenizer.pad_token_id),
    )
