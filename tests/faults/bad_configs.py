"""Configs that `rayfed` must refuse: attacks written by hand, and a seeded choice of wrong values of every setting.

A wrong value stands alone in an otherwise valid config of the problem with a known answer, so a config that is accepted
by mistake would train for a moment only. Values are YAML as a user types it. What is useless but valid (a learning rate
of 1e-20, a million rounds less one) is not here.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from small_runs import LOWRANK

from rayfed.config import Experiment
from rayfed.config.describe import iter_fields, sections_by_kind, sections_of
from rayfed.config.sweep import Sweep

HUGE = "x" * 5000
BIG = "1" + "0" * 400
ESCAPES = r'"a\e[2J\e]0;title\ab"'


@dataclass(frozen=True)
class BadConfig:
    """A file and overrides for a command. ``name`` says what is wrong, ``field`` which setting the refusal names."""

    name: str
    content: bytes
    overrides: tuple[str, ...] = ()
    command: Literal["run", "sweep"] = "run"
    field: str = ""


class Raw(str):
    """A value as it is written in YAML."""


def bad_configs(count: int = 500, seed: int = 0) -> list[BadConfig]:
    """All attacks, and as many wrong values of single settings, drawn by ``seed``, as make ``count``."""
    attacks = [*hand_written(), *hand_written_sweeps()]
    wrong = [*wrong_settings()]
    return attacks + random.Random(seed).sample(wrong, count - len(attacks))


# Attacks


def hand_written() -> Iterator[BadConfig]:
    """Files and overrides for `rayfed run`."""
    for name, text in {
        "aliases that multiply": _bomb("[{}]"),
        "mappings that multiply": "a0: &a0 {x: 1}\n"
        + "\n".join(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}" for i in range(1, 10)),
        "merges that multiply": "a0: &a0 {x: 1}\n"
        + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)),
        "aliases that multiply, in a setting": _bomb("[{}]", last="name"),
        "an alias to itself": "name: &a [*a]",
        "a mapping that merges itself": "client: &a {<<: *a}",
        "100000 brackets": "[" * 100_000,
        "100000 braces": "{a: " * 100_000,
        "100000 dashes": "- " * 100_000,
        "100 sections within each other": "".join(f"{' ' * i}a:\n" for i in range(100)),
        "100000 unknown keys": "\n".join(f"k{i}: 1" for i in range(100_000)),
        "5000 unknown keys": "\n".join(f"k{i}: 1" for i in range(5000)),
        "100000 tags": f"tracking: {{tags: [{', '.join(['a'] * 100_000)}]}}",
        "40000 tags": f"tracking: {{tags: [{', '.join(['a'] * 40_000)}]}}",
        "two megabytes of comments": "# comment\n" * 200_000,
        "900 kilobytes of blanks, then a mistake": " " * 900_000 + "\nseed: -1",
        "a name of 900 kilobytes": "name: " + "x" * 900_000,
        "a key of 900 kilobytes": '? "' + "k" * 900_000 + '"\n: 1',
        "a long key with escapes": '? "' + r"\e[31m" * 1000 + '"\n: 1',
        "an escape in a key": r'"a\e[31m": 1',
        "a NUL in a key": r'"a\0b": 1',
        "an integer of 5000 digits": "seed: " + "9" * 5000,
        "an integer of 4000 digits": "seed: " + "9" * 4000,
        "a Python object": "name: !!python/object/apply:os.system [exit]",
        "a Python tuple": "name: !!python/tuple [1]",
        "a tag with an escape": "name: !%1b%5b31m x",
        "a binary value": "name: !!binary aGk=",
        "an unknown alias": "name: *" + "a" * 300,
        "a key twice": "seed: 1\nclient:\n  lr: 1\nseed: 2",
        "a key twice, far apart": "seed: 1\n" + "# comment\n" * 1000 + "seed: 2",
        "a list as a key": "? [a, b]\n: 1",
        "a mapping as a key": "{{a: 1}: 2}",
        "a number as a key": "1: 2",
        "null as a key": "null: 2",
        "true as a key": "client: {true: 1}",
        "a number as an option of the method": "method: {1: 2}",
        "a tab as indentation": "client:\n\tlr: 1",
        "a list": "- seed: 1",
        "a word": "hello",
        "a number": "3",
        "two documents": "seed: 1\n---\nseed: 2",
        "a control character": "name: a\x07b",
        "a NUL": "name: a\x00b",
        "a lone surrogate": r'name: "\ud800"',
        "a change of the writing direction in a name": r'name: "run\u202egpj.exe"',
        "a line end of Unicode in a name": r'name: "a\u2028b"',
        "no end of a string": 'name: "abc',
        "a section of options that is nonsense": "method: {name: flasc, "
        + ", ".join(f"o{i}: 1" for i in range(999))
        + "}",
        "a method's option that is nested": "method: {name: fedhl, gamma: " + "[" * 20 + "]" * 20 + "}",
        "an option beyond float32": "method: {name: fedhl, gamma: 1e300}",
        "an option of 400 digits": f"method: {{name: fedhl, gamma: {BIG}}}",
        "clients whose data fit nowhere": (
            "data: {source: lowrank}\npartition: {kind: natural, clients: 10000000}\n"
            "problem: {outputs: 10000, inputs: 10000, rows: 1000000}"
        ),
        "a known answer that float32 cannot hold": _with(LOWRANK, "problem.condition", "1e300"),
        "ranks for 20000 clients": f"profiles: {{kind: list, ranks: [{', '.join(['2'] * 20_000)}]}}",
        "two GPUs for one worker": "engine: {gpus_per_worker: 2}",
        "blocks of no model": _with(LOWRANK, "lora.layers_to_transform", "[3, 99]"),
        "a section sweep in a run": "sweep: {parameters: {seed: {grid: [1, 2]}}}",
    }.items():
        yield BadConfig(name, text.encode())
    for name, content in {
        "random bytes": random.Random(0).randbytes(5000),
        "a program": b"\x7fELF\x02\x01\x01" + bytes(300),
        "zeros": bytes(100_000),
        "UTF-16": "seed: 1".encode("utf-16"),
        "UTF-16 without a mark": "seed: 1".encode("utf-16-le"),
        "UTF-32": "seed: 1".encode("utf-32"),
        "Latin-1": "name: Zo\xeb".encode("latin-1"),
        "half a character": "name: é".encode()[:-1],
    }.items():
        yield BadConfig(name, content)
    for override in (
        "",
        "seed",
        "=1",
        "a..b=1",
        "seed=" + "9" * 5000,
        "name=" + HUGE,
        "name=" + ESCAPES,
        "\x1b[31m=1",
        "\x1b[31m",
        "client.lr=\x1b[31m",
        "k" * 100_000 + "=1",
        ".".join(["a"] * 50_000) + "=1",
        "method." + ".".join(["a"] * 50) + "=1",
        "seed=" + "[" * 50_000,
        "seed={a: 1, a: 2}",
        "seed=!!python/name:os.system",
        "seed=&a [*a]",
        "client.lr.x=1",
        "client=3",
    ):
        yield BadConfig(f"override {override[:40]!r}", _with(LOWRANK).encode(), (override,))
    yield BadConfig("500 overrides", b"", tuple(f"k{i}=1" for i in range(500)))


def hand_written_sweeps() -> Iterator[BadConfig]:
    """Files for `rayfed sweep`."""
    grid = "{client.lr: {grid: [0.1, 0.2]}}"
    drawn = "{client.lr: {uniform: [0.1, 0.2]}}"
    case = "{client.lr: 0.1, client.momentum: {uniform: [0, 0.5]}}"
    many = _numbers(0, 1000)
    optuna = "search: {kind: optuna, trials: 3}"
    for name, text in {
        "a million samples": f"samples: 1000000, parameters: {drawn}",
        "a million points": f"parameters: {{client.lr: {{grid: [{many}]}}, seed: {{grid: [{many}]}}}}",
        "too many points by samples": "samples: 5000, parameters: {client.lr: {uniform: [0, 1]}, seed: {grid: [0, 1]}}",
        "too many points by cases": f"parameters: {{seed: {{grid: [{many}]}}}}, cases: [{', '.join(['{a: 1}'] * 6)}]",
        "6000 seeds": f"parameters: {{seed: {{grid: [{_numbers(0, 6000)}]}}}}",
        "101 settings": "parameters: {" + ", ".join(f"client.k{i}: {{grid: [1]}}" for i in range(101)) + "}",
        "a case of 101 settings": "cases: [{" + ", ".join(f"client.k{i}: 1" for i in range(101)) + "}]",
        "5000 cases that are words": f"cases: [{', '.join(['x'] * 5000)}]",
        "a number as a setting": "parameters: {1: {grid: [1, 2]}}",
        "null as a setting": "parameters: {null: {grid: [1, 2]}}",
        "a number as a setting of a case": "cases: [{1: 2}]",
        "a setting of 1000 parts": "parameters: {" + ".".join("a" * 1000) + ": {grid: [1, 2]}}",
        "an empty setting": 'parameters: {"": {grid: [1, 2]}}',
        "an escape in a setting": r'parameters: {"a\e[31m": {grid: [1, 2]}}',
        "an escape in a case's label": r'cases: {"a\e[31m": {client.lr: 1}}',
        "a label of 300 characters": f"cases: {{{'x' * 300}: {{client.lr: 1}}}}",
        "an escape in a value": f"parameters: {{name: {{grid: [{ESCAPES}, b]}}}}",
        "a seed that is no space": "parameters: {seed: 3}, tune: [client.lr], tune_seeds: 2",
        "a seed's grid that is no list": "parameters: {seed: {grid: 5}}, tune: [client.lr], tune_seeds: 2",
        "a range beyond float": "parameters: {client.lr: {uniform: [-1e308, 1e308]}}",
        "a range of integers beyond float": f"parameters: {{client.lr: {{uniform: [1, {BIG}]}}}}",
        "a range from nearly 0": "parameters: {client.lr: {loguniform: [1e-320, 1e308]}}",
        "a range that is not a number": "parameters: {client.lr: {uniform: [.nan, 1]}}",
        "a range of one": "parameters: {client.lr: {uniform: [1]}}",
        "a range of words": "parameters: {client.lr: {uniform: [a, b]}}",
        "a range backwards": "parameters: {client.lr: {uniform: [2, 1]}}",
        "a nested space": "parameters: {client.lr: {grid: [{grid: [1, 2]}]}}",
        "values that all trials refuse": f"parameters: {{client.lr: {{grid: [{_numbers(-1500, 0)}]}}}}",
        "a metric with an escape": f"metric: {ESCAPES}, parameters: {grid}",
        "optuna with 6000 choices": f"{optuna}, parameters: {{client.lr: {{choice: [{_numbers(1, 6000)}]}}}}",
        "optuna with 3000 cases": f"{optuna}, cases: [{', '.join([case] * 3000)}]",
        "optuna with 10^9 trials": f"search: {{kind: optuna, trials: 1000000000}}, parameters: {drawn}",
        "a population of 10^9": f"search: {{kind: pbt, rounds: 1, population: 1000000000}}, parameters: {drawn}",
        "a search of rank 10^9": "search: {kind: flasc, rounds: 1, max_rank: 1000000000}",
        "a search without end": "search: {kind: flasc, rounds: 1, factor: 1}",
    }.items():
        sweep = "{metric: eval/gap, mode: min, " + text + "}" if "metric:" not in text else "{" + text + "}"
        yield BadConfig(f"sweep, {name}", _with(LOWRANK, "sweep", sweep).encode(), command="sweep")
    for name, override in {
        "a tracking section that is a word": "tracking=abc",
        "a name with an escape": f"name={ESCAPES}",
        "a name of 300 characters": "name=" + "x" * 300,
        "a seed that is a word": "seed=abc",
        "a section that is a list": "client=[1]",
        "a sweep that is a list": "sweep=[1]",
        "parameters that are a list": "sweep.parameters=[1]",
    }.items():
        text = _with(LOWRANK, "sweep", "{metric: eval/gap, mode: min, parameters: {server.lr: {grid: [0.1, 0.2]}}}")
        yield BadConfig(f"sweep, {name}", text.encode(), (override,), "sweep")


def _numbers(low: int, high: int) -> str:
    return ", ".join(map(str, range(low, high)))


def _bomb(form: str, last: str = "a9") -> str:
    """Each of nine levels repeats the level before nine times: nine to the ninth words in 500 bytes."""
    levels = [f"a{i}: &a{i} {form.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 9)]
    return "\n".join(["a0: &a0 [x, x]", *levels, f"{last}: {form.format(', '.join(['*a8'] * 9))}"])


# Wrong values of every setting

NUMBERS = ("-1", "1" + "0" * 20, "-1" + "0" * 20, BIG)  # for integers
REALS = ("-1", "1e300", "-1e300", BIG, ".nan", ".inf", "-.inf", "1e400")
VALID = {("partition.alpha", "1e300")}
TEXTS = (r'"a\0b"', ESCAPES, r'"a\nb"', r'"a\rb"', r'"a\u202eb"', f'"{HUGE}"')
OTHERS = {  # what is none of the types: YAML by the type that it has
    bool: ("true",),
    int: ("3",),
    float: ("2.5", "1e-320"),
    str: ('"3"', "nonsense", f'"{HUGE}"', ESCAPES),
    tuple: ("[]", "[3]", f"[{', '.join(['[x]'] * 300)}]", "[.nan, null, {a: [b]}]"),
    dict: ("{}", "{a: 1}", "{1: {2: [3]}}"),
    type(None): ("null",),
}


def wrong_settings() -> Iterator[BadConfig]:
    """Every setting of a run and of a sweep, with each value that it cannot have."""
    with_stop = _set(LOWRANK, "eval.early_stop", {"patience": 3})
    for name, field in iter_fields(Experiment):
        base = with_stop if name.startswith("eval.early_stop.") else LOWRANK
        for value in wrong_values(name, field):
            yield BadConfig(f"{name}={value[:40]}", _with(base, name, value).encode(), field=name)
    for section in Experiment.model_fields:
        for value in ("3", "true", "word", "[1]", "{1: 2}", f"{{{'k' * 300}: 1}}"):
            if section not in ("name", "seed"):
                yield BadConfig(f"{section}={value[:40]}", _with(LOWRANK, section, value).encode(), field=section)
    for name, field, sweep in _sweep_fields():
        for value in wrong_values(name, field):
            text = _with(_set(LOWRANK, "sweep", sweep), name, value)
            yield BadConfig(f"{name}={value[:40]}", text.encode(), command="sweep", field=name)


def wrong_values(name: str, field: FieldInfo) -> Iterator[str]:
    """YAML of values that the setting cannot have."""
    kinds, choices = _kinds(field.annotation), _choices(field.annotation)
    allowed = kinds | ({int} if float in kinds else set())  # an integer stands for a number
    for kind, values in OTHERS.items():
        if kind not in allowed:
            yield from (value for value in values if not (kind is str and choices & {value}))
    if float in kinds:
        yield from (value for value in REALS if (name, value) not in VALID)
    elif int in kinds:
        yield from (value for value in NUMBERS if (name, value) not in VALID)
    if str in kinds:
        yield from TEXTS
    if tuple in kinds:
        yield from ("[null]", "[[]]", "[.nan]", "[{a: b}]", f"[{', '.join(['1'] * 20_001)}]")


def _sweep_fields() -> Iterator[tuple[str, FieldInfo, Any]]:
    """(dotted name, field, a valid section `sweep`) of the settings of a sweep."""
    drawn = {"client.lr": {"uniform": [0.1, 0.2]}}
    grid: dict[str, Any] = {"metric": "eval/gap", "mode": "min", "parameters": {"client.lr": {"grid": [0.1, 0.2]}}}
    plain = {name: field for name, field in iter_fields(Sweep) if "." not in name}
    yield from ((f"sweep.{name}", field, grid) for name, field in plain.items() if name not in ("parameters", "cases"))
    searches = {"optuna": {"trials": 3}, "pbt": {"rounds": 2}, "flasc": {"rounds": 1, "max_rank": 4}}
    for kind, section in sections_by_kind(Sweep.model_fields["search"]).items():
        sweep = grid | {"search": {"kind": kind, **searches[kind]}, "parameters": {} if kind == "flasc" else drawn}
        yield from ((f"sweep.search.{name}", field, sweep) for name, field in section.model_fields.items())
    (asha,) = sections_of(Sweep.model_fields["stop"])
    sweep = grid | {"stop": {"kind": "asha", "grace": 1}}
    yield from ((f"sweep.stop.{name}", field, sweep) for name, field in asha.model_fields.items())


def _kinds(kind: Any) -> set[type]:
    """The types of value that an annotation allows."""
    if get_origin(kind) is tuple:
        return {tuple}
    if get_origin(kind) is Literal:
        return set()  # the choices alone
    if inside := [part for part in get_args(kind) if isinstance(part, type) or get_origin(part) is not None]:
        return set().union(*map(_kinds, inside))
    return {kind if isinstance(kind, type) and kind in OTHERS else dict}


def _choices(kind: Any) -> set[str]:
    if get_origin(kind) is Literal:
        return {str(choice) for choice in get_args(kind)}
    return set().union(*map(_choices, get_args(kind)))


def _set(settings: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of the settings with another value of one of them."""
    changed = copy.deepcopy(dict(settings))
    *sections, last = name.split(".")
    inner = changed
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    return changed


def _with(settings: Mapping[str, Any], name: str | None = None, value: str = "") -> str:
    """The settings in YAML, one of them as it is written."""
    return _write(_set(settings, name, Raw(value)) if name else settings)


def _write(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_write(inner)}" for key, inner in value.items()) + "}"
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("\n...\n").strip()
