"""Fed-TaLoRA is a name of FedEx-LoRA: it works wherever a method is named, and a run has the same bits."""

from __future__ import annotations

from pathlib import Path

from small_runs import lowrank

import rayfed
from rayfed.cli.methods import describe, describe_all
from rayfed.methods import ALIASES, METHODS, build, method_class


def test_every_alias_is_of_a_method_and_no_method_is_one() -> None:
    assert set(ALIASES.values()) <= set(METHODS)
    assert not set(ALIASES) & set(METHODS)


def test_it_is_fedex_with_its_options() -> None:
    assert method_class("fed_talora") is method_class("fedex_lora")
    assert build("fed_talora", rank_cap=3) == build("fedex_lora", rank_cap=3)


def test_a_run_is_fedex_bit_for_bit_and_has_the_name_of_its_settings(tmp_path: Path) -> None:
    one, two = (
        rayfed.run(lowrank(f"method.name={name}", "method.rank_cap=1"), tmp_path / name)
        for name in ("fed_talora", "fedex_lora")
    )
    assert one.history["state/digest"].tolist() == two.history["state/digest"].tolist()
    assert rayfed.load_config(one.out / "config.yaml").method.name == "fed_talora"


def test_the_command_line_knows_both_names() -> None:
    assert "fed_talora another name of fedex_lora" in describe_all()
    assert describe("fed_talora").splitlines()[1:] == describe("fedex_lora").splitlines()[1:]
