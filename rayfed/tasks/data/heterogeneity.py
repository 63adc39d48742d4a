"""How much clients differ: figures of a partition, over the clients that have rows.

With n_k rows and the label shares p_k(y) of client k, and the label shares p(y) of all training rows:

    rows                n_k
    classes             the number of classes of which client k has a row
    total_variation     1/2 sum_y |p_k(y) - p(y)|, from 0 (the population's labels) to below 1
    jensen_shannon      sqrt(1/2 KL(p_k || m) + 1/2 KL(p || m)) with m = (p_k + p) / 2 and log2, from 0 to below 1
    effective_clients   (sum_k n_k)^2 / sum_k n_k^2, from 1 (one client has nearly all rows) to the number of clients

A client with few rows is far from the population even if its rows are drawn at random. So every figure of the labels is
also computed with the labels shuffled over all rows: clients of these sizes whose rows are independent and identically
distributed (IID). What exceeds that is label skew. The figures take time for the rows, not for clients times classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayfed import seeding
from rayfed.files import write_json
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.known_answer.problem import Problem, optimum_distances

FILE = "partition.json"
LABEL_FIGURES = ("classes", "total_variation", "jensen_shannon")


@dataclass(frozen=True)
class Spread:
    """One figure over the clients with rows. ``iid``: the mean if the labels were shuffled; None without labels."""

    min: float
    p10: float
    median: float
    mean: float
    p90: float
    max: float
    iid: float | None = None


@dataclass(frozen=True)
class HeatMap:
    """Rows by client and class: a sample of clients, most rows first; neighbouring classes may share a column."""

    clients: list[str]
    rows: list[int]  # (clients,): all rows of each client
    classes: list[str]  # (columns,): the first class of each column
    columns_of: int  # classes a column; the last column may have fewer
    counts: list[list[int]]  # (clients, columns)


def describe(federation: Federation, clients: int = 48, columns: int = 48) -> dict[str, Any]:
    """The figures of the federation's training rows as JSON values, of bounded size for any population.

    - `clients`, `clients_with_rows`, `rows`, `classes` (None where labels are not classes): counts
    - `largest_share`: the share of all rows that the largest client has, 0 to 1; `effective_clients`: see above
    - `figures`: name -> `Spread`: `rows`; where labels are classes also `LABEL_FIGURES`; for the problem with a known
      answer `optimum_distance`, of a client's optimum from the common one, relative to the norm of that
    - `rows_by_rank`: the rows of at most 101 clients with rows, from most to fewest, evenly spaced by rank
    - `experiences`: of a sequence, one mapping an experience: `classes` (their names), its `domains`, `rows` and
      `clients_with_rows`; without a sequence the key is not there
    - `heat_map`: `HeatMap` of at most ``clients`` clients and ``columns`` columns; None without classes
    """
    sizes = federation.sizes[federation.holders].astype(np.float64)
    figures = {"rows": _spread(sizes)}
    classes = _class_count(federation)
    if classes:
        labels = federation.train.labels[federation.rows]
        shuffled = seeding.numpy_rng(0, "heterogeneity").permutation(labels)
        found, iid = (_label_figures(federation, own, classes) for own in (labels, shuffled))
        figures |= {name: _spread(found[name], float(iid[name].mean())) for name in LABEL_FIGURES}
    if isinstance(federation.extra, Problem):
        figures["optimum_distance"] = _spread(optimum_distances(federation.extra))
    return {
        "clients": federation.clients,
        "clients_with_rows": len(sizes),
        "rows": int(sizes.sum()),
        "classes": classes,
        "largest_share": float(sizes.max() / sizes.sum()),
        "effective_clients": float(sizes.sum() ** 2 / np.square(sizes).sum()),
        "figures": {name: asdict(spread) for name, spread in figures.items()},
        "rows_by_rank": federation.sizes[_by_rows(federation, 101)].tolist(),
        **({"experiences": _experiences(federation)} if federation.experiences else {}),
        "heat_map": asdict(_heat_map(federation, classes, clients, columns)) if classes else None,
    }


def write_partition(out: Path, federation: Federation) -> None:
    """Writes `describe` as `partition.json` into the directory of a run, unless it is there: data do not change."""
    if not (out / FILE).is_file():
        write_json(out / FILE, describe(federation))


def _experiences(federation: Federation) -> list[dict[str, Any]]:
    found = federation.experiences
    assert found is not None
    return [
        {
            "classes": [federation.classes[c] for c in found.classes[j]],
            **({"domains": list(found.domains[j])} if found.domains else {}),
            "rows": len(own.rows),
            "clients_with_rows": len(own.holders),
        }
        for j, own in enumerate(federation.by_experience)
    ]


def _class_count(federation: Federation) -> int | None:
    """The number of classes; None where a row's label is not one class."""
    labels, classes = federation.train.labels, len(federation.classes)
    numbers = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    return classes if numbers and labels.min() >= 0 and labels.max() < classes else None


def _label_figures(federation: Federation, labels: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """The figures of each client with rows, (clients with rows,), by name. ``labels`` (n,): client after client."""
    sizes = federation.sizes[federation.holders]
    client = np.repeat(np.arange(len(sizes)), sizes)
    pairs, counts = np.unique(client * classes + labels, return_counts=True)
    client, label = np.divmod(pairs, classes)
    own = counts / sizes[client]
    population = (np.bincount(labels, minlength=classes) / len(labels))[label]
    middle = (own + population) / 2

    def summed(terms: np.ndarray) -> np.ndarray:
        """The sum of a term over the classes that a client has."""
        return np.bincount(client, terms, len(sizes))

    # A class that the client lacks adds nothing to the positive parts of p_k - p, and p(y) to KL(p || m).
    missing = 1 - summed(population)
    divergence = summed(own * np.log2(own / middle) + population * np.log2(population / middle)) + missing
    values = (
        np.bincount(client, minlength=len(sizes)).astype(np.float64),
        summed(np.maximum(own - population, 0)),
        np.sqrt(np.maximum(divergence / 2, 0)),  # rounding may give -1e-17
    )
    return dict(zip(LABEL_FIGURES, values, strict=True))


def _spread(values: np.ndarray, iid: float | None = None) -> Spread:
    low, middle, high = np.percentile(values, (10, 50, 90)).tolist()
    return Spread(float(values.min()), low, middle, float(values.mean()), high, float(values.max()), iid)


def _by_rows(federation: Federation, most: int) -> np.ndarray:
    """At most ``most`` clients with rows, from most to fewest rows, evenly spaced in that order, the ends included."""
    order = federation.holders[np.argsort(-federation.sizes[federation.holders], kind="stable")]
    if len(order) <= most:
        return order
    return order[np.round(np.linspace(0, len(order) - 1, most)).astype(np.int64)]


def _heat_map(federation: Federation, classes: int, most_clients: int, most_columns: int) -> HeatMap:
    width = -(-classes // most_columns)
    shown = _by_rows(federation, most_clients).tolist()
    columns = -(-classes // width)
    counts = [
        np.bincount(federation.train.labels[federation.rows_of(client)] // width, minlength=columns).tolist()
        for client in shown
    ]
    names = [str(client) if federation.names is None else str(federation.names[client]) for client in shown]
    return HeatMap(names, federation.sizes[shown].tolist(), list(federation.classes[::width]), width, counts)
