"""Computation over the air (AirComp, as in OTA-FFL, arXiv 2501.03392): the clients' signals add up on a fading channel.

One antenna at either end, block fading h_k ~ CN(0, 1) drawn for each client and round, noise CN(0, sigma^2), power P0.
Client k knows h_k (perfect channel state). g_k (d,) is its change, mean_k and v_k the mean and the standard deviation
of its entries, p_k its weight; the weights sum to 1:

    eta      = min_k  P0 |h_k|^2 / (p_k v_k)^2                 the bottleneck sends with the mean power P0, others less
    b_k      = p_k sqrt(eta) v_k conj(h_k) / |h_k|^2
    sent     x_k = b_k (g_k - mean_k) / v_k                    one entry per (complex) channel use: d uses for all
    received y = sum_k h_k x_k + noise
    estimate G = Re(y) / sqrt(eta) + sum_k p_k mean_k          sum_k p_k g_k, and noise of variance sigma^2 / (2 eta)

Only the real part of the noise reaches the estimate. mean_k and v_k go up as digital messages, p_k and eta down; both
ends compute with the float32 numbers that arrived. A client without p_k v_k sends no signal.

Source: secondary; deviates: the closed form is that of Liu, Yuan, Zhang (arXiv 2011.10282, Eq. 11 and 17), without
their floor on v_k; that OTA-FFL uses it is a guess. `truncation` is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed.channels.base import Channel
from rayfed.seeding import numpy_rng

LARGEST = 1e38  # eta travels in float32; a smaller one than the equation's only saves power


@dataclass(frozen=True)
class OverTheAir(Channel):
    """Downloads arrive as they were sent. ``noise`` is sigma^2, ``power`` P0, ``truncation`` the least |h|^2."""

    power: float
    noise: float
    truncation: float
    seed: int

    analog = True

    def deliver(self, payload: bytes) -> bytes:
        return payload

    def fading(self, t: int, client: int) -> complex:
        """h_k of a client in round ``t`` (from 0)."""
        real, imaginary = numpy_rng(self.seed, "channel.fading", t, client).standard_normal(2) / math.sqrt(2)
        return complex(real, imaginary)

    def scaling(self, fading: Tensor, weights: Tensor, stds: Tensor) -> float | None:
        """eta, from h_k (K,) complex128, p_k (K,) and v_k (K,) float64; None where no client has a signal."""
        sends = weights * stds > 0
        gains = (fading[sends].abs() / (weights[sends] * stds[sends])) ** 2
        return min(float(self.power * gains.min()), LARGEST) if len(gains) else None

    def signal(self, change: Tensor, fading: complex, weight: float, mean: float, std: float, eta: float) -> Tensor:
        """x_k (d,) complex128 of a ``change`` (d,) float64; zeros where the client has no signal."""
        if not weight * std:
            return torch.zeros(len(change), dtype=torch.complex128)
        b = weight * math.sqrt(eta) * std * fading.conjugate() / abs(fading) ** 2
        return b * (change - mean) / std

    def received(self, signals: Tensor, t: int) -> Tensor:
        """Re(y) (d,) float64: the real part of ``signals`` sum_k h_k x_k (d,), and noise of variance sigma^2 / 2."""
        noise = numpy_rng(self.seed, "channel.noise", t).standard_normal(len(signals))
        return signals.real + math.sqrt(self.noise / 2) * torch.from_numpy(noise)
