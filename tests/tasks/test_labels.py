"""Multi-label classification and regression end to end: their figures by other code, and what is refused."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from card_lines import defined_by_card
from conftest import SHARED_DATA, TOPICS, WORDS

import rayfed
from rayfed.api import build_components, prepare
from rayfed.config import Experiment, validate
from rayfed.config.load import _apply
from rayfed.errors import UserError
from rayfed.tasks.data.dataset import load_data
from rayfed.tasks.data.heterogeneity import describe

SETTINGS: dict[str, Any] = {
    "data": {"task": "multi_label", "source": "files", "label": "topics", "validation": 0.2},
    "partition": {"kind": "iid", "clients": 8},
    "model": {"pooling": "mean"},
    "lora": {"rank": 2, "alpha": 4, "target_modules": "all-linear"},
    "method": {"name": "fedit"},
    "client": {"lr": 0.1, "batch_size": 8},
    "server": {"rounds": 2, "cohort": 4},
    "eval": {"masked": False},
    "engine": {"kind": "local"},
    "tracking": {"console": "off", "wandb": "off"},
}
NUMBERS = ("data.task=regression", "data.label=score", "client.lr=0.003")


def texts(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose topics are those of their words, none to three, with a score that one topic raises."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        topics = draw.sample(range(len(TOPICS)), draw.randrange(4))
        words = draw.choices(WORDS[24:], k=3) + [f"{TOPICS[topic]}{draw.randrange(6)}" for topic in topics]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "topics": topics, "score": round(4 * (0 in topics) + draw.random(), 3)})
    return rows


TEST = texts(40, 1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("topics")
    for name, found in (("train", texts(120, 0)), ("test", TEST)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def experiment(rows: Path, model: Path, *overrides: str) -> Experiment:
    settings = copy.deepcopy(SETTINGS)
    for override in (f"data.path={rows}", f"model.name={model}", *overrides):
        _apply(settings, override)
    return validate(settings)


@pytest.mark.parametrize("pooling", [pytest.param("stock", marks=pytest.mark.slow), "mean"])
@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_a_run_reaches_what_the_lines_of_its_card_reach(
    rows: Path, tiny_bert: Path, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str,
    pooling: str,
) -> None:  # fmt: skip
    from scipy.stats import spearmanr
    from sklearn.metrics import average_precision_score, f1_score

    overrides = (*(NUMBERS if task == "regression" else ()), f"model.pooling={pooling}", "eval.unseen=true")
    settings = experiment(rows, tiny_gpt2 if pooling == "stock" else tiny_bert, *overrides, "export.merged=true")
    run = rayfed.run(settings, tmp_path / "run")
    first, last = run.metrics
    keys = build_components(settings).task.metric_keys(settings.eval)
    assert all(isinstance(last[key], float) for key in keys)
    assert last["test/loss"] < first["test/loss"]
    logits = defined_by_card(run.out, monkeypatch)["logits"]([row["text"] for row in TEST])
    if task == "multi_label":
        truth = np.array([[topic in row["topics"] for topic in range(4)] for row in TEST])
        found = (logits > 0).numpy()
        assert last["test/map"] == pytest.approx(average_precision_score(truth, logits.numpy()))
        assert last["test/micro_f1"] == pytest.approx(f1_score(truth, found, average="micro"))
        assert last["test/macro_f1"] == pytest.approx(f1_score(truth, found, average="macro"))
        wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(truth).float())
    else:
        scores = torch.tensor([row["score"] for row in TEST])
        assert last["test/spearman"] == pytest.approx(spearmanr(scores, logits[:, 0]).statistic)
        wanted = torch.nn.functional.mse_loss(logits[:, 0], scores)
    assert last["test/loss"] == pytest.approx(wanted.item(), rel=1e-4)
    assert (run.out / "adapter" / "classes.json").exists() is (task == "multi_label")
    assert rayfed.load_model(run.out) is not None
    if pooling == "stock":
        merged = json.loads((run.out / "merged" / "config.json").read_text())
        assert merged["problem_type"] == {"multi_label": "multi_label_classification"}.get(task, task)


def test_every_source_gives_the_same_labels(rows: Path, tmp_path: Path) -> None:
    import datasets
    import pandas as pd

    found = texts(30, 2)
    frame = pd.DataFrame(found)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    frame.to_parquet(tmp_path / "train.parquet")
    frame.assign(topics=[",".join(map(str, row["topics"])) for row in found]).to_csv(tmp_path / "train.csv")
    names = datasets.ClassLabel(names=list(TOPICS))
    features = datasets.Features(
        {"text": datasets.Value("string"), "topics": datasets.List(names), "score": datasets.Value("float32")}
    )
    hub = datasets.Dataset.from_list(found, features=features)
    for task, label, kind in (("multi_label", "topics", np.bool_), ("regression", "score", np.float32)):
        settings = {"task": task, "label": label, "test": 0.5, "validation": 0}
        base = validate({"data": {"source": "files", "path": str(tmp_path / "train.jsonl"), **settings}}).data
        wanted = load_data(base, 0)
        assert wanted.train.labels.dtype == kind
        for file in ("train.parquet", "train.csv"):
            own = load_data(base.model_copy(update={"path": str(tmp_path / file)}), 0)
            assert own.train.labels.tolist() == wanted.train.labels.tolist()
            assert (own.train.texts, own.classes) == (wanted.train.texts, wanted.classes)
        cls = rayfed.MultiLabel if task == "multi_label" else rayfed.Regression
        for given in (found, frame, pd.read_parquet(tmp_path / "train.parquet"), hub):
            task_of = cls(train=given, label=label)
            own = load_data(base.model_copy(update={"source": "object"}), 0, task_of._source(base))
            assert own.train.labels.tolist() == wanted.train.labels.tolist()
            assert own.classes == (tuple(TOPICS) if given is hub and task == "multi_label" else wanted.classes)


def line(rows: list[dict[str, Any]], tmp_path: Path, model: Path, *overrides: str) -> str:
    """The error for these training rows, without the folder's name."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        prepare(experiment(tmp_path, model, *overrides))
    return str(error.value).replace(str(tmp_path), "DATA")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1, "it should be a list of labels"),
        (None, "it should be a list of labels"),
        ([0, 0], "a label is there twice"),
        ([0, 1.5], "labels are integers or strings, of 64 bits or of 1 to 200 printable characters"),
        ([[1]], "labels are integers or strings, of 64 bits or of 1 to 200 printable characters"),
    ],
)
def test_bad_lists_of_labels(tmp_path: Path, tiny_bert: Path, value: object, message: str) -> None:
    found = line([{"text": "a", "topics": [0, 1]}, {"text": "a", "topics": value}], tmp_path, tiny_bert)
    assert found == f"data.label: got {value!r} in DATA/train.jsonl, column 'topics', row 2, but {message}"


