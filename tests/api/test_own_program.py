"""A program of under 25 lines with own rows, method, metric and callback: the same bits in process and on Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rayfed
from rayfed.config import dump_config

PACKAGE = Path(rayfed.__file__).parents[1]
PROGRAM = """
import sys
from datasets import Dataset
import rayfed
from rayfed.methods.fedit import FedIT

class HalfSteps(FedIT):
    def aggregate(self, state, updates, advance):
        moved = super().aggregate(state, updates, advance)
        return moved.next(vector=(state.vector + moved.vector) / 2)

class StopAfterTwo(rayfed.Callback):
    def on_round(self, record):
        return record["round"] < 2

def error(predicted, labels):
    return (predicted != labels).float().mean()

rows = Dataset.from_json(sys.argv[1])
task = rayfed.TextClassification(train=rows, metric_fns={"error": error})
settings = rayfed.load_config(sys.argv[2])
for kind in "local", "ray":
    own = {"task": task, "method": HalfSteps(), "callbacks": [StopAfterTwo()]}
    result = rayfed.run(settings.with_({"engine.kind": kind}), **own)
    print(list(result.history["state/digest"]), list(result.history["test/error"]), result.rounds)
"""


@pytest.mark.slow  # most of it is the start of Ray
def test_a_short_program_on_two_workers(tmp_path: Path, tiny, tiny_data: Path) -> None:
    assert len(PROGRAM.strip().splitlines()) < 25
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "config.yaml").write_text(dump_config(tiny("server.rounds=4", "engine.workers=2")))
    command = [sys.executable, "program.py", str(tiny_data / "train.jsonl"), "config.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    here, there = done.stdout.splitlines()
    assert here == there
    assert here.endswith(" 2")
