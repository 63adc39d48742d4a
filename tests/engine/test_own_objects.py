"""Own rows, method, metric and callback together: the same bits in this process and on two Ray workers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset

import rayfed
from rayfed.errors import UserError
from rayfed.methods.fedit import FedIT


@dataclass(frozen=True)
class HalfSteps(FedIT):
    def aggregate(self, state, updates, advance):
        moved = super().aggregate(state, updates, advance)
        return moved.next(vector=state.vector + 0.5 * (moved.vector - state.vector))


class StopsAfterTwo(rayfed.Callback):
    def on_round(self, record: Any) -> bool:
        return bool(record["round"] < 2)


def card_recall(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    return float((predicted[labels == 1] == 1).float().mean())


def doubled(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return 2 * torch.nn.functional.cross_entropy(logits, labels, reduction="none")


@pytest.fixture(scope="module")
def rows(tiny_data):
    return [json.loads(line) for line in (tiny_data / "train.jsonl").read_text().splitlines()]


class TorchRows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]["text"], self.rows[index]["label"]


def task(rows, **options):
    return rayfed.TextClassification(train=rows, **options)


def digests(experiment, out, **parts):
    return list(rayfed.run(experiment, out, **parts).history["state/digest"])


def test_all_kinds_of_rows_give_the_bits_of_a_file(tmp_path, tiny, tiny_data, rows):
    settings = ("server.rounds=1", "data.test=0.2")
    expected = digests(tiny(*settings, f"data.path={tiny_data}/train.jsonl"), tmp_path / "file")
    for name, kind in {"list": rows, "dataset": Dataset.from_list(rows), "torch": TorchRows(rows)}.items():
        assert digests(tiny(*settings), tmp_path / name, task=task(kind)) == expected
    rayfed.load_model(tmp_path / "list")


def test_other_rows_are_another_run(tmp_path, tiny, rows):
    experiment, out = tiny("server.rounds=1"), tmp_path / "run"
    rayfed.run(experiment, out, task=task(rows))
    with pytest.raises(UserError, match=r"^--resume: .* was made with other settings"):
        rayfed.run(experiment, out, resume=True, task=task(rows[:-1]))
    with pytest.raises(UserError, match=r"^data.fingerprint: got .*give it again, rayfed.run"):
        rayfed.load_config(out / "config.yaml")
    assert rayfed.run(out / "config.yaml", out, resume=True, task=task(rows)).rounds == 1


def test_bad_rows_are_refused_by_split_and_row(tmp_path, tiny, rows):
    for bad, message in (
        (7, r"^train: got int, but it should be a datasets.Dataset"),
        ([*rows, 7], r"^train: got 7, but row 161 is that: a row is a mapping"),
        ([*rows, {"text": "a"}], r"^data.label: got None in the train rows, column 'label', row 161"),
    ):
        with pytest.raises(UserError, match=message):
            rayfed.run(tiny(), tmp_path / "run", task=task(bad))


def test_own_loss_and_metric(tmp_path, tiny, rows):
    own = task(rows, loss_fn=doubled, metric_fns={"card_recall": card_recall})
    plain = rayfed.run(tiny("server.rounds=1"), tmp_path / "plain", task=task(rows)).history
    history = rayfed.run(tiny("server.rounds=1"), tmp_path / "run", task=own).history
    recall = history["test/recall_per_class"][1][1]
    assert history["test/card_recall"][1] == pytest.approx(recall)
    assert history["state/digest"][1] != plain["state/digest"][1]


@pytest.mark.slow
def test_everything_of_ones_own_on_ray(tmp_path, tiny, rows, ray_cluster):
    def run(*overrides):
        own = task(Dataset.from_list(rows), metric_fns={"card_recall": card_recall})
        parts = {"task": own, "method": HalfSteps(), "callbacks": [StopsAfterTwo()]}
        return rayfed.run(tiny("server.rounds=4", *overrides), tmp_path / str(len(overrides)), **parts).history

    here, there = run(), run("engine.kind=ray", "engine.workers=2")
    assert len(here) == len(there) == 2
    for key in ("state/digest", "test/card_recall", "bytes/total"):
        assert list(here[key]) == list(there[key])