def test_lists_of_labels_have_one_type_and_two_classes(tmp_path: Path, tiny_bert: Path) -> None:
    assert line([{"text": "a", "topics": [0, "b"]}], tmp_path, tiny_bert) == (
        "data.label: got 0 (DATA/train.jsonl row 1) and 'b' (DATA/train.jsonl row 1) in column 'topics', but labels "
        "are all integers or all strings"
    )
    for value, found in (([0], "the one class 0"), ([], "no class")):
        assert line([{"text": "a", "topics": value}] * 9, tmp_path, tiny_bert) == (
            f"data.label: got column 'topics' with {found}, but two are needed"
        )
    import datasets

    names = datasets.List(datasets.ClassLabel(names=["a", "b"]))
    features = datasets.Features({"text": datasets.Value("string"), "topics": names})
    hub = datasets.Dataset.from_list([{"text": "x", "topics": [0]}, {"text": "y", "topics": [-1]}], features=features)
    with pytest.raises(UserError) as error:
        prepare(experiment(tmp_path, tiny_bert, "data={label: topics}"), task=rayfed.MultiLabel(train=hub))
    assert str(error.value) == (
        "data.label: got [-1] in the train rows, column 'topics', row 2, but labels of this data set are 0 to 1"
    )


@pytest.mark.parametrize("value", ["high", True, None, [1.0], float("nan"), 1e39])
def test_bad_numbers(tmp_path: Path, tiny_bert: Path, value: object) -> None:
    found = line([{"text": "a", "score": 1}, {"text": "a", "score": value}], tmp_path, tiny_bert, *NUMBERS)
    what = "with data.task=regression a label is a finite number"
    assert found == f"data.label: got {value!r} in DATA/train.jsonl, column 'score', row 2, but {what}"


