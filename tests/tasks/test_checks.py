"""Settings that do not fit the task are refused in one line, before any data are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from small_runs import LOWRANK

import rayfed
from rayfed.errors import UserError


def refusal(tmp_path: Path, settings: dict, *overrides: str) -> str:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError) as error:
        rayfed.load_config(tmp_path / "config.yaml", overrides)
    return str(error.value)


TOO_MANY = "server.cohort: got 11, but the population has only {} clients (partition.clients)"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("server.cohort=11", "partition.clients=10"), TOO_MANY.format(10)),
        (
            ("partition.kind=natural",),
            "data.client: got null, but partition.kind=natural needs the column that names the client",
        ),
        (
            ("eval.early_stop={patience: 1}", "data.validation=0"),
            "data.validation: got 0, but eval.early_stop needs a validation split",
        ),
    ],
)
def test_text_classification(tmp_path: Path, overrides: tuple[str, ...], line: str) -> None:
    assert refusal(tmp_path, {}, *overrides) == line


def test_a_natural_population_has_as_many_clients_as_the_data_have_owners(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    settings = ["partition={kind: natural, clients: 3}", "data.client=owner", "server.cohort=50"]
    assert rayfed.load_config(tmp_path / "config.yaml", settings).server.cohort == 50


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "partition.kind=iid",
            "partition.kind: got 'iid', {} every client has rows of its own; allowed is natural",
        ),
        (
            "model.dtype=bfloat16",
            "model.dtype: got 'bfloat16', {} distances are finer than other formats; allowed is float32",
        ),
        (
            "engine.gradient_checkpointing=true",
            "engine.gradient_checkpointing: got true, {} the model is one layer; allowed is false",
        ),
        ("lora.train=head", "lora.train: got 'head', {} there is no head; allowed is all"),
        ("eval.controls=true", "eval.controls: got true, {} there is no head; allowed is false"),
        ("eval.clients=true", "eval.clients: got true, {} there are no classes; allowed is false"),
        ("eval.unseen=true", "eval.unseen: got true, {} the metrics are exact, without rows; allowed is false"),
        (
            "eval.early_stop={patience: 1}",
            "eval.early_stop: got {{'min_delta': 0.0, 'patience': 1}}, {} there are no validation data; allowed is null",  # noqa: E501
        ),
        ("server.cohort=11", TOO_MANY.format(6)),
    ],
)
def test_low_rank_regression(tmp_path: Path, override: str, line: str) -> None:
    assert refusal(tmp_path, LOWRANK, override) == line.format("but with data.source=lowrank")
