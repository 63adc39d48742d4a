"""Suggestions come for slips of the keys, and never for another word that only looks alike."""

from __future__ import annotations

import pytest

from rayfed.config import Experiment
from rayfed.config.describe import iter_fields
from rayfed.config.shipped import shipped
from rayfed.methods import METHODS
from rayfed.suggestions import did_you_mean, nearest, slips

COMMANDS = ("init", "run", "sweep", "submit", "doctor", "data", "bench", "verify", "report", "compare", "settings")
VALUES = ("fp32", "fp16", "bf16", "int8", "sgd", "adamw")
KEYS = tuple(name for name, _ in iter_fields(Experiment))


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("swep", COMMANDS, "sweep"),
        ("docter", COMMANDS, "doctor"),
        ("comapre", COMMANDS, "compare"),
        ("rn", COMMANDS, "run"),
        ("FedHL", METHODS, "fedhl"),
        ("flask", METHODS, "flasc"),
        ("ffa-lora", METHODS, "ffa_lora"),
        ("lora_a3", METHODS, None),
        ("fedavg", METHODS, None),
        ("SDG", VALUES, "sgd"),
        ("adam", VALUES, "adamw"),
        ("fp61", VALUES, None),
        ("fp64", VALUES, None),
        ("int4", VALUES, None),
        ("float16", VALUES, None),
        ("lars", VALUES, None),
        ("quikstrat", shipped(), "quickstart"),
        ("mnist", shipped(), None),
        ("wire.up.densty", KEYS, "wire.up.density"),
        ("client.batchsize", KEYS, "client.batch_size"),
        ("learning_rate", KEYS, None),
        ("", COMMANDS, None),
        ("x" * 1_000_000, COMMANDS, None),
    ],
)
def test_only_near_words_are_suggested(word: str, known: tuple[str, ...], meant: str | None) -> None:
    assert nearest(word, known) == meant
    assert did_you_mean(word, known) == (f"did you mean {meant}? " if meant else "")


@pytest.mark.parametrize(
    ("word", "other", "count"),
    [("", "", 0), ("", "ab", 2), ("rate", "rate", 0), ("rate", "raet", 1), ("rate", "ate", 1), ("abcd", "badc", 2)],
)
def test_slips_count_what_is_added_left_out_replaced_or_swapped(word: str, other: str, count: int) -> None:
    assert slips(word, other) == slips(other, word) == count


def test_of_several_near_words_the_nearest_is_suggested_and_of_equal_ones_the_first() -> None:
    assert nearest("rounds", ("round", "rounds_sparse", "rounds")) == "rounds"
    assert nearest("rat", ("bat", "cat")) == "bat"
