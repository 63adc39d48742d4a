"""Configs that are attacks or accidents: the command line refuses each in a moment, in few short lines."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.bad_configs import BadConfig, bad_configs, hand_written, hand_written_sweeps
from small_runs import LOWRANK, lowrank

import rayfed.api
from rayfed.cli import main
from rayfed.config import Experiment, dump_config, load_config, validate
from rayfed.config.describe import allowed_values, iter_fields
from rayfed.config.sweep import Sweep
from rayfed.errors import MOST_CHARACTERS, MOST_LINES, UserError, allowed

SECONDS = 3.0
ATTACKS = [*hand_written(), *hand_written_sweeps()]
# Reading 50 kilobytes of values takes half a second, and matching a model's layers loads PEFT.
QUICK = [config for config in ATTACKS if len(config.content) < 50_000 and config.name != "blocks of no model"]
Refused = Callable[[BadConfig], list[str]]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command in this process and returns the lines of the refusal. Nothing can be started."""

    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("the config was accepted")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rayfed.api.runs.run_here", started)
    for module in ("rayfed.engine.driver", "rayfed.engine.ray_executor", "rayfed.sweeps.on_tune"):
        monkeypatch.setitem(sys.modules, module, None)

    def refused(config: BadConfig) -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_bytes(config.content)
        start = time.monotonic()
        code = main([config.command, path.name, *config.overrides, "--out", "out"])
        seconds = time.monotonic() - start
        out, err = capsys.readouterr()
        check(config, code, out, err, seconds)
        assert list(tmp_path.iterdir()) == [path], config.name
        return [line.removeprefix("rayfed: ") for line in err.splitlines()]

    return refused


def check(config: BadConfig, code: int, out: str, err: str, seconds: float) -> None:
    lines = err.split("\n")[:-1]
    assert code == 2, (config.name, err)
    assert out == "" or (out.startswith("settings ") and out.count("\n") == 1), config.name
    assert 1 <= len(lines) <= MOST_LINES, config.name
    for line in lines:
        assert line.startswith("rayfed: "), config.name
        assert line.isprintable(), config.name
        assert len(line) <= MOST_CHARACTERS + len("rayfed: "), config.name
    if config.field:
        assert any(line.startswith(f"rayfed: {config.field}") for line in lines), (config.name, err)
    assert seconds < SECONDS, config.name


@pytest.mark.parametrize("config", QUICK, ids=lambda config: config.name[:60])
def test_attacks_are_refused(refused: Refused, config: BadConfig) -> None:
    refused(config)


@pytest.mark.slow
def test_500_bad_configs_are_refused(refused: Refused) -> None:
    rayfed.api.check(lowrank())  # loads the libraries, so that the first config does not wait for them
    configs = bad_configs(500)
    assert len(configs) == 500
    for config in configs:
        refused(config)


LIMITED = ("aliases that multiply", "100000 braces", "100000 tags", "merges that multiply", "sweep, a million samples")


@pytest.mark.slow
@pytest.mark.parametrize("config", [c for c in ATTACKS if c.name in LIMITED], ids=lambda config: config.name)
def test_attacks_are_refused_within_limits_of_memory_and_time(tmp_path: Path, config: BadConfig) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # libraries map gigabytes that they never use
        resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))

    (tmp_path / "config.yaml").write_bytes(config.content)
    command = [sys.executable, "-m", "rayfed", config.command, "config.yaml", "--out", "out"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=env, preexec_fn=limit, check=False
    )
    check(config, done.returncode, done.stdout, done.stderr, 0)
    assert os.listdir(tmp_path) == ["config.yaml"]


# What is no file


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(UserError, match=r"cannot be read as text \(it is a folder, a pipe or a device\)$"):
            load_config(path)
    for path in (tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(UserError, match=r"^config: got '[^\n\0]*cannot be read as text"):
            load_config(path)


def test_a_file_without_end_is_read_to_the_limit(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="it has more than 1000000 bytes"):
        load_config(tmp_path / "sparse")


def test_small_files_of_any_kind_are_fine(tmp_path: Path) -> None:
    for content in (b"", b"# nothing\n", b"---\n", b"\xef\xbb\xbfseed: 0\n", b"seed: 0\r\nclient:\r\n", b"{}", b"~"):
        (tmp_path / "config.yaml").write_bytes(content)
        assert load_config(tmp_path / "config.yaml") == Experiment()


def test_merged_sections_may_have_keys_of_their_own_wherever_they_stand(tmp_path: Path) -> None:
    text = """
server: {schedule: &slow {<<: &base {kind: linear, warmup: 1}, kind: cosine}}
client: {schedule: {<<: *slow, warmup: 3}}
"""
    (tmp_path / "config.yaml").write_text(text)
    experiment = load_config(tmp_path / "config.yaml")
    assert (experiment.server.schedule.kind, experiment.server.schedule.warmup) == ("cosine", 1)
    assert (experiment.client.schedule.kind, experiment.client.schedule.warmup) == ("cosine", 3)


# The schema


@pytest.mark.parametrize("root", [Experiment, Sweep])
def test_every_number_has_two_limits(root: type) -> None:
    unlimited = [
        name
        for name, field in iter_fields(root)
        if any(word in allowed_values(field) for word in ("integer", "number"))
        and not any(mark in allowed_values(field) for mark in ("[", "(0"))
    ]
    assert not unlimited


@pytest.mark.slow
def test_the_largest_settings_are_written_and_read(tmp_path: Path) -> None:
    experiment = validate(
        {
            "lora": {"rank": 100_000, "target_modules": ["é" * 60] * 200, "layers_to_transform": list(range(1000))},
            "profiles": {
                "kind": "tiers", "ranks": [100_000] * 10_000, "weights": [0.12345678901234567] * 10_000,
                "densities_down": [0.12345678901234567] * 10_000, "densities_up": [0.12345678901234567] * 10_000,
            },
            "tracking": {"tags": ["x" * 64] * 100},
        }
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump_config(experiment), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == experiment


def test_minus_zero_is_zero() -> None:
    plain = Experiment()
    minus = validate({"client": {"weight_decay": -0.0}, "data": {"validation": 0.1}, "lora": {"dropout": -0.0}})
    assert minus.digest() == plain.digest()


def test_a_known_answer_has_a_largest_size() -> None:
    settings = {**LOWRANK, "partition": {"kind": "natural", "clients": 1_190_476}}  # 84 numbers each
    assert validate(settings).partition.clients == 1_190_476
    settings["partition"]["clients"] += 1
    with pytest.raises(
        UserError, match=r"^partition.clients: got 1190477, but with 84 numbers each .* these are 100000"
    ):
        validate(settings)


# Messages


def test_a_message_cannot_reach_the_terminal_raw() -> None:
    line = str(UserError("run \x1b]0;x\x07\x9b31m a\x85b\u2028c\u202ed\x7f\ne"))
    assert line == "run \\x1b]0;x\\x07\\x9b31m a\\x85b\\u2028c\\u202ed\\x7f\ne"


def test_a_message_has_an_end() -> None:
    assert len(str(allowed("name", "\x1b" * 10**6, "it is short"))) < 400
    assert str(allowed("name", ["x"] * 10**5, "it is short")).endswith(", ...], but it is short")
    long = str(UserError("a" * 10**6 + "\x1b" * 10**6 + "the end"))
    assert len(long) <= MOST_CHARACTERS
    assert long.endswith("the end")
    lines = str(UserError("\n".join(map(str, range(1000))))).split("\n")
    assert len(lines) == MOST_LINES
    assert lines[-1] == "and 981 more mistakes"
