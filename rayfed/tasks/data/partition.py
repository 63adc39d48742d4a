"""Divides the training rows among the clients.

Except for `natural`, rows are shuffled first: within a class, within a domain, or over all rows where neither counts.
So rows that are neighbours in a file do not go to one client.

flwr-datasets has such partitioners, too, but takes seconds to import (it imports plotting) and about as long again to
select the rows of 350 clients. Its IidPartitioner does not shuffle. Its PathologicalPartitioner may leave classes out,
or fail if a class has fewer rows than clients. `dirichlet` divides a class as its DirichletPartitioner without
self-balancing does, except that the clients are shuffled, too.
"""

from __future__ import annotations

import numpy as np

from rayfed import seeding
from rayfed.config.task import Partition
from rayfed.errors import UserError, allowed


def partition(labels: np.ndarray, owners: np.ndarray | None, settings: Partition, seed: int) -> list[np.ndarray]:
    """The rows of each client: int64 indices into ``labels``, ascending. Every row goes to exactly one client.

    ``labels`` (n,) int; ``owners`` (n,) str, for `natural` and `domain`. Draws are keyed by ``seed`` (purpose
    "partition").

    - `iid`: the sizes of two clients differ by at most one row.
    - `quantity`: sizes in proportion to draws from a log-normal distribution of ``sigma``.
    - `dirichlet`: each class is divided among the clients by shares from Dirichlet(alpha) (Yurochkin et al. 2019,
      arXiv 1905.12022, without the balancing).
    - `flasc`: each client draws class shares from Dirichlet(alpha). Every class is divided in proportion to the shares
      that the clients drew for it (FLASC, arXiv 2406.05233). FLASC's code rounds the part of every client by itself,
      so rows can be left over or run out. Here the cumulative parts are rounded: every row is used once, and a client
      whose part is a fraction of a row may get one row.
    - `pathological`: ``classes`` classes per client, taken in turn from shuffled lists of all classes. So the classes
      have equally many clients, give or take one or two. The clients of a class get equal parts of its rows; if there
      are fewer rows than clients, some get none.
    - `shards`: the rows in the order of their labels, in random order within a label, are cut into ``shards`` times
      ``clients`` pieces of equal size, give or take a row. A client gets ``shards`` of them at random (McMahan et al.
      2017, arXiv 1602.05629).
    - `domain`: an owner is a domain. A client has rows of one domain, and the clients of a domain share them evenly. A
      domain has clients in proportion to its rows, and at least one. Clients are in the order of the domains' names.
    - `natural`: one client per owner, in the order of the owners' names.

    With ``mix`` above 0, each client then gives its last round(mix * size) rows, and gets as many back from the pool of
    all of these (FLASC's code for Reddit).

    Clients may be empty, except with `natural` and `domain`. Raises UserError if there are fewer rows than clients, if
    there are no owners, if there are more domains than clients, if ``classes`` exceeds the number of classes, or if it
    is too small for every class to have a client.
    """
    parts = _gather(*_clients(labels, owners, settings, seed))
    return _mixed(parts, settings.mix, seed) if settings.mix else parts


