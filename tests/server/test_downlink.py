"""Downloads: which entries a client may upload, and where an upload's values belong in the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from small_runs import lowrank

import rayfed
from rayfed import wire
from rayfed.clients import trainer
from rayfed.clients.local_training import train_pack
from rayfed.clients.transfer import Uploadable
from rayfed.errors import RunError
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import Start, Trainable, fedview
from rayfed.methods.base import Sparse
from rayfed.methods.fedview import FedView
from rayfed.server.downlink import Downlink, Download

LAYOUT = Adapter({"a": LowRank(torch.zeros(2, 1), torch.zeros(1, 3), 1.0)}, {}).layout  # A in 0 to 2, B in 3 and 4


def download(has: torch.Tensor | None = None) -> Download:
    return Download(Start(torch.zeros(5), LAYOUT), (b"",), None, torch.zeros(5), has)


def landed(uploadable: Uploadable, payload: bytes) -> list[float]:
    moved = uploadable.placed(wire.decode(payload))
    return (moved.dense() if isinstance(moved, Sparse) else moved).tolist()


def test_an_upload_lands_where_it_belongs():
    x = torch.tensor([1.0, 2, 3, 4, 5])
    everything = download().uploadable(Trainable())
    assert landed(everything, wire.encode(x)) == [1, 2, 3, 4, 5]
    assert landed(everything, wire.encode(x, indices=torch.tensor([1, 4]))) == [0, 2, 0, 0, 5]
    only_B = download().uploadable(Trainable(parts=("B",)))
    assert landed(only_B, wire.encode(x[:2])) == [0, 0, 0, 1, 2]
    assert landed(only_B, wire.encode(x[:2], indices=torch.tensor([1]))) == [0, 0, 0, 0, 2]
    with pytest.raises(RunError, match="an upload has 5 entries where 2 may be sent"):
        only_B.placed(wire.decode(wire.encode(x)))


def test_the_budget_counts_what_would_train_had_everything_arrived():
    has = torch.tensor([True, False, False, True, False])
    some = Trainable(received_only=True)
    assert download(has).budget(some, 1.0) == 5
    assert download(has).budget(some, 0.4) == 2
    assert download(has).uploadable(some).places.tolist() == [0, 3]
    personal = Trainable(received_only=True, personal=("B",))
    assert download(has).budget(personal, 1.0) == 3
    assert download(has).uploadable(personal).places.tolist() == [0]


def test_the_entries_are_computed_once_for_clients_that_train_the_same_parts():
    sent = download()
    first = sent.uploadable(Trainable(parts=("B",)))
    assert sent.uploadable(Trainable(parts=("B",))) is first
    assert sent.uploadable(Trainable()).places is None
    assert sent.uploadable(Trainable(parts=("B",))).places.tolist() == [3, 4]
    assert len(sent._cached) == 1  # memory does not grow with the clients


@dataclass(frozen=True)
class WatchedHalf(FedView):
    """FedView whose starts merge a part of the correction; notes what the server knows of each client's start."""

    start: str = "half"
    seen: ClassVar[dict] = {}

    def aggregate(self, state, updates, advance):
        def watched():
            for update in updates:
                own = self.broadcast(state, update.client)
                assert own.merge is not None
                self.seen[state.rounds, update.client.client] = update.start, dict(own.base), own.merged_base
                yield update

        return super().aggregate(state, watched(), advance)


def test_a_change_to_merge_reaches_the_worker(tmp_path, monkeypatch):
    """The adapter and the base on which a worker trains are the server's view of the client, to the bit."""
    trained = {}

    def watched(context, members, *, lr, t):
        trained.update({(t, member.client): (member.start, member.base) for member in members})
        return train_pack(context, members, lr=lr, t=t)

    monkeypatch.setattr(trainer, "train_pack", watched)
    settings = lowrank("server.rounds=4", "server.cohort=5", "engine.pack=2")
    rayfed.run(settings, out=tmp_path / "run", method=WatchedHalf())
    seen = WatchedHalf.seen
    assert trained.keys() == seen.keys()
    assert len(seen) == 20
    for key, (start, base) in trained.items():
        expected_start, before, expected = seen[key]
        assert torch.equal(start, expected_start)
        assert torch.equal(_matrix(base), _matrix(expected))
        merged = _matrix(expected) - (_matrix(before) if before else 0)
        assert bool(merged.any()) == (key[0] > 0)  # before the first round there is nothing to correct


def _matrix(base):
    change = base["layer"]
    return change.dense() if isinstance(change, LowRank) else change


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        ((), 3 * 5),
        (("wire.down.density=0.25", "wire.down.values=bf16"), 3 * 5),
        (("profiles={kind: tiers, ranks: [1, 2]}",), 2 * 4 + 2),
        (("wire.down.values=qsgd8",), 0),  # each client's message is rounded by draws of its own
        (("method.start=half",), 0),  # the other half is random, and the client's own
    ],
)
def test_clients_of_equal_views_share_a_download_and_nothing_changes(overrides, shared, tmp_path, monkeypatch):
    """All 6 clients in every round. From the second one on those of one rank have equal views.

    (Those of rank 1 from the third one on: their first views are random rows times 0, and -0 is not 0 in a file.)
    """
    made: list[Download] = []

    def watched(self, client, key, make=Downlink._make):
        made.append(make(self, client, key))
        return made[-1]

    settings = lowrank("method.name=fedview", "server.rounds=4", "partition.clients=6", "server.cohort=6", *overrides)
    with monkeypatch.context() as patch:
        patch.setattr(Downlink, "_make", watched)
        found = rayfed.run(settings, out=tmp_path / "shared")
    assert len(made) - len({id(download) for download in made}) == shared
    with monkeypatch.context() as patch:
        patch.setattr(fedview, "_key", lambda state, client: client)
        apart = rayfed.run(settings, out=tmp_path / "apart")
    for record, other in zip(found.metrics, apart.metrics, strict=True):
        for key in ("state/digest", "state/chain", "bytes/down", "method/view_error"):
            assert record[key] == other[key], key
