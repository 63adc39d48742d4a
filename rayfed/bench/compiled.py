"""Whether `torch.compile` would pay: the part of a frozen base's block that it could take, compiled against eager.

Packs are rows of real tokens whose number changes from step to step, with attention and adapters by segments. What is
left for a compiler are the feed-forward layers: two products, GELU, a residual and a norm on (tokens, D), forward and
back through the frozen weights. They are compiled once, for any number of tokens (``dynamic=True``). Learners run
eagerly; this is the measurement behind that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rayfed.bench.timing import Row, one_thread, paired
from rayfed.errors import UserError

WARM_UP = (200, 333, 500)  # tokens; a second shape makes the compiler give up on fixed ones


class FeedForward(nn.Module):
    """A BERT block's feed-forward part, frozen: x (tokens, D) to (tokens, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.LayerNorm(width)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.norm(x + self.down(nn.functional.gelu(self.up(x))))
        return changed


@one_thread
def measure(
    tokens: Sequence[int] = (120, 500, 2000), width: int = 384, device: str = "cpu", pairs: int = 15
) -> list[Row]:
    """One row for each number of tokens, forward and backward. On a GPU: device=cuda width=768."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: got 'cuda', but torch finds no GPU here; allowed is cpu")
    torch.manual_seed(0)
    eager = FeedForward(width).to(device)
    compiled = torch.compile(eager, dynamic=True)
    begun = time.perf_counter()
    try:
        for count in WARM_UP:
            _step(compiled, count, width, device)()
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"bench compiled: torch.compile does not work here ({reason})") from None
    seconds = time.perf_counter() - begun
    return [
        paired(
            f"{count} tokens, {width} wide",
            ("compiled", _step(compiled, count, width, device)),
            ("eager", _step(eager, count, width, device)),
            pairs,
            {"seconds to compile": seconds},
        )
        for count in tokens
    ]


def _step(block: Callable[[Tensor], Tensor], tokens: int, width: int, device: str) -> Callable[[], None]:
    x = torch.randn(tokens, width, device=device)

    def run() -> None:
        leaf = x.clone().requires_grad_(True)
        block(leaf).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return run
