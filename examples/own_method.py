"""Your own method, as an object: python examples/own_method.py"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from step_by_step import SETTINGS

import rayfed
from rayfed.methods import Advance, FactorMean, FactorState, Update, fedavg


@dataclass(frozen=True)
class FedMedian(FactorMean):
    """The coordinate-wise median of the clients' changes (Yin et al., arXiv 1803.01498)."""

    share: float = 1.0
    """The share of the median that is applied."""

    def aggregate(self, state: FactorState, updates: Iterable[Update], advance: Advance = fedavg) -> FactorState:
        change = torch.stack([update.change for update in updates]).median(0).values
        return state.next(vector=advance("vector", state.vector, self.share * change))


def main(out: str | None = None) -> rayfed.RunResult:
    """Runs it; ``out`` is the run directory."""
    return rayfed.run(SETTINGS, out, method=FedMedian(share=0.9))


if __name__ == "__main__":
    print(main().history[["train/loss", "bytes/total"]])
