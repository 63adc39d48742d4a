"""The marks of the settings: compared with lists written here by hand, and with the digests that follow from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from changed_settings import FIELDS, FULL, changed

from rayfed.config import validate
from rayfed.config.marks import data_key, decides, differences, live, model_key, searched, settings_digest
from rayfed.config.types import Decides

NOTHING = {
    "name", "engine.kind", "engine.workers", "engine.cpus_per_worker", "engine.gpus_per_worker",
    "engine.gradient_checkpointing", "engine.placement", "engine.wait_for_nodes", "engine.address", "engine.retries",
    "client.on_divergence", "eval.subset", "model.adapter",
    "engine.deadline", "engine.stall_s", "engine.memory_per_worker", "engine.labels", "engine.dashboard",
}  # fmt: skip
NOTHING_SECTIONS = {"pretrain", "tracking", "checkpoint", "export"}
DATA_SECTIONS = {"seed", "data", "problem", "partition", "model"}
MODEL_SECTIONS = {"data", "problem", "model", "lora"}
# Not decided by the setting, but checked against it, so that they are in the key.
CHECKED_WITH_DATA = {"server.cohort", "server.empty_clients"}
CHECKED_WITH_MODEL = {"engine.gradient_checkpointing"}


def settings(name: str | None = None) -> dict[str, Any]:
    """Plain values of all settings, with another value of the named one."""
    return (changed(name) if name else FULL).model_dump(mode="json")


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_marked_as_the_lists_say(name: str) -> None:
    top = name.split(".")[0]
    expected: set[str] = set()
    if name not in NOTHING and top not in NOTHING_SECTIONS:
        expected |= {"data"} if top in DATA_SECTIONS and name != "model.adapter_digest" else set()
        expected |= {"model"} if top in MODEL_SECTIONS or name == "engine.padding" else set()
        expected = expected or {"result"}
    assert set(decides(name)) == expected
    assert sum(isinstance(mark, Decides) for mark in FIELDS[name].metadata) <= 1


@pytest.mark.parametrize("name", FIELDS)
def test_a_digest_changes_with_the_settings_that_decide_it_and_with_no_other(name: str) -> None:
    marks, before, after = set(decides(name)), settings(), settings(name)
    assert (settings_digest(before) != settings_digest(after)) == bool(marks)
    assert (data_key(before) != data_key(after)) == ("data" in marks or name in CHECKED_WITH_DATA)
    assert (model_key(before) != model_key(after)) == ("model" in marks or name in CHECKED_WITH_MODEL)


def test_an_early_stop_needs_validation_data_whatever_its_patience() -> None:
    without = validate({}).model_dump(mode="json")
    assert data_key(without) != data_key(settings()) == data_key(settings("eval.early_stop.patience"))
    assert (
        settings_digest(without) != settings_digest(settings()) != settings_digest(settings("eval.early_stop.patience"))
    )


def test_what_the_schema_lacks_has_the_mark_of_its_section() -> None:
    assert decides("method.mask") == decides("engine.of_an_older_version") == decides("older") == ("result",)
    assert decides("tracking.of_an_older_version") == ()
    assert decides("eval.early_stop") == ("result",)


@pytest.mark.parametrize("options", [{"strange": {}}, {"strange": {"a": {}}}, {"strange": {"a": [1], "b": None}}])
def test_every_option_of_a_method_counts_in_the_digest(options: dict[str, Any]) -> None:
    with_options = validate({"method": {"name": "flasc", **options}})
    assert with_options.digest() != validate({"method": {"name": "flasc"}}).digest()
    again = {"method": {**options, "name": "flasc"}, "tracking": {"wandb": "off"}}
    assert with_options.digest() == validate(again).digest()


def test_settings_that_may_change_between_two_rounds() -> None:
    assert live() == (
        "lora.dropout", "wire.down.density", "wire.up.density", "client.lr", "client.momentum", "client.eps",
        "client.weight_decay", "client.clip_norm", "client.batch_size", "client.epochs", "client.steps",
        "client.max_change", "server.lr", "server.momentum", "server.weight_decay",
    )  # fmt: skip


def test_settings_that_a_search_of_rank_and_density_sets() -> None:
    assert searched() == ("lora.rank", "wire.down.density", "wire.up.density")


def test_differences_name_the_settings_that_decide_something() -> None:
    before = settings()
    now = copy.deepcopy(before)
    now["engine"]["workers"] = 7  # decides nothing
    assert differences(before, now) == ""
    now["server"]["rounds"] = 77
    now["method"]["extra"] = "dense"
    first = f"server.rounds was {before['server']['rounds']} and is 77, "
    assert differences(before, now) == f"{first}method.extra was not given and is 'dense'"
    assert differences(before, now, most=1) == f"{first}and 1 more"