def test_a_partition_by_label_goes_by_the_first_class(rows: Path, tiny_bert: Path) -> None:
    by_label = "partition={kind: pathological, classes: 1, clients: 5}"
    federation = prepare(experiment(rows, tiny_bert, by_label, "data.validation=0")).federation
    firsts = []
    for client in range(5):
        labels = federation.train.labels[federation.rows_of(client)]
        firsts.append({int(row.argmax()) if row.any() else 4 for row in labels})
    assert sorted(map(tuple, firsts)) == [(0,), (1,), (2,), (3,), (4,)]
    assert describe(federation)["classes"] is None
    with pytest.raises(UserError) as error:
        prepare(experiment(rows, tiny_bert, by_label, *NUMBERS))
    assert str(error.value) == (
        "partition.kind: got 'pathological', but it divides rows by label, and with data.task=regression a label is a "
        "number; allowed are iid, quantity, domain, natural"
    )


@pytest.mark.parametrize("override", ["eval.clients=true", "eval.controls=true"])
def test_refusals(rows: Path, tiny_bert: Path, override: str) -> None:
    field = override.partition("=")[0]
    for more, why in (((), "a text has several classes"), (NUMBERS, "there are no classes")):
        settings = experiment(rows, tiny_bert, override, *more)
        with pytest.raises(UserError) as error:
            prepare(settings)
        what = f"with data.task={settings.data.task} {why}; allowed is false"
        assert str(error.value) == f"{field}: got true, but {what}"


def focal(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (
        torch.nn.functional.binary_cross_entropy_with_logits(outputs, labels.float(), reduction="none").square().sum(1)
    )


def subset_accuracy(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    return float(((predictions > 0) == labels).all(1).float().mean())


def test_loss_and_metrics_may_be_functions(rows: Path, tiny_bert: Path, tmp_path: Path) -> None:
    own = {"loss_fn": focal, "metric_fns": {"subset_accuracy": subset_accuracy}}
    task = rayfed.MultiLabel(train=texts(40, 0), test=TEST, **own)
    settings = experiment(rows, tiny_bert, "data={label: topics}", "server.rounds=1")
    last = rayfed.run(settings, tmp_path / "run", task=task).metrics[-1]
    assert 0 <= last["test/subset_accuracy"] <= 1
    assert set(build_components(settings, task).task.metric_names()) == {
        "map",
        "micro_f1",
        "macro_f1",
        *own["metric_fns"],
    }
    with pytest.raises(UserError, match=r"^task.metric_fns: got 'map', but this name is taken$"):
        prepare(settings, task=rayfed.MultiLabel(train=TEST, metric_fns={"map": subset_accuracy}))


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED_DATA / "goemotions").exists(), reason="the data are not here")
def test_real_emotions_train_on_ray(tmp_path: Path, tiny_bert: Path, ray_cluster: None) -> None:
    settings = experiment(
        SHARED_DATA / "goemotions", Path("minilm"), "data.label=labels", "data.max_tokens=32", "data.examples=1200",
        "data.test_examples=200", "partition={kind: dirichlet, clients: 20}", "server={rounds: 5, cohort: 6}",
        "client={lr: 0.1, batch_size: 16}", "lora.target_modules=[query, value]",
        "engine={kind: ray, workers: 2, pack: 3}",
    )  # fmt: skip
    metrics = rayfed.run(settings, tmp_path / "run").metrics
    assert metrics[-1]["test/loss"] < metrics[0]["test/loss"] - 0.01
    assert metrics[-1]["test/map"] > metrics[0]["test/map"]
