"""User-level privacy with a trusted server (McMahan et al., arXiv 1710.06963): clip each update, add noise to the sum.

In a round, with c_k the update of client k as the server decoded it, C the clip norm, z the noise multiplier and K the
expected cohort (`server.cohort`):

    S   = sum_k c_k min(1, C / ||c_k||)                   one client changes S by at most C, or 2 C where it is replaced
    out = (S + z C N(0, I)) / K                           the denominator is fixed: a cohort's size is not released

``out`` is all that the method gets of the updates: one update. What follows from it is post-processing, the mask of the
next download included. The noise is on all entries that a client can send, whatever was sent: which entries were is not
released. c_k is the vector of which the method takes the mean (`Method.summed`): the change of adapter and head, where
smaller ranks are padded with zeros; or the changes of the layers' products, with the Frobenius norm, and of the head.

In FLASC the clipping follows the client's top-k. With `order: clip_first` the client clips its change before it; the
server's clipping then only takes back what the rounding of the wire adds.

With `noise_cohort` K_n the noise on the sum is z C K / K_n, so that the mean has the noise of a cohort of K_n clients.

With `quantile` g, the clip norm of the next round is C exp(-lr (b - g)) (Andrew et al., arXiv 1905.03871). b is the
share of clients with ||c_k|| <= C, from a sum of +-1/2 with noise of the standard deviation s (`quantile_noise`). The
updates then get the noise multiplier (z^-2 - (2 s)^-2)^(-1/2), so that both sums together cost what z alone does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rayfed.errors import allowed
from rayfed.lora.adapter import Adapter, Layout, LowRank
from rayfed.lora.algebra import norm
from rayfed.methods import Method, PackSum, ProductMean, Profile, Sparse, Start, Update, product_change
from rayfed.privacy.accounting import Sampling, Uses
from rayfed.privacy.base import Privacy
from rayfed.privacy.noise import gaussian

CLIP_NORM = "privacy.clip_norm"


@dataclass(frozen=True)
class UserLevel(Privacy):
    """Clipped updates, noise on their sum. ``server`` is the profile of a client of the server's own rank."""

    sampling: Sampling
    cohort: int
    population: int
    server: Profile

    def uses(self, rounds: int) -> Sequence[Uses]:
        own = self.settings
        return [Uses(rounds, self.sampling, own.noise_cohort or self.cohort, own.noise_population or self.population)]

    @property
    def deployment(self) -> float:
        """The clients for which the noise is made, as a multiple of the cohort."""
        return (self.settings.noise_cohort or self.cohort) / self.cohort

    @property
    def count_noise(self) -> float:
        """s: standard deviation of the noise on the number of clients below the clip norm, in the deployment."""
        return self.settings.quantile_noise or max(self.deployment * self.cohort / 20, self.noise_multiplier)

    @property
    def sum_noise(self) -> float:
        """The noise multiplier of the sum of updates: z, or more where the clip norm follows a quantile."""
        z = self.noise_multiplier
        return z if self.settings.quantile is None or not z else (z**-2 - (2 * self.count_noise) ** -2) ** -0.5

    def check(self) -> None:
        z = self.noise_multiplier
        if self.settings.quantile is not None and z >= 2 * self.count_noise:
            raise allowed(
                "privacy.quantile_noise", self.count_noise, f"with noise of {z:g} it has to be above {z / 2:g}"
            )

    def release(self, method: Method, state: Any, t: int, moments: MutableMapping[str, Tensor]) -> Release:
        return Release(self, method, state, t, moments)

    def client_change(self, change: Tensor, uploaded: Tensor, budget: int, t: int, client: int) -> Tensor:
        if self.settings.order == "sparsify_first":
            return change
        size = float(torch.linalg.vector_norm(change, dtype=torch.float64))
        return change if size <= self.settings.clip_norm else change * (self.settings.clip_norm / size)


class Release:
    """One round: clips the updates, adds them up, and releases their noised mean as one update."""

    def __init__(
        self, privacy: UserLevel, method: Method, state: Any, t: int, moments: MutableMapping[str, Tensor]
    ) -> None:
        self.privacy, self.t, self.moments = privacy, t, moments
        start, trainable = method.broadcast(state, privacy.server), method.trainable(state, privacy.server)
        uploaded = trainable.uploaded(start.layout, trainable.support(start.layout, None))
        products, self.personal = method.summed == "products", method.personal
        self.sum: _Changes | _Products = _Products(start) if products else _Changes(start, uploaded)
        self.entries = int(uploaded.sum())
        self.both_factors = not products and all(bool((uploaded & start.layout.mask(part)).any()) for part in "AB")
        stored = moments.get(CLIP_NORM)
        self.clip_norm = privacy.settings.clip_norm if stored is None else float(stored)
        self.clients = self.below = 0

    def clipped(self, update: Update) -> Update:
        """The update with the weight min(1, C / its norm), in place of its own."""
        size = self.sum.norm(update)
        self.clients += 1
        self.below += size <= self.clip_norm
        return replace(update, weight=1.0 if size <= self.clip_norm else self.clip_norm / size)

    def mean(self, updates: Iterable[Update | PackSum]) -> Iterator[Update]:
        """One update of weight 1: the noised mean. ``updates`` were `clipped`; there may be none.

        Where each client received something of its own, an update of weight 0 and without a change comes before it for
        each of them.
        """
        privacy, nothing = self.privacy, torch.zeros(0, dtype=torch.int64)
        for update in updates:
            self.sum.add(update)
            if self.personal and isinstance(update, Update):
                yield replace(update, weight=0.0, sparse_change=Sparse(update.layout.size, nothing, nothing.float()))
        std = privacy.sum_noise * self.clip_norm / privacy.deployment
        self.sum.add_noise(gaussian(self.sum.entries, std, privacy.settings.noise, privacy.seed, "privacy.sum", self.t))
        if privacy.settings.quantile is not None:
            self._follow_quantile(privacy.settings.quantile)
        yield self.sum.update(privacy.server, privacy.cohort)

    def figures(self) -> dict[str, float | None]:
        """The metrics of the round: the share of clients that were clipped; the clip norm, where it changes."""
        clipped = 1 - self.below / self.clients if self.clients else None
        own = {"privacy/clipped": clipped}
        return own if self.privacy.settings.quantile is None else own | {"privacy/clip_norm": self.clip_norm}

    def warning(self) -> str | None:
        """One line on where the noise does more harm than its norm says; None where there is nothing to say."""
        if self.both_factors:
            return (
                "privacy: A and B both get noise, so their product has the square of it; ffa_lora, rac_lora, rolora "
                "and fed_sb train one factor at a time"
            )
        if self.sum.entries > self.entries:
            return (
                f"privacy: the method sums products, so noise is on {self.sum.entries} entries, where the factors have "
                f"{self.entries}"
            )
        return None

    def _follow_quantile(self, quantile: float) -> None:
        privacy, own = self.privacy, self.privacy.settings
        std = privacy.count_noise / privacy.deployment if privacy.noise_multiplier else 0.0
        noise = float(gaussian(1, std, own.noise, privacy.seed, "privacy.count", self.t))
        share = (self.below - self.clients / 2 + noise) / privacy.cohort + 0.5
        following = self.clip_norm * math.exp(-own.quantile_lr * (share - quantile))
        self.moments[CLIP_NORM] = torch.tensor(min(max(following, 1e-30), 1e30), dtype=torch.float64)


