"""What lies below the lowest adapter never changes, so its states need to be computed only once for every text.

A `Prefix` names the first blocks of an encoder, those that no adapter touches. A `Skipper` computes what leaves them,
or lets through them what was computed before; what is above runs as always. So logits differ by no more than the
rounding that comes with the batch in which the states were computed.

Whether a model's blocks are such a chain, no configuration says. `find` tries it, and skips nothing where the logits
would change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayfed.lora.batch import Segment
from rayfed.tasks.flat import Flat, FlatModel, FlatTokens, made_up


@dataclass(frozen=True)
class Prefix:
    """The first ``count`` modules of the list named ``blocks``; ``width`` numbers leave them for every token."""

    blocks: str
    count: int
    width: int

    def __str__(self) -> str:
        return f"the first {self.count} blocks are frozen: {self.width} numbers a token"


@dataclass(frozen=True, eq=False)
class PrefixedTokens(FlatTokens):
    """Flat tokens whose states below the lowest adapter are known."""

    states: np.ndarray  # (all tokens, width) float32, in the order of the tokens

    def batch(self, rows: np.ndarray, pad_id: int) -> dict[str, Tensor]:
        """As `Tokens.flat`, with ``states`` (1, tokens, width)."""
        places = self.tokens.places(rows)
        return {**super().batch(rows, pad_id), "states": torch.from_numpy(self.states[places])[None]}


class Skipper:
    """A model that runs without padding and whose frozen blocks can be skipped. `release` makes it what it was."""

    def __init__(self, flat: FlatModel, prefix: Prefix) -> None:
        blocks: Any = flat.model.get_submodule(prefix.blocks)
        self.flat = flat
        self.known: Tensor | None = None
        self.looking = False
        self.skipped = [blocks[i] for i in range(prefix.count)]
        for i, block in enumerate(self.skipped):
            block.forward = self._skippable(block.forward, i == 0)
        self._hook = blocks[prefix.count].register_forward_pre_hook(self._look, with_kwargs=True)

    def __call__(self, inputs: dict[str, Tensor], segments: Sequence[Segment]) -> Tensor:
        """Logits as `FlatModel` gives them; where ``inputs`` has ``states`` (1, tokens, width), from these."""
        self.known = inputs.get("states")
        try:
            return self.flat(inputs, segments)
        finally:
            self.known = None

    @torch.no_grad()
    def states_of(self, inputs: dict[str, Tensor], segments: Sequence[Segment]) -> Tensor:
        """(tokens, width): what leaves the frozen blocks. The model runs no further than that."""
        self.looking = True
        try:
            self.flat(inputs, segments)
        except _Seen as seen:
            return seen.states_1TW[0]
        finally:
            self.looking = False
        raise ValueError("the blocks were not run")

    def release(self) -> None:
        for block in self.skipped:
            del block.forward  # its class has its own
        self._hook.remove()

    def _skippable(self, forward: Any, first: bool) -> Any:
        def run(hidden_states: Tensor, *args: Any, **named: Any) -> Any:
            if self.known is None:
                return forward(hidden_states, *args, **named)
            return self.known.to(hidden_states.dtype) if first else hidden_states

        return run

    def _look(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self.looking:
            raise _Seen(args[0] if args else named["hidden_states"])


class _Seen(Exception):
    """The states have been computed; the rest of the model need not run."""

    def __init__(self, states_1TW: Tensor) -> None:
        self.states_1TW = states_1TW


def find(model: nn.Module, adapted: Iterable[str], how: Flat) -> Prefix | None:
    """The frozen blocks below the ``adapted`` layers (full names) of a model that runs without padding, if any.

    A function of its arguments: with the states of a few made-up texts, the logits must be the same to the bit, and
    with others they must not. The model is left as it was.
    """
    layers = list(adapted)
    for name, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList):
            places = [_place(layer, name) for layer in layers]
            count = min((place for place in places if place is not None), default=0)
            if count and None not in places:
                return _tried(model, name, count, how)
    return None


def _place(layer: str, blocks: str) -> int | None:
    """Which of the blocks the layer lies in."""
    inside = layer.removeprefix(f"{blocks}.")
    return int(inside.split(".")[0]) if inside != layer else None


def _tried(model: nn.Module, name: str, count: int, how: Flat) -> Prefix | None:
    flat = FlatModel(model, how)
    skipper = Skipper(flat, Prefix(name, count, 0))
    tokens, segments = made_up(flat.config, 9)
    inputs = tokens.flat(np.arange(len(tokens)))
    try:
        with torch.no_grad():
            logits = skipper(inputs, segments)
            states = skipper.states_of(inputs, segments)
            same = skipper({**inputs, "states": states[None]}, segments)
            other = skipper({**inputs, "states": 1 - states[None]}, segments)
    except Exception:  # any model may come, and one whose blocks are no chain runs all of them
        return None
    finally:
        skipper.release()
        flat.release()
    return Prefix(name, count, states.shape[1]) if torch.equal(same, logits) and not same.equal(other) else None