def _clients(labels: np.ndarray, owners: np.ndarray | None, settings: Partition, seed: int) -> tuple[np.ndarray, int]:
    """The client of each row (n,), and the number of clients."""
    if owners is None:
        if settings.column:
            needed = f"partition.kind={settings.kind} needs the column that names the {settings.column}"
            raise UserError(f"data.client: got null, but {needed}")
    elif settings.kind == "natural":
        _, client = np.unique(owners, return_inverse=True)
        return client, int(client.max(initial=-1)) + 1
    clients = settings.clients
    if clients > len(labels):
        raise allowed("partition.clients", clients, f"there are only {len(labels)} training rows to share")
    rng = seeding.numpy_rng(seed, "partition", settings.kind)
    rows = np.arange(len(labels))
    if settings.kind == "iid":
        return rng.permutation(rows % clients), clients
    if settings.kind == "quantity":
        logs = settings.sigma * rng.standard_normal(clients)
        sizes = _sizes(len(labels), np.exp(logs - np.logaddexp.reduce(logs)))
        return rng.permutation(np.repeat(np.arange(clients), sizes)), clients
    if settings.kind == "shards":
        pieces = clients * settings.shards
        holders = rng.permutation(np.arange(pieces) % clients)
        order = np.lexsort((rng.random(len(labels)), labels))
        client = np.empty(len(labels), dtype=np.int64)
        client[order] = holders[rows * pieces // len(labels)]
        return client, clients
    if owners is not None and settings.kind == "domain":
        return _by_domain(owners, clients, rng), clients
    present, classes = np.unique(labels, return_inverse=True)
    if settings.kind == "pathological":
        shares = _pathological_shares(clients, len(present), settings.classes, rng)
    else:
        logs = _log_gamma(settings.alpha, (clients, len(present)), rng)
        if settings.kind == "flasc":
            logs -= np.logaddexp.reduce(logs, axis=1, keepdims=True)  # each client's shares of the classes sum to 1
        shares = np.exp(logs - np.logaddexp.reduce(logs, axis=0))
    return _divide(classes, shares, rng), clients


def client_names(owners: np.ndarray | None, settings: Partition) -> np.ndarray | None:
    """(clients,) str: the owner that each client of `natural` is; None for the other partitions."""
    return np.unique(owners) if owners is not None and settings.kind == "natural" else None


def _by_domain(domains: np.ndarray, clients: int, rng: np.random.Generator) -> np.ndarray:
    """The client of each row (n,), given the domain of each row."""
    names, of_row, rows = np.unique(domains, return_inverse=True, return_counts=True)
    if len(names) > clients:
        raise allowed("partition.clients", clients, f"each of the {len(names)} domains needs a client")
    counts = np.ones(len(names), dtype=np.int64)
    for _ in range(clients - len(names)):
        counts[np.argmax(rows / counts)] += 1  # a client more for the domain that has the most rows per client
    first = np.cumsum(counts) - counts
    client = np.empty(len(domains), dtype=np.int64)
    for domain in range(len(names)):
        mine = rng.permutation(np.flatnonzero(of_row == domain))
        client[mine] = first[domain] + np.arange(len(mine)) % counts[domain]
    return client


def _mixed(parts: list[np.ndarray], share: float, seed: int) -> list[np.ndarray]:
    """The clients' rows after each has exchanged its last ones, round(share * size) of them, through a common pool."""
    keep = [len(part) - round(share * len(part)) for part in parts]
    pool = np.concatenate([part[n:] for part, n in zip(parts, keep)])
    pool = seeding.numpy_rng(seed, "partition", "mix").permutation(pool)
    cuts = np.cumsum([len(part) - n for part, n in zip(parts, keep)])[:-1]
    return [np.sort(np.concatenate([part[:n], new])) for part, n, new in zip(parts, keep, np.split(pool, cuts))]


def _log_gamma(alpha: float, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Logarithms of Gamma(alpha) draws; normalised Gamma draws are Dirichlet draws.

    With a small alpha the draws themselves underflow to 0, and a class that is 0 for every client cannot be normalised.
    Gamma(a) has the distribution of Gamma(a + 1) * U^(1/a), with U uniform in (0, 1].
    """
    uniform = 1.0 - rng.random(shape)  # in (0, 1]
    return np.log(rng.gamma(alpha + 1.0, size=shape)) + np.log(uniform) / alpha


def _pathological_shares(clients: int, classes: int, per_client: int, rng: np.random.Generator) -> np.ndarray:
    """(clients, classes) shares: ``per_client`` classes per client, and equal shares for all clients of a class."""
    if per_client > classes:
        raise allowed("partition.classes", per_client, f"the training rows have only {classes} classes")
    if clients * per_client < classes:
        what = f"{clients} clients need at least {-(-classes // clients)} each to cover all {classes} classes"
        raise allowed("partition.classes", per_client, what)
    chosen = np.zeros((clients, classes))
    queue: list[int] = []
    for client in chosen:
        for _ in range(per_client):
            if all(client[c] for c in queue):
                queue += rng.permutation(classes).tolist()
            c = next(c for c in queue if not client[c])
            queue.remove(c)
            client[c] = 1.0
    return chosen / chosen.sum(axis=0)


def _divide(classes: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The client of each row (n,), given the class of each row (n,) and ``shares`` (clients, classes).

    The rows of a class are shuffled and divided by its column of ``shares``. The clients are shuffled for each class,
    too: in one order, the same clients would get the rows that rounding leaves over in every class.
    """
    owner = np.empty(len(classes), dtype=np.int64)
    for c in range(shares.shape[1]):
        rows = rng.permutation(np.flatnonzero(classes == c))
        order = rng.permutation(len(shares))
        owner[rows] = np.repeat(order, _sizes(len(rows), shares[order, c]))
    return owner


def _sizes(rows: int, shares: np.ndarray) -> np.ndarray:
    """The number of rows for each of ``shares`` (sum 1): the differences of floor(rows * cumulative share)."""
    # 1e-9 corrects rounding: three thirds of nine rows add up to 8.999... in floating point.
    cuts = np.minimum(np.floor(np.cumsum(shares) * rows + 1e-9).astype(np.int64), rows)
    cuts[-1] = rows
    return np.diff(cuts, prepend=0)


def _gather(client: np.ndarray, clients: int) -> list[np.ndarray]:
    """The rows of each client, ascending, given the client of each row."""
    order = np.argsort(client, kind="stable").astype(np.int64)
    return np.split(order, np.cumsum(np.bincount(client, minlength=clients))[:-1]) if clients else []
