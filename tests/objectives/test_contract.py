"""What every objective promises: a file in rayfed/objectives/ is tested by being there."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest
import torch
from small_runs import LOWRANK, lowrank

from rayfed.api.plans import build_components
from rayfed.config import Experiment, validate
from rayfed.config.describe import in_words
from rayfed.config.marks import settings_digest
from rayfed.config.options import REQUIRED, options_of
from rayfed.errors import UserError
from rayfed.objectives import OBJECTIVES, Objective, Plain, RowContext, build
from rayfed.objectives.fedlc import FedLC
from rayfed.tasks.text_classification import TextClassification

NEEDED = {"tail_penalty": {"weight": 0.1, "start": 1}}
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def objective(name: str) -> Objective:
    return build(name, **NEEDED.get(name, {}))


def losses(found: Objective, order: torch.Tensor, clients: list[int]) -> torch.Tensor:
    """The losses of the rows in this order, of made logits; the slots are the places of the clients in the list."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 4, generator=draw), torch.tensor([0, 1, 1, 2, 3, 0, 3, 3, 3])
    owners = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    counts = torch.stack([torch.bincount(labels[owners == client], minlength=4).float() for client in clients])
    slots = torch.tensor([clients.index(owner) for owner in owners[order].tolist()])
    return found.rows(logits[order], labels[order], slots, RowContext(2 * counts, counts))


@every_objective
def test_it_is_plain_data(name: str) -> None:
    found = objective(name)
    assert pickle.loads(pickle.dumps(found)) == found == objective(name)
    assert hash(found) == hash(objective(name))
    assert found.replaces_loss + found.changes_gradient <= 1


@every_objective
def test_a_row_depends_on_its_own_client_alone(name: str) -> None:
    found = objective(name)
    if not found.replaces_loss:
        return
    together = losses(found, torch.arange(9), [0, 1, 2])
    assert together.shape == (9,)
    assert together.isfinite().all()
    order = torch.tensor([8, 5, 7, 6, 1, 0, 2])
    torch.testing.assert_close(losses(found, order, [2, 0]), together[order])


@every_objective
def test_a_client_at_its_start_is_not_pulled(name: str) -> None:
    found, values = objective(name), torch.randn(2, 5)
    if found.changes_gradient:
        assert not found.gradient(values, values.clone()).any()


def test_the_setting_names_every_objective() -> None:
    described = Experiment.model_fields["objective"].annotation.model_fields["name"].description
    assert [name for name in OBJECTIVES if f"`{name}`" not in described] == []


@every_objective
def test_its_page_has_its_source_and_every_option(name: str) -> None:
    module = inspect.getmodule(type(objective(name)))
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    for option, found in options_of(type(objective(name))).items():
        default = "required" if found.default is REQUIRED else f"default `{found.default}`"
        assert f"- `objective.{option}` ({default}): {in_words(found.annotation)}." in section
    if name != "plain":
        assert f"arXiv {module.__doc__.split('arXiv ')[1][:10]}" in section


def test_the_default_is_plain_and_changes_no_digest() -> None:
    experiment = lowrank()
    assert build_components(experiment).objective == Plain()
    settings = experiment.model_dump(mode="json")
    assert settings["objective"] == {"name": "plain"}
    without = {key: value for key, value in settings.items() if key != "objective"}
    assert settings_digest(without) == experiment.digest() != lowrank("objective.name=fedprox").digest()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "fedprx"}, "objective.name: got 'fedprx', but did you mean fedprox?"),
        ({"name": "fedprox", "mu": -1.0}, "objective.mu: got -1.0, but it should be a number in [0, 1e+30]"),
        ({"name": "fedprox", "mu": 1e31}, "objective.mu: got 1e+31, but"),
        ({"name": "fedprox", "tau": 1.0}, "objective.tau: fedprox has no such option; allowed are mu"),
        ({"name": "fedlc", "denominator": "true"}, "objective.denominator: got 'true', but it should be all or others"),
        ({"name": "fedga", "counts": "rows"}, "objective.counts: got 'rows', but it should be batch or client"),
        ({"name": "tail_penalty", "weight": 0.1}, "objective.start: tail_penalty needs this option"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as refused:
        build_components(validate({"objective": options}))
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


NOT_ONE_CLASS = "but its loss takes the place of the cross-entropy of one class a row"


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if objective(name).replaces_loss])
@pytest.mark.parametrize(
    "data",
    [
        *(
            {"task": task, "source": "files", "path": "rows", "client": "owner"}
            for task in ("multi_label", "regression", "image_multi_label")
        ),
        {"source": "lowrank"},
    ],
    ids=lambda data: data.get("task", "lowrank"),
)
def test_a_loss_of_classes_is_refused_where_a_row_has_no_class(name: str, data: dict[str, object]) -> None:
    settings = {**LOWRANK, "data": data, "objective": {"name": name}}
    with pytest.raises(UserError, match=f"objective.name: got '{name}', {NOT_ONE_CLASS}"):
        build_components(validate(settings))


def test_a_loss_of_ones_own_is_not_replaced() -> None:
    def own(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.sum(1)

    experiment = validate({"objective": {"name": "fedlc"}})
    sections = (experiment.data, experiment.partition, experiment.model, 0)
    assert build_components(experiment, TextClassification(*sections)).objective == FedLC()
    with pytest.raises(UserError, match=NOT_ONE_CLASS):
        build_components(experiment, TextClassification(*sections, loss_fn=own))


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"train": "head"}, "objective.name: got 'tail_penalty', but it penalises ranks"),
        ({"rank": 1}, "objective.start: got 1, but lora.rank=1"),
    ],
)
def test_a_tail_that_does_not_train_is_refused(lora: dict[str, object], says: str) -> None:
    tail = {"name": "tail_penalty", "weight": 0.1, "start": 1}
    assert build_components(validate({"objective": tail})).objective == objective("tail_penalty")
    with pytest.raises(UserError) as refused:
        build_components(validate({"objective": tail, "lora": lora}))
    assert str(refused.value).startswith(says)
