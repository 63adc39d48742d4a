"""What clients keep: off the heap, whole, and gone when no checkpoint needs it."""

from __future__ import annotations

import pytest
import torch
from bit_flips import flipped
from small_runs import lowrank

import rayfed
from rayfed.methods import _views
from rayfed.server.client_state import ClientStore, digest_of


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"view": torch.full((2, 3), value), "head": torch.tensor([value])}


def test_only_what_is_new_is_written(tmp_path):
    store = ClientStore(tmp_path)
    first = store.save({7: tensors(1.0), 2: tensors(2.0)}, 1)
    second = store.save({**first, 7: tensors(3.0)}, 2)
    assert second[2] is first[2]
    assert torch.equal(second[7]["view"], tensors(3.0)["view"])
    assert torch.equal(first[7]["view"], tensors(1.0)["view"])
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors")) == [
        "2/round-000001.safetensors",
        "7/round-000001.safetensors",
        "7/round-000002.safetensors",
    ]


def test_equal_bits_have_equal_digests(tmp_path):
    one = ClientStore(tmp_path / "one").save({1: tensors(1.0), 2: tensors(2.0)}, 1)
    other = ClientStore(tmp_path / "other").save({2: tensors(2.0), 1: tensors(1.0)}, 1)
    changed = ClientStore(tmp_path / "changed").save({1: tensors(1.0), 2: tensors(2.5)}, 1)
    assert digest_of(one) == digest_of(other) != digest_of(changed)
    assert digest_of({}) == ""


def test_clients_of_equal_bits_are_equal(tmp_path):
    saved = ClientStore(tmp_path).save({1: tensors(1.0), 2: tensors(1.0), 3: tensors(2.5)}, 1)
    assert saved[1] == saved[2] != saved[3]
    assert len(set(saved.values())) == 2
    assert saved[1] != dict(saved[1])


def test_a_checkpoint_brings_it_back_and_prunes_the_rest(tmp_path):
    store = ClientStore(tmp_path)
    old = store.save({1: tensors(1.0)}, 1)
    new = store.save({**old, 1: tensors(2.0)}, 2)
    store.prune([store.to_json(new)])
    restored = store.restore(store.to_json(new))
    assert dict(restored[1]).keys() == {"view", "head"}
    assert torch.equal(restored[1]["head"], torch.tensor([2.0]))
    with pytest.raises(OSError, match="round-000001"):
        store.restore(store.to_json(old))


def test_damage_is_found(tmp_path):
    store = ClientStore(tmp_path)
    kept = store.save({1: tensors(1.0)}, 1)
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    for bad in flipped(whole, 50):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="clients/1/round-000001"):
            store.restore(store.to_json(kept))
    (tmp_path / "elsewhere").write_bytes(whole)
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="no regular file"):
        store.restore(store.to_json(kept))


def test_it_is_a_mapping(tmp_path):
    wanted = tensors(1.0)
    kept = ClientStore(tmp_path).save({1: wanted}, 1)[1]
    assert list(kept) == sorted(wanted)
    assert len(kept) == len(wanted)
    assert all(torch.equal(kept[name], tensor) for name, tensor in wanted.items())
    assert kept.get("nobody") is None
    assert "view" in kept
    with pytest.raises(KeyError):
        kept["nobody"]


def test_views_as_stacks_train_as_matrices_do_and_resume(tmp_path, monkeypatch):
    settings = ("method.name=fedview", "method.start=half", "server.rounds=5", "server.cohort=4")
    matrices = rayfed.run(lowrank(*settings), out=tmp_path / "matrices").metrics
    monkeypatch.setattr(_views, "SMALL", 0)
    stacks = rayfed.run(lowrank(*settings), out=tmp_path / "stacks").metrics
    for a, b in zip(matrices, stacks, strict=True):
        assert a["bytes/total"] == b["bytes/total"]
        assert a["eval/loss"] == pytest.approx(b["eval/loss"], rel=1e-5)
        assert a["method/view_error"] == pytest.approx(b["method/view_error"], rel=1e-3, abs=1e-6)
    rayfed.run(lowrank(*settings, "server.rounds=2"), out=tmp_path / "resumed")
    resumed = rayfed.run(lowrank(*settings), out=tmp_path / "resumed", resume=True).metrics
    assert resumed[-1]["state/digest"] == stacks[-1]["state/digest"] != matrices[-1]["state/digest"]
