"""RAC-LoRA (Malinovsky et al., arXiv 2410.08305): blocks, each with a fresh random sketch; one factor trains from 0.

    block begins    A drawn from the run's seed, layer and round;  B = 0
    each round      B <- B + sum_k p_k (s_k / s) [dB_k | 0]         FFA-LoRA's round: exact, ranks nested in A's rows
    block ends      W <- W + s B A                                  merged into the base; the next block begins

With ``train=A`` it is the paper's other option: B is drawn, and A trains from 0. p_k is uniform. A single block moves
W within the rows of one A; the chain of blocks can reach every W. For a loss with gradient G at W, one step of plain
SGD at the rate lr is, with a sketch of orthonormal rows,

    W - lr s^2 G A^T A   (train=B),     W - lr s^2 B B^T G   (train=A)       the paper's projection of the gradient

Up: r_k out entries a layer (``train=A``: r_k in). Down: only the head when a block begins, for the sketch comes from
the seed and the other factor is 0. Later in a block that factor's first r_k ranks travel too. When a block ends, every
client must merge the product: r_max out entries a layer (r_max in). A new sketch gives the entries a new meaning, so no
server optimizer with momentum may act on them.

Source: secondary; deviates: the authors' code has no federated part. A block of several rounds, which averages the
factor again over one sketch before the merge, is our reading. The paper draws Gaussians.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import add
from rayfed.methods import Advance, LayerState, Profile, Start, Updates, fedavg
from rayfed.methods._base_updates import flat, fresh_A, initial_factors
from rayfed.methods._layers import zero_base
from rayfed.methods.ffa_lora import FFALoRA


@dataclass(frozen=True)
class RACLoRA(FFALoRA):
    """Train one factor with the other one random, merge, draw again."""

    block_rounds: PositiveInt = 1
    """Rounds with one sketch. From the second round on, what trains is averaged and sent again. The default is ours."""
    train: Literal["B", "A"] = "B"
    """The factor that trains. With `A` the upload has r in entries a layer, which is less where out > in."""
    sketch: Literal["uniform", "orthonormal"] = "uniform"
    """The random factor. `uniform`: drawn as LoRA's A; `orthonormal`: its r rows (or columns) are made orthonormal,
    which makes it larger. Then a step of SGD is the paper's, a projection of the gradient. The default is ours.
    """

    paper = "arXiv 2410.08305"
    summary = "a fresh frozen A each block; average B, merge, redraw"
    refuses_privacy = "with missing=zero it needs the ranks of clients, with train=A their scales"
    traffic_down = "r out"
    weights = "uniform"
    optimizers = ("fedavg", "sgd")
    mixing = None  # A is drawn anew, and B merged into the base
    refuses_adapter = ""
    fixed_gauge = False

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        """A given adapter is merged into the base, and the first block's sketch is drawn."""
        state, merged = super().init(adapter, seed), initial_factors(adapter)
        if not merged and (self.train, self.sketch) == ("B", "uniform"):  # the adapter's A is such a sketch
            return replace(state, base=zero_base(adapter), notes={"seed": seed})
        base = {name: pair.dense() for name, pair in merged.items()} or zero_base(adapter)
        extras = {"news": flat(merged)} if merged else {}
        layers = {name: self._opened(seed, name, 0, pair) for name, pair in adapter.layers.items()}
        return replace(state, layers=layers, base=base, extras=extras, notes={"seed": seed})

    @property
    def factor(self) -> Literal["B", "A"]:
        return self.train

    @property
    def summed(self) -> Literal["changes"] | None:  # type: ignore[override]
        """A sum of changes of several ranks has the clients' scales in B."""
        return super().summed if self.train == "B" else None

    def broadcast(self, state: LayerState, client: Profile) -> Start:
        start = super().broadcast(state, client)
        if state.rounds % self.block_rounds == 0:
            start = replace(start, known=start.layout.mask("A", "B"))
        return replace(start, base=state.base)

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        state = replace(super().aggregate(state, updates, advance), extras={})
        return state if state.rounds % self.block_rounds else self._merged(state)

    def _merged(self, state: LayerState) -> LayerState:
        layers, base, merged = {}, {}, [torch.zeros(0)]
        for name, pair in sorted(state.pairs.items()):
            sent = LowRank(pair.scale * pair.B, pair.A, 1.0)
            if self.train == "A":
                sent = LowRank(pair.B, pair.scale * pair.A, 1.0)
            merged.append(getattr(sent, self.train).reshape(-1))
            base[name] = add(state.base[name], sent)
            layers[name] = self._opened(state.notes["seed"], name, state.rounds, pair)
        return replace(state, layers=layers, base=base, extras={"news": torch.cat(merged)})

    def _opened(self, seed: int, layer: str, t: int, pair: LowRank) -> LowRank:
        """The layer's pair of the block that begins with round ``t``: a sketch, and zeros."""
        if self.train == "B":
            A = self._sketch(seed, layer, t, pair.rank, pair.A.shape[1])
            return LowRank(torch.zeros_like(pair.B), A, pair.scale)
        B = self._sketch(seed, f"B.{layer}", t, pair.rank, pair.B.shape[0]).T.contiguous()
        return LowRank(B, torch.zeros_like(pair.A), pair.scale)

    def _sketch(self, seed: int, name: str, t: int, rank: int, width: int) -> Tensor:
        """(rank, width): the first rows of a sketch of a larger rank are the sketch of a smaller one."""
        drawn = fresh_A(seed, name, t, rank, width)
        if self.sketch == "uniform":
            return drawn
        Q, R = torch.linalg.qr(drawn.double().T)
        return (Q * torch.sign(torch.diagonal(R))).T.float().contiguous()  # the signs of a QR are arbitrary
