"""Outputs of frozen blocks that are kept: the same run but for rounding, where it pays, to the same bits on resume."""

from __future__ import annotations

import shutil

import pytest

import rayfed
from rayfed.clients.blueprint import draw_blueprint
from rayfed.server.states import kept
from rayfed.tasks.federation import form_federation

UPPER = ("lora.layers_to_transform=[1]", "server.rounds=6", "client.lr=0.01", "checkpoint.keep=9")


def kept_by(experiment) -> dict[str, int]:
    federation = form_federation(experiment)
    return kept(experiment, federation, draw_blueprint(experiment, len(federation.classes)))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    return rayfed.run(tiny(*UPPER), out=tmp_path_factory.mktemp("kept") / "run")


def test_the_run_is_the_same_but_for_rounding(tiny, tmp_path, finished):
    plain = rayfed.run(tiny(*UPPER, "engine.cache_gb=0"), out=tmp_path / "run")
    assert "outputs are kept" not in (plain.out / "events.log").read_text()
    assert "the first 1 blocks have no adapters; their outputs are kept" in (finished.out / "events.log").read_text()
    for one, other in zip(finished.metrics, plain.metrics, strict=True):
        for key in ("train/loss", "eval/loss", "test/loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)
        assert [one[key] for key in ("bytes/down", "bytes/up")] == [other[key] for key in ("bytes/down", "bytes/up")]


def test_it_resumes_to_the_same_bits(tiny, tmp_path, finished):
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    for path in (out / "checkpoints").iterdir():
        if path.name > "round-000002":
            shutil.rmtree(path)
    resumed = rayfed.run(tiny(*UPPER), out=out, resume=True)
    assert [r["state/digest"] for r in resumed.metrics] == [r["state/digest"] for r in finished.metrics]


def test_what_is_kept_follows_from_settings_and_data(tiny):
    federation = form_federation(tiny(*UPPER))
    size = {name: 4 * 32 * int(getattr(federation, name).lengths.sum()) for name in ("train", "validation", "test")}
    # 6 rounds of 3 of 12 clients: every text is trained on one and a half times, and measured six times.
    assert kept_by(tiny(*UPPER)) == {"validation": size["validation"], "test": size["test"]}
    assert kept_by(tiny(*UPPER, "eval.controls=true")) == size
    assert kept_by(tiny(*UPPER, "client.epochs=2")) == size
    assert kept_by(tiny(*UPPER, "eval.every=6")) == {}
    assert kept_by(tiny(*UPPER, "client.epochs=2", f"engine.cache_gb={(size['train'] + 1) / 1e9}")) == {
        "train": size["train"]
    }
    assert kept_by(tiny(*UPPER, "client.epochs=2", f"engine.cache_gb={(size['train'] - 1) / 1e9}")) == {
        "validation": size["validation"], "test": size["test"],
    }  # fmt: skip
    assert kept_by(tiny(*UPPER, "engine.padding=batch", "client.epochs=2")) == {}
    assert kept_by(tiny("client.epochs=9")) == {}  # both blocks have adapters
