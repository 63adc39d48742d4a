"""Who holds which training rows.

All kinds but `natural` deal shuffled rows: within a class (within all rows for `iid`) it is chance which client gets
which row, so neighbours in a file do not gather with one client.

The partitioners are our own rather than flwr-datasets': that package takes seconds to import (it pulls in plotting)
and about as long again to hand out 350 clients through `Dataset.select`; its IidPartitioner cuts without shuffling,
its PathologicalPartitioner may leave classes out or fail for asking more holders of a class than it has rows. A class
is divided here as its DirichletPartitioner (without balancing) divides it, but for the order in which clients stand.
"""

from __future__ import annotations

import numpy as np

from rayfed import seeding
from rayfed.config.task import Partition
from rayfed.errors import UserError, allowed


def partition(labels: np.ndarray, owners: np.ndarray | None, settings: Partition, seed: int) -> list[np.ndarray]:
    """The rows of each client: int64 indices into ``labels``, ascending. Every row goes to exactly one client.

    ``labels`` (n,) int; ``owners`` (n,) str, for `natural` only. Draws are keyed by ``seed`` (purpose "partition").

    - `iid`: clients differ by at most one row in size.
    - `dirichlet`: each class is divided among the clients by shares from Dirichlet(alpha) (Yurochkin et al. 2019,
      arXiv 1905.12022, without its balancing).
    - `flasc`: each client draws class shares from Dirichlet(alpha), and every class is divided in proportion to what
      the clients drew for it (FLASC, arXiv 2406.05233). That code rounds each client's part on its own, which can
      leave rows over or run out of them; here the cumulative parts are cut, so each row is used once, and a client
      that is due a fraction of a row sometimes gets one.
    - `pathological`: `classes` classes per client. Classes are dealt from shuffled decks, so each has equally many
      holders give or take one or two, who share its rows equally (a class with fewer rows than holders leaves some
      without).
    - `natural`: one client per owner, in the order of their names.

    Clients may come out empty, except with `natural`. Raises UserError where there are fewer rows than clients, no
    owners, or `classes` is more than there are or too few to give each class a holder.
    """
    if settings.kind == "natural":
        if owners is None:
            raise UserError("data.client: got null, but partition.kind=natural needs the column that names the client")
        _, client = np.unique(owners, return_inverse=True)
        return _gather(client, int(client.max(initial=-1)) + 1)
    clients = settings.clients
    if clients > len(labels):
        raise allowed("partition.clients", clients, f"there are only {len(labels)} training rows to share")
    rng = seeding.numpy_rng(seed, "partition", settings.kind)
    if settings.kind == "iid":
        return _gather(rng.permutation(np.arange(len(labels)) % clients), clients)
    present, classes = np.unique(labels, return_inverse=True)
    if settings.kind == "pathological":
        shares = _dealt(clients, len(present), settings.classes, rng)
    else:
        logs = _log_gamma(settings.alpha, (clients, len(present)), rng)
        if settings.kind == "flasc":
            logs -= np.logaddexp.reduce(logs, axis=1, keepdims=True)  # each client's shares of the classes sum to 1
        shares = np.exp(logs - np.logaddexp.reduce(logs, axis=0))
    return _gather(_cut(classes, shares, rng), clients)


def describe(parts: list[np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Counts of ``clients`` and of the ``empty`` ones; over the others ``rows_min``, ``rows_median``, ``rows_max`` and
    ``classes_mean``, the mean number of different classes a client holds (all 0 if there are none)."""
    held = [part for part in parts if len(part)]
    sizes = [len(part) for part in held] or [0]
    return {
        "clients": len(parts),
        "empty": len(parts) - len(held),
        "rows_min": min(sizes),
        "rows_median": float(np.median(sizes)),
        "rows_max": max(sizes),
        "classes_mean": float(np.mean([len(np.unique(labels[part])) for part in held])) if held else 0.0,
    }


def _log_gamma(alpha: float, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Logarithms of Gamma(alpha) draws; normalised, they are Dirichlet draws.

    In logarithms, because with a small alpha the draws themselves underflow to 0 and a class that is 0 at every client
    cannot be normalised. Gamma(a) is Gamma(a + 1) * U^(1/a).
    """
    uniform = 1.0 - rng.random(shape)  # in (0, 1]
    return np.log(rng.gamma(alpha + 1.0, size=shape)) + np.log(uniform) / alpha


def _dealt(clients: int, classes: int, hand: int, rng: np.random.Generator) -> np.ndarray:
    """(clients, classes) shares: each client holds ``hand`` classes, and a class's holders share it equally."""
    if hand > classes:
        raise allowed("partition.classes", hand, f"the training rows have only {classes} classes")
    if clients * hand < classes:
        what = f"{clients} clients need at least {-(-classes // clients)} each for all {classes} classes to be held"
        raise allowed("partition.classes", hand, what)
    holds = np.zeros((clients, classes))
    deck: list[int] = []
    for client in holds:
        for _ in range(hand):
            if all(client[card] for card in deck):
                deck += rng.permutation(classes).tolist()
            card = next(card for card in deck if not client[card])
            deck.remove(card)
            client[card] = 1.0
    return holds / holds.sum(axis=0)


def _cut(classes: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The client of each row (n,): every class is shuffled and cut by its column of ``shares`` (clients, classes).

    Clients stand in another order for each class. In one order for all, it would be the same ones that get the odd row
    of class after class, and with even shares and few rows some would end up with everything and others with nothing.
    """
    owner = np.empty(len(classes), dtype=np.int64)
    for c in range(shares.shape[1]):
        rows = rng.permutation(np.flatnonzero(classes == c))
        order = rng.permutation(len(shares))
        owner[rows] = np.repeat(order, _sizes(len(rows), shares[order, c]))
    return owner


def _sizes(rows: int, shares: np.ndarray) -> np.ndarray:
    """``rows`` rows divided by ``shares`` (sum 1): the steps between the floors of the cumulative shares times rows."""
    # A hair more: three thirds of nine rows add up to 8.999... in floating point.
    cuts = np.minimum(np.floor(np.cumsum(shares) * rows + 1e-9).astype(np.int64), rows)
    cuts[-1] = rows
    return np.diff(cuts, prepend=0)


def _gather(client: np.ndarray, clients: int) -> list[np.ndarray]:
    """The rows of each client, ascending, from the client of each row."""
    order = np.argsort(client, kind="stable").astype(np.int64)
    return np.split(order, np.cumsum(np.bincount(client, minlength=clients))[:-1]) if clients else []
