from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfed.config.task import Data, Partition
from rayfed.errors import UserError
from rayfed.tasks.data import partition as module
from rayfed.tasks.data.dataset import load_data
from rayfed.tasks.data.partition import partition

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
LABELS = np.random.default_rng(0).integers(0, 10, 3000)


def split(kind: str, seed: int = 0, labels: np.ndarray = LABELS, **options: Any) -> list[np.ndarray]:
    return partition(labels, None, Partition(kind=kind, **{"clients": 60, **options}), seed)


def histogram(parts: list[np.ndarray], labels: np.ndarray = LABELS) -> np.ndarray:
    """(clients, classes) row counts."""
    return np.array([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])


@given(
    kind=st.sampled_from(["iid", "quantity", "dirichlet", "flasc", "pathological", "shards", "domain"]),
    mix=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    labels=st.lists(st.integers(3, 8), min_size=1, max_size=80),
    clients=st.integers(1, 80),
    alpha=st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 1e3, 1e300]),
    classes=st.integers(1, 6),
    seed=st.integers(0, 5),
)
def test_every_row_has_exactly_one_client(
    kind: str, mix: float, labels: list[int], clients: int, alpha: float, classes: int, seed: int
) -> None:
    settings = Partition(kind=kind, clients=clients, alpha=alpha, classes=classes, shards=classes, mix=mix)
    owners = np.array([f"domain {label}" for label in labels])
    present = len(set(labels))
    try:
        parts = partition(np.array(labels), owners, settings, seed)
    except UserError:
        assert (
            clients > len(labels)
            or (kind == "pathological" and not -(-present // clients) <= classes <= present)
            or (kind == "domain" and present > clients)
        )
        return
    assert len(parts) == clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize("kind", ["iid", "quantity", "dirichlet", "flasc", "pathological", "shards"])
def test_the_seed_and_the_kind_decide(kind: str) -> None:
    once, again, other = split(kind), split(kind), split(kind, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(once, other, strict=True))


def test_iid_shares_rows_evenly_and_at_random() -> None:
    parts = split("iid", clients=70)
    assert {len(part) for part in parts} == {42, 43}
    assert np.corrcoef([part.mean() for part in parts], np.arange(70))[0, 1] ** 2 < 0.1  # no client has the first rows


def test_small_alpha_is_skewed_and_large_alpha_is_flat() -> None:
    for kind in ("dirichlet", "flasc"):
        parts = [split(kind, alpha=alpha) for alpha in (0.001, 0.1, 1.0, 1000.0)]
        held = [np.mean([len(set(LABELS[rows])) for rows in clients if len(rows)]) for clients in parts]
        assert held == sorted(held)
        assert held[0] < 2.5
        assert held[-1] > 9.5
        sizes = [len(part) for part in split(kind, alpha=1000.0)]
        assert 40 <= min(sizes) <= max(sizes) <= 60


def test_even_shares_of_few_rows_do_not_go_to_the_same_clients() -> None:
    # 100 classes of 10 rows, 50 clients: cut in one order for all classes, 10 clients would get everything.
    labels = np.repeat(np.arange(100), 10)
    sizes = [len(part) for part in split("dirichlet", labels=labels, clients=50, alpha=1e6)]
    assert min(sizes) >= 8
    assert max(sizes) <= 35


@pytest.mark.parametrize("kind", ["dirichlet", "flasc", "pathological"])
def test_neighbours_do_not_gather_with_one_client(kind: str) -> None:
    labels = np.repeat([0, 1], 500)
    parts = split(kind, labels=labels, clients=10, alpha=1e6)
    spans = [np.ptp(part[labels[part] == c]) for part in parts for c in (0, 1)]
    assert min(spans) > 300  # about 50 rows from all over the 500 of the class


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    # A component of Dirichlet(a 1_K) has mean 1/K and variance (1/K)(1 - 1/K)/(K a + 1).
    labels = np.repeat(np.arange(400), 1000)
    shares = histogram(split("dirichlet", labels=labels, clients=5, alpha=0.5), labels) / 1000
    assert shares.mean() == pytest.approx(0.2)
    assert shares.var() == pytest.approx(0.2 * 0.8 / (5 * 0.5 + 1), rel=0.05)


def test_flasc_follows_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    alpha, clients, sizes = 0.3, 40, np.array([500, 90, 1, 37])
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(4), sizes))
    drawn = []
    log_gamma = module._log_gamma
    monkeypatch.setattr(module, "_log_gamma", lambda *a: drawn.append(log_gamma(*a)) or drawn[0].copy())
    counts = histogram(split("flasc", labels=labels, clients=clients, alpha=alpha), labels)
    for_client = np.exp(drawn[0])
    for_client = for_client / for_client.sum(axis=1, keepdims=True)  # p ~ Dir(a 1_C) for each client
    for_class = for_client / for_client.sum(axis=0)  # columns normalised over clients
    due = for_class * sizes  # times the class count
    assert np.abs(counts - due).max() < 1  # rounded, up or down
    assert counts.sum(axis=0).tolist() == sizes.tolist()