class _Changes:
    """The sum of the changes of adapter and head, (n,) float64 in the layout of the server's own rank."""

    def __init__(self, start: Start, uploaded: Tensor) -> None:
        self.layout, self.start, self.uploaded = start.layout, start.vector, uploaded
        self.total = torch.zeros(self.layout.size, dtype=torch.float64)
        self.entries = int(uploaded.sum())

    def norm(self, update: Update) -> float:
        change = update.sparse_change
        if update.layout != self.layout:
            change = _padded(update, self.layout)
        values = change.values if isinstance(change, Sparse) else change
        return float(torch.linalg.vector_norm(values, dtype=torch.float64))

    def add(self, update: Update | PackSum) -> None:
        if isinstance(update, PackSum) or update.layout == self.layout:
            update.add_to(self.total)
        else:
            self.total += update.weight * _padded(update, self.layout)

    def add_noise(self, noise: Tensor) -> None:
        self.total[self.uploaded] += noise

    def update(self, client: Profile, count: int) -> Update:
        return Update(client, 1.0, self.start, (self.total / count).float(), self.layout)


class _Products:
    """The sums of the changes of the layers' products, (out, in) each, and of the head, added up as methods do it."""

    def __init__(self, start: Start) -> None:
        adapter = start.layout.unflatten(start.vector)
        self.shapes = {name: (pair.B.shape[0], pair.A.shape[1]) for name, pair in adapter.layers.items()}
        self.head = {name: tensor.shape for name, tensor in adapter.head.items()}
        self.mean = ProductMean()
        sizes = [math.prod(shape) for shape in (*self.shapes.values(), *self.head.values())]
        self.entries = sum(sizes)
        self.noise = torch.zeros(self.entries, dtype=torch.float64).split(sizes)

    def norm(self, update: Update) -> float:
        sizes = [norm(pair) for pair in product_change(update).values()]
        return math.hypot(*sizes, *(norm(tensor) for tensor in update.moved.head.values()))

    def add(self, update: Update | PackSum) -> None:
        assert isinstance(update, Update)
        self.mean.add(update.weight, update, product_change(update))

    def add_noise(self, noise: Tensor) -> None:
        for total, part in zip(self.noise, noise.split([len(own) for own in self.noise]), strict=True):
            total += part

    def update(self, client: Profile, count: int) -> Update:
        """Its adapter has B = 0 and the identity as A at the start, and the mean change of the product in B."""
        weight, noise = self.mean.weight, iter(self.noise)  # without clients there are no means

        def noised(mean: Tensor | None, shape: tuple[int, ...]) -> Tensor:
            total = next(noise).view(shape) if mean is None else mean.double() * weight + next(noise).view(shape)
            return (total / count).float()

        start, change = {}, {}
        for name, (out, inner) in self.shapes.items():
            start[name] = LowRank(torch.zeros(out, inner), torch.eye(inner), 1.0)
            B = noised(self.mean.matrix(name) if weight else None, (out, inner))
            change[name] = LowRank(B, torch.zeros(inner, inner), 1.0)
        means = self.mean.head() if weight else {}
        head = {name: noised(means.get(name), shape) for name, shape in self.head.items()}
        begun = Adapter(start, {name: torch.zeros_like(tensor) for name, tensor in head.items()})
        return Update(client, 1.0, begun.flatten(), Adapter(change, head).flatten(), begun.layout)


def _padded(update: Update, layout: Layout) -> Tensor:
    """The change of an adapter of smaller ranks, (n,) float64 in the ``layout`` of the largest rank and its scales."""
    total = torch.zeros(layout.size, dtype=torch.float64)
    places = layout.unflatten(total)  # views: what is written there is in the total
    for name, pair in update.moved.layers.items():
        places.layers[name].B[:, : pair.rank] = pair.scale / places.layers[name].scale * pair.B.double()
        places.layers[name].A[: pair.rank] = pair.A
    for name, tensor in update.moved.head.items():
        places.head[name].copy_(tensor)
    return total
