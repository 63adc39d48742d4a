"""Your own task, a regression, with its rows, model, loss and metric: python examples/own_task.py"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import rayfed
from rayfed.tasks import Federation, FrozenBase, NumberRows

SETTINGS = {
    "lora": {"rank": 4, "target_modules": ["hidden"]},
    "method": {"name": "fedit"},
    "client": {"optimizer": "adamw", "lr": 0.003, "epochs": 4},
    "server": {"rounds": 15, "cohort": 4},
    "engine": {"kind": "local"},
    "tracking": {"console": "off", "wandb": "off"},
}


class Net(nn.Module):
    """The base model, whose layer `hidden` gets adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.head = nn.Linear(1, 64), nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(torch.tanh(3 * self.first(features)))))


@dataclass(frozen=True)
class SineRegression(rayfed.Task):
    """Each client has 32 points of a sine wave."""

    clients: int = 8
    metric = "near"  # chooses the best round: from 0 to 1, more is better

    def load_data(self) -> Federation:
        x = np.random.default_rng(0).uniform(-1, 1, (64 + 32 * self.clients, 1)).astype(np.float32)
        y = np.sin(3 * x)
        train, test = NumberRows(x[64:], y[64:]), NumberRows(x[:64], y[:64])
        starts = 32 * np.arange(self.clients + 1)  # client c has the training rows rows[starts[c]:starts[c + 1]]
        return Federation(train, test, test, classes=("y",), rows=np.arange(len(train)), starts=starts)

    def load_base(self, federation: Federation) -> FrozenBase:
        torch.manual_seed(0)  # every process makes the same weights
        return FrozenBase(Net(), head=("head",))

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (outputs - labels).square().sum(1), torch.ones(len(labels))  # each row's sum, and its number of terms

    def metrics(self, predictions: Tensor, labels: Tensor, federation: Federation) -> dict[str, float]:
        return {"near": float(((predictions - labels).abs() < 0.1).float().mean())}


if __name__ == "__main__":
    print(rayfed.run(SETTINGS, task=SineRegression()).history[["train/loss", "eval/loss", "test/near"]])