def test_flasc_draws_are_dirichlet_per_client() -> None:
    rng = np.random.default_rng(0)
    draws = np.exp(module._log_gamma(0.3, (20000, 4), rng))
    shares = draws / draws.sum(axis=1, keepdims=True)
    assert shares.mean(axis=0) == pytest.approx([0.25] * 4, abs=0.01)
    assert shares.var() == pytest.approx(0.25 * 0.75 / (4 * 0.3 + 1), rel=0.03)


def test_flasc_clients_are_more_even_in_size_than_dirichlet_ones() -> None:
    spread = {kind: np.std([len(part) for part in split(kind, alpha=0.1)]) for kind in ("flasc", "dirichlet")}
    assert spread["flasc"] < 0.8 * spread["dirichlet"]


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10])
def test_pathological_deals_so_many_classes_to_each_client(classes: int) -> None:
    counts = histogram(split("pathological", classes=classes))
    assert ((counts > 0).sum(axis=1) == classes).all()
    holders = (counts > 0).sum(axis=0)
    assert np.ptp(holders) <= 2
    for column in counts.T:  # the holders of a class share it equally
        assert np.ptp(column[column > 0]) <= 1


def test_pathological_clients_are_not_in_the_order_of_classes() -> None:
    first = histogram(split("pathological", classes=1)).argmax(axis=1)
    assert len({tuple(first[i : i + 10]) for i in range(0, 60, 10)}) == 6  # every deck is shuffled anew


def test_quantity_sizes_are_log_normal_and_labels_are_not_skewed() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 400_000)
    parts = split("quantity", labels=labels, clients=500, sigma=0.7)
    logs = np.log([len(part) for part in parts])
    assert logs.std() == pytest.approx(0.7, rel=0.08)
    assert abs(((logs - logs.mean()) ** 3).mean()) < 0.3 * 0.7**3  # as symmetric as a normal distribution
    large = histogram(parts, labels)[np.argsort(logs)[-20:]]
    assert np.abs(large / large.sum(axis=1, keepdims=True) - 0.25).max() < 0.05
    assert {len(part) for part in split("quantity", sigma=0)} == {50}


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_are_pieces_of_the_rows_in_the_order_of_labels(shards: int) -> None:
    parts = split("shards", shards=shards)
    assert {len(part) for part in parts} == {50}
    held = [len(set(LABELS[part])) for part in parts]
    assert max(held) <= 2 * shards  # a piece of 50 / shards rows spans two labels at most
    assert np.mean(held) > 0.9 * min(shards, 3)


def test_a_client_has_one_domain_and_domains_have_clients_by_size() -> None:
    domains = np.repeat(["c", "a", "b"], [600, 300, 10])
    parts = partition(np.zeros(910, dtype=np.int64), domains, Partition(kind="domain", clients=10), 0)
    held = [set(domains[part]) for part in parts]
    assert held == [{"a"}] * 3 + [{"b"}] + [{"c"}] * 6
    assert [len(part) for part in parts] == [100] * 3 + [10] + [100] * 6


def test_mixing_exchanges_the_last_rows_of_every_client() -> None:
    owners = np.repeat(["a", "b", "c", "d"], [200, 100, 60, 4])
    plain, mixed = (
        partition(np.zeros(364, dtype=np.int64), owners, Partition(kind="natural", mix=mix), 0) for mix in (0.0, 0.25)
    )
    assert [len(part) for part in mixed] == [200, 100, 60, 4]
    for before, after in zip(plain, mixed, strict=True):
        stay = len(before) - round(0.25 * len(before))
        assert set(before[:stay]) <= set(after)
    last = set(range(150, 200))
    assert 15 < len(last & set(mixed[0])) < 40  # 50 of the pool's 91 rows come back, at random


def test_natural_has_one_client_per_owner_in_order_of_names() -> None:
    owners = np.array(["b", "a", "10", "b", "9"])
    parts = partition(np.zeros(5, dtype=np.int64), owners, Partition(kind="natural", clients=1), 0)
    assert [part.tolist() for part in parts] == [[2], [4], [1], [0, 3]]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not here")
def test_natural_on_real_domains() -> None:
    data = load_data(Data(source="files", path=str(SHARED / "clinc150"), client="domain"), 0)
    parts = partition(data.train.labels, data.train.owners, Partition(kind="natural"), 0)
    assert [(len(rows), len(set(data.train.labels[rows]))) for rows in parts] == [(1500, 15)] * 10


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("iid", {"clients": 31}, "partition.clients: got 31, but there are only 30 training rows to share"),
        ("dirichlet", {"clients": 31}, "partition.clients: got 31"),
        ("pathological", {"classes": 11}, "partition.classes: got 11, but the training rows have only 10 classes"),
        (
            "pathological",
            {"classes": 2, "clients": 4},
            "partition.classes: got 2, but 4 clients need at least 3 each to cover all 10 classes",
        ),
        ("natural", {}, "data.client: got null, but partition.kind=natural needs the column that names the client"),
        ("domain", {}, "data.client: got null, but partition.kind=domain needs the column that names the domain"),
    ],
)
def test_what_cannot_be_divided_is_refused(kind: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        split(kind, labels=np.arange(30) % 10, **{"clients": 20, **options})
