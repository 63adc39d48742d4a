"""Runs with `partition.sequence`: what trains, what is compared and measured, and what stays as it was, to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rayfed
import rayfed.server.checkpoint
from rayfed.api.plans import prepare
from rayfed.errors import UserError
from rayfed.methods import METHODS, method_class
from rayfed.server.class_head import output_layer
from rayfed.server.evaluation.experiences import forgetting

BASE = ("server.rounds=4", "method.name=fedit", "checkpoint.keep=10")
TWO = (*BASE, "partition.sequence={experiences: 2}")


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: Any) -> rayfed.RunResult:
    """Two experiences of two classes, two rounds each."""
    return rayfed.run(tiny(*TWO), tmp_path_factory.mktemp("sequence") / "run")


def heads(experiment: rayfed.Experiment, out: Path) -> list[torch.Tensor]:
    """The rows (classes, width + 1) of the global head, with their biases, before round 1 and after each round."""
    plan = prepare(experiment)
    states = [plan.method.init(plan.start(), plan.seed)]
    for folder in sorted((out / "checkpoints").iterdir()):
        tensors = load_file(folder / "state.safetensors")
        own = {name.removeprefix("method."): x for name, x in tensors.items() if name.startswith("method.")}
        facts = rayfed.server.checkpoint.read_manifest(folder).facts
        states.append(plan.method.restore(own, facts, {}))
    found = [plan.method.head(state) for state in states]
    return [torch.cat([head["classifier.weight"], head["classifier.bias"][:, None]], dim=1) for head in found]


def moved(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """The classes whose row has other bits."""
    return [c for c in range(len(before)) if not torch.equal(before[c], after[c])]


def expect_only_compared_rows_move(experiment: rayfed.Experiment, loss: str, out: Path) -> None:
    run = rayfed.run(experiment, out)
    first, second = prepare(experiment).federation.experiences.classes
    start, *after = heads(experiment, run.out)
    assert set(moved(start, after[1])) == set(first)
    expected = {"current": set(second), "seen": {*first, *second}}[loss]
    assert set(moved(after[1], after[3])) == expected


@pytest.mark.parametrize("loss", ["current", "seen"])
def test_head_rows_of_other_classes_keep_their_bits(tiny: Any, tmp_path: Path, loss: str) -> None:
    """Against momentum, decay and sparse downloads at clients, and moments at the server."""
    flasc = ("method.name=flasc", "server.weight_decay=0", "wire.down.density=0.5", "client.weight_decay=0.1")
    expect_only_compared_rows_move(tiny(*TWO, f"partition.sequence.loss={loss}", *flasc), loss, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("fedsa", "local")]
)  # heads stay at the clients
def test_every_method_leaves_the_head_rows_of_other_classes(tiny: Any, tmp_path: Path, name: str) -> None:
    rounds = ("method.rounds_sparse=2", "method.rho=0.5") if name == "slora" else ()
    optimizer = () if method_class(name).optimizer == "fedavg" else ("server.weight_decay=0",)
    experiment = tiny(*TWO, f"method.name={name}", *rounds, *optimizer, "client.optimizer=adamw", "client.epochs=2")
    expect_only_compared_rows_move(experiment, "current", tmp_path / "run")


def test_the_keys_are_documented(finished: rayfed.RunResult) -> None:
    text = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text(encoding="utf-8")
    keys = {key for key in (*finished.metrics[-1], *finished.summary) if "sequence" in key or key.endswith("ence_1")}
    assert len(keys) == 5
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


def test_rows_that_do_not_train_do_not_travel_up(finished: rayfed.RunResult, tiny: Any, tmp_path: Path) -> None:
    """Two of four rows of 32 weights and a bias stay at home, of three clients."""
    plain = rayfed.run(tiny(*BASE), tmp_path / "plain").metrics
    up = [record["params/up"] for record in finished.metrics]
    assert up == [record["params/up"] - 3 * 2 * 33 for record in plain]


@pytest.mark.parametrize(
    ("name", "method", "more"),
    [
        ("flasc", "flasc", ("server.weight_decay=0",)),
        pytest.param("fed_talora", "fedex_lora", (), marks=pytest.mark.slow),
    ],
)
def test_one_experience_is_the_run_without_a_sequence(
    tiny: Any, tmp_path: Path, name: str, method: str, more: tuple[str, ...]
) -> None:
    one = rayfed.run(tiny(*BASE, *more, f"method.name={name}", "partition.sequence={experiences: 1}"), tmp_path / "one")
    plain = rayfed.run(tiny(*BASE, *more, f"method.name={method}"), tmp_path / "plain")
    left_out = ("time/", "state/chain", "sequence/", "test/accuracy_experience_")
    kept = [{k: v for k, v in record.items() if not k.startswith(left_out)} for record in one.metrics]
    assert kept == [{k: v for k, v in record.items() if not k.startswith(left_out)} for record in plain.metrics]
    assert one.summary["sequence/forgetting"] is None
    assert one.summary["sequence/average_accuracy"] == one.summary["final/test_accuracy"]


def test_settings_without_a_sequence_have_the_digest_they_had(tiny: Any) -> None:
    from rayfed.config.marks import settings_digest

    settings = tiny(*BASE).model_dump(mode="json")
    assert settings["partition"].pop("sequence") is None
    assert settings_digest(settings) == tiny(*BASE).digest() != tiny(*TWO).digest()


def test_only_clients_with_rows_of_the_experience_train_and_only_on_these(tiny: Any, tmp_path: Path) -> None:
    more = ("partition.kind=pathological", "partition.clients=12", "partition.classes=1", "server.cohort=6")
    experiment = tiny(*TWO, *more, "client.batch_size=1000")
    plan, run = prepare(experiment), rayfed.run(experiment, tmp_path / "run")
    for t, record in enumerate(run.metrics):
        own = plan.federation_at(t)
        assert record["sequence/experience"] == 1 + t // 2
        assert {client for client, _ in record["clients/trained"]} <= set(own.holders.tolist())
    assert not set(plan.federation_at(0).rows) & set(plan.federation_at(2).rows)
    assert len(plan.federation_at(0).rows) + len(plan.federation_at(2).rows) == len(plan.federation.rows)


def test_accuracies_of_a_base_that_does_not_move(tiny: Any, tmp_path: Path) -> None:
    """Adapters and head stay: the accuracies follow from the logits of the base, computed here."""
    still = ("model.head=frozen", "client.lr=1e-30", "partition.sequence={experiences: 4, loss: seen}")
    experiment = tiny(*BASE, *still)
    run, plan = rayfed.run(experiment, tmp_path / "run"), prepare(experiment)
    test, model = plan.federation.test, plan.task.load_base(plan.federation).model
    batch = test.batch(np.arange(len(test)), True)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    seen: list[int] = []
    expected, whole = [], []
    for t, classes in enumerate(plan.federation.experiences.classes):
        seen += classes
        hidden = torch.full((4,), float("inf"))
        hidden[seen] = 0
        right = (logits - hidden).argmax(1) == labels
        groups = plan.federation.experiences.classes[: t + 1]
        expected.append([right[torch.isin(labels, torch.tensor(own))].double().mean().item() for own in groups])
        whole.append(right[torch.isin(labels, torch.tensor(seen))].double().mean().item())
    assert run.summary["sequence/accuracies"] == expected
    assert [record["test/accuracy"] for record in run.metrics] == pytest.approx(whole)
    assert run.summary["sequence/average_accuracy"] == pytest.approx(np.mean(whole))
    assert run.summary["sequence/forgetting"] == pytest.approx(forgetting(expected))


def test_forgetting_is_the_fall_from_the_best() -> None:
    assert forgetting([[0.9], [0.5, 0.8], [0.6, 0.3, 1.0]]) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.3)) / 2)
    assert forgetting([[0.5], [0.7, 0.2]]) == pytest.approx(-0.2)
    assert forgetting([[0.5]]) is forgetting([]) is None
    assert forgetting([[None], [None, 0.4], [0.5, 0.1, 0.2]]) == pytest.approx(0.3)


@pytest.mark.parametrize("done", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_resume_in_the_sequence_has_the_same_bits(
    finished: rayfed.RunResult, tiny: Any, tmp_path: Path, done: int
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    for path in (out / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > done:
            shutil.rmtree(path)
    (out / "summary.json").unlink()
    again = rayfed.run(tiny(*TWO), out, resume=True)
    for key in ("state/digest", "state/chain", "test/accuracy_experience_1"):
        assert [record[key] for record in again.metrics] == [record[key] for record in finished.metrics]
    assert again.summary == finished.summary


def test_the_last_round_of_an_experience_is_evaluated(tiny: Any, tmp_path: Path) -> None:
    run = rayfed.run(tiny(*TWO, "eval.every=3", "eval.subset=10"), tmp_path / "run")
    assert [record["test/accuracy"] is not None for record in run.metrics] == [False, True, True, True]
    assert [record["sequence/experience"] for record in run.metrics] == [1, 1, 2, 2]
    assert run.metrics[0]["eval_subset/accuracy"] is not None


def test_the_best_round_is_one_of_the_last_experience(finished: rayfed.RunResult) -> None:
    """With more classes the accuracy is lower: an early round must not win."""
    rounds = finished.metrics
    assert max(record["eval/accuracy"] for record in rounds[:2]) > max(record["eval/accuracy"] for record in rounds[2:])
    assert finished.summary["best/round"] in (3, 4)


def test_the_server_optimizer_begins_anew_with_an_experience(tiny: Any, tmp_path: Path) -> None:
    run = rayfed.run(tiny(*TWO, "method.name=flasc", "server.weight_decay=0"), tmp_path / "run")
    steps = [load_file(path / "state.safetensors") for path in sorted((run.out / "checkpoints").iterdir())]
    assert [tensors["optimizer.vector.step"].item() for tensors in steps] == [1, 2, 1, 2]


def test_personal_accuracy_is_of_the_experience(tiny: Any, tmp_path: Path) -> None:
    run = rayfed.run(tiny(*TWO, "eval.clients=true"), tmp_path / "run")
    plan = prepare(tiny(*TWO))
    for t, record in enumerate(run.metrics):
        with_rows = [value is not None for value in record["test/accuracy_per_client"]]
        assert with_rows == (plan.federation_at(t).sizes > 0).tolist()


def test_the_output_layer_of_a_head() -> None:
    def weights(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {name.replace("_", "."): torch.zeros(shape) for name, shape in shapes.items()}

    assert output_layer(weights(classifier_weight=(4, 9), classifier_bias=(4,)), 4) == "classifier."
    assert output_layer(weights(classifier_a_weight=(4, 4), classifier_b_weight=(4, 4)), 4) == "classifier.b."
    assert output_layer(weights(classifier_weight=(4, 4), pre_weight=(4, 4)), 4) == "classifier."
    assert output_layer(weights(last_weight=(4, 4), summary_weight=(9, 9)), 4) == "last."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("server.rounds=5", r"server\.rounds: got 5, but .* multiple of partition\.sequence\.experiences=2 is allowed"),
        ("partition.sequence.experiences=0", r"partition\.sequence\.experiences: got 0, but it should be an"),
        ("partition.sequence={}", r"partition\.sequence\.experiences: missing, and there is no default"),
        (
            "partition.sequence.replay=3",
            r"partition\.sequence\.replay: unknown key; allowed are experiences, of, order",
        ),
        ("data.task=multi_label", r"partition\.sequence\.experiences: got 2, .* data\.task=text_classification and"),
        ("privacy={kind: user, noise_multiplier: 1}", r"privacy\.kind: got 'user', but with partition\.sequence"),
        ("server.max_mb=1", r"server\.max_mb: with partition\.sequence a run would end before"),
        ("objective.name=fedbc", r"objective\.name: got 'fedbc', but what it stores belongs to the loss of past"),
        ("eval.early_stop={patience: 2}", r"eval\.early_stop: with partition\.sequence a run would end before"),
        ("eval.unseen=true", r"eval\.unseen: with partition\.sequence clients have other rows"),
        ("eval.controls=true", r"eval\.controls: with partition\.sequence the baselines know no experiences"),
        ("method.name=flasc", r"server\.weight_decay: got 0\.01, but adamw's decay would move the head rows"),
    ],
)
def test_what_does_not_go_with_a_sequence_is_refused(tiny: Any, override: str, message: str) -> None:
    from rayfed.api.plans import build_components

    with pytest.raises(UserError, match=f"^{message}"):
        build_components(tiny(*TWO, override))


def test_a_cohort_needs_clients_in_every_experience(tiny: Any) -> None:
    """Each client is a class."""
    with pytest.raises(UserError, match=r"^server\.cohort: got 3, but only 2 of 4 clients hold data in experience 1$"):
        prepare(tiny(*TWO, "partition.kind=natural", "data.client=label"))


def test_more_rounds_are_refused_on_a_resume(finished: rayfed.RunResult, tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(finished.out, tmp_path / "run")
    with pytest.raises(UserError, match=r"^server\.rounds: got 6, .*partition\.sequence\.experiences depends on"):
        rayfed.run(tiny(*TWO, "server.rounds=6"), tmp_path / "run", resume=True)


def test_evaluation_has_the_plain_loss(tiny: Any, tmp_path: Path) -> None:
    """With a base that does not move, smoothing shows in the training loss alone."""
    still = (*BASE, "server.rounds=1", "client.lr=1e-30")
    plain, smooth = (
        rayfed.run(tiny(*still, f"client.label_smoothing={share}"), tmp_path / share).metrics[0]
        for share in ("0.0", "0.5")
    )
    assert plain["eval/loss"] == pytest.approx(smooth["eval/loss"])
    assert plain["train/loss"] != pytest.approx(smooth["train/loss"])


def test_the_clients_loss_counts_the_classes_of_the_experience(tiny: Any, tmp_path: Path) -> None:
    """Smoothing spreads the target over the compared classes: untrained logits near 0 give log 2, not log 4."""
    loss = ("client.label_smoothing=0.3", "client.class_weights=balanced")
    run = rayfed.run(tiny(*TWO, "server.rounds=2", "client.lr=1e-30", *loss), tmp_path / "run")
    assert run.metrics[0]["train/loss"] < 1.1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_it_has_the_same_messages_bits_and_accuracies(tiny: Any, tmp_path: Path) -> None:
    settings = (*TWO, "engine.pack=2", "server.cohort=4")
    here = rayfed.run(tiny(*settings), tmp_path / "here")
    there = rayfed.run(tiny(*settings, "engine.kind=ray", "engine.workers=2"), tmp_path / "there")
    assert [record["state/chain"] for record in here.metrics] == [record["state/chain"] for record in there.metrics]
    assert here.summary["sequence/accuracies"] == there.summary["sequence/accuracies"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_measures_packs_of_the_first_experience(tiny: Any, tmp_path: Path) -> None:
    run = rayfed.run(tiny(*TWO, "engine.kind=ray", "engine.workers=1", "engine.pack=auto"), tmp_path / "run")
    assert (run.out / "pack.json").is_file()
