"""The gradients of a private local step: each row's is clipped, their sum gets noise. See `rayfed.privacy.example`.

Two backward passes through one forward pass: the first gives the norm of each row's gradient, the second the sum of the
gradients with the rows' weights. No row's gradient is formed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rayfed.config.training import Client
from rayfed.device import to_device
from rayfed.lora.adapter import Layout
from rayfed.lora.packed.row_norms import RowNorms
from rayfed.lora.packed.stack import Stack
from rayfed.privacy.example import ExampleLevel, expected_batch
from rayfed.privacy.noise import gaussian


def clipped_backward(norms: RowNorms, losses: Tensor, batch_sizes: Tensor, clip_norm: float) -> Tensor:
    """Adds ``sum_i g_i min(1, C / ||g_i||) / b_i`` to the gradients of the stack, slot by slot.

    ``losses`` (N,) are the rows' losses, ``batch_sizes`` (N,) their clients' expected batches. Returns the norms (N,).
    """
    losses.sum().backward(retain_graph=True)
    sizes = norms.close().clamp(min=0).sqrt()
    for parameter in norms.stack.parameters.values():
        parameter.grad = None
    weights = (clip_norm / sizes).clamp(max=1.0) / batch_sizes  # a gradient of 0 has weight 1 / b
    (losses * weights).sum().backward()
    return sizes


@torch.no_grad()
def add_noise(
    privacy: ExampleLevel, settings: Client, stack: Stack, clients: Mapping[int, tuple[int, Layout, int]],
    t: int, step: int,
) -> None:  # fmt: skip
    """Adds ``z C N(0, I) / b_k`` to the gradients of the slots. ``clients``: (id, layout, number of rows) by slot."""
    drawn = {slot: _noise(privacy, settings, *client, t, step) for slot, client in clients.items()}
    noise = {part: torch.zeros(values.shape) for part, values in stack.parameters.items() if values.requires_grad}
    for (name, part), stacked in stack.views(noise).items():
        for slot, parts in drawn.items():
            if (name, part) in stack.trained and (own := parts.get((name, part))) is not None:
                stack.crop(stacked[slot], part, own.shape).copy_(own)
    for part, values in noise.items():
        parameter, values = stack.parameters[part], to_device(values, stack.device)
        parameter.grad = values if parameter.grad is None else parameter.grad.add_(values)


def _noise(
    privacy: ExampleLevel, settings: Client, client: int, layout: Layout, rows: int, t: int, step: int
) -> dict[tuple[str, str], Tensor]:
    """A client's noise by tensor."""
    own = privacy.settings
    std = privacy.noise_multiplier * own.clip_norm / expected_batch(rows, settings)
    flat = gaussian(layout.size, std, own.noise, privacy.seed, "privacy.gradient", t, client, step).float()
    return {(e.name, e.part): flat[e.start : e.start + e.numel].view(e.shape) for e in layout.entries}
