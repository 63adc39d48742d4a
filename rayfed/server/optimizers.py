"""Server optimizers: how the mean of the clients' changes is applied to the global state.

With Delta the mean change (the negative of the pseudo-gradient), x the state, eta the learning rate, element-wise:

    fedavg    x <- x + Delta                                                   McMahan et al. 2017
    sgd       x <- x + eta Delta
    fedavgm   v <- beta v + Delta;  x <- x + eta v                             Hsu et al. 2019
    fedadam   m <- b1 m + (1 - b1) Delta;  v <- b2 v + (1 - b2) Delta^2
              x <- x + eta m / (sqrt(v) + tau),  v starts at tau^2             Reddi et al. 2021, Algorithm 2
    adamw     torch's AdamW on the gradient -Delta: bias correction, decoupled weight decay, as FLASC's code has it

adamw's weight decay acts on every entry, also on entries that no client sent this round.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rayfed.config.training import Schedule, Server
from rayfed.errors import UserError

RATES = {"fedavg": 1.0, "sgd": 1.0, "fedavgm": 1.0, "fedadam": 1e-3, "adamw": 1e-3}


class ServerOptimizer:
    """Updates named tensors and stores their moments. ``lr`` may be set before each round.

    ``kind``: fedavg, sgd, fedavgm, fedadam or adamw. UserError where a setting does not belong to it.
    """

    def __init__(self, kind: str, settings: Server) -> None:
        if kind == "fedavg" and settings.lr is not None:
            raise UserError(f"server.lr: got {settings.lr}, but fedavg has no rate; server.optimizer=sgd has")
        if kind != "adamw" and settings.weight_decay is not None:
            raise UserError(f"server.weight_decay: got {settings.weight_decay}, but only adamw has it, not {kind}")
        self.kind = kind
        self.base_lr = self.lr = settings.lr if settings.lr is not None else RATES[kind]
        self.momentum = settings.momentum
        self.betas = settings.betas or ((0.9, 0.99) if kind == "fedadam" else (0.9, 0.999))
        self.eps = settings.eps if settings.eps is not None else (1e-3 if kind == "fedadam" else 1e-8)
        self.weight_decay = 0.01 if settings.weight_decay is None else settings.weight_decay
        self.state: dict[str, Tensor] = {}  # the moments

    def advance(self, name: str, value: Tensor, change: Tensor) -> Tensor:
        """The tensor's next value from its mean change; shapes equal. The moments of ``name`` become new tensors."""
        if value.shape != change.shape:
            raise ValueError(f"{name}: value {tuple(value.shape)} and change {tuple(change.shape)} differ in shape")
        if self.kind == "fedavg":
            return value + change
        if self.kind == "sgd":
            return value + self.lr * change
        if self.kind == "fedavgm":
            v = self._moment(name, "velocity", value, 0.0) * self.momentum + change
            self.state[f"{name}.velocity"] = v
            return value + self.lr * v
        if self.kind == "fedadam":
            m = (self._moment(name, "m", value, 0.0) * self.betas[0]).add_(change, alpha=1 - self.betas[0])
            v = self._moment(name, "v", value, self.eps**2) * self.betas[1]
            v.addcmul_(change, change, value=1 - self.betas[1])
            self.state |= {f"{name}.m": m, f"{name}.v": v}
            return value + self.lr * m / (v.sqrt() + self.eps)
        return self._adamw(name, value, change)

    def _moment(self, name: str, kind: str, like: Tensor, start: float) -> Tensor:
        return self.state.get(f"{name}.{kind}", torch.full_like(like, start))

    def _adamw(self, name: str, value: Tensor, change: Tensor) -> Tensor:
        parameter = nn.Parameter(value.clone())
        optimizer = torch.optim.AdamW(
            [parameter], lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, foreach=False
        )
        keys = ("step", "exp_avg", "exp_avg_sq")
        if f"{name}.step" in self.state:
            optimizer.state[parameter] = {key: self.state[f"{name}.{key}"].clone() for key in keys}
        parameter.grad = -change
        optimizer.step()
        self.state |= {f"{name}.{key}": optimizer.state[parameter][key] for key in keys}
        return parameter.detach()


def scheduled(lr: float, schedule: Schedule, t: int, rounds: int) -> float:
    """The learning rate of round ``t`` (from 0) of ``rounds``: linear warm-up, then the schedule's shape."""
    if t < schedule.warmup:
        return lr * (t + 1) / schedule.warmup
    span = max(rounds - 1 - schedule.warmup, 1)
    progress = min((t - schedule.warmup) / span, 1.0)
    final = schedule.final
    factor = {
        "constant": 1.0,
        "linear": 1 - (1 - final) * progress,
        "cosine": final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2,
        "exponential": final**progress,
    }[schedule.kind]
    return lr * factor
