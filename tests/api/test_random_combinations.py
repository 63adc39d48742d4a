"""The axes combine freely: a random combination is refused in words, or its run survives an interruption to the bit."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from small_runs import assert_same_run, lowrank

import rayfed
from rayfed.api import prepare
from rayfed.errors import UserError
from rayfed.plugins import member_names

METHODS = member_names("rayfed.methods")
OBJECTIVES = [f"objective.name={name}" for name in member_names("rayfed.objectives") if name != "tail_penalty"]
CHOICES: dict[str, list[str]] = {  # one line an axis, one text a choice; a comma separates several settings
    "up": [f"wire.up.density={d}, wire.up.values={v}" for d in (0.01, 0.25, 1) for v in ("fp32", "bf16", "qsgd4")],
    "down": [f"wire.down.density={d}, wire.down.values={v}" for d in (0.1, 1) for v in ("fp32", "int8", "qsgd3")],
    "ranks": ["profiles.kind=uniform", "profiles.kind=uniform, profiles.scale=server", "profiles.kind=normal"],
    "optimizer": ["client.optimizer=adamw", "client.momentum=0.9", "client.clip_norm=1"],
    "steps": ["client.steps=1", "client.steps=3", "client.batch_size=1"],
    "server": [f"server.optimizer={name}" for name in ("sgd", "fedavgm", "fedadam", "adamw")],
    "weights": [f"server.weights={name}" for name in ("uniform", "examples", "norm", "bound", "chebyshev")],
    "cohort": ["server.sampling=poisson", "server.cohort=1", "server.cohort=6"],
    "channel": ["channel.kind=over_the_air, channel.snr=10"],
    "topology": ["topology.kind=graph, topology.algorithm=depositum, client.steps=2", "topology.kind=graph"],
    "privacy": [
        f"privacy.kind={kind}, privacy.noise_multiplier=0.5, client.on_divergence=drop"
        for kind in ("user", "local", "example")
    ],
    "lora": ["lora.dropout=0.1", "lora.rslora=true", "lora.rank=1"],
    "engine": ["engine.pack=1", "engine.pack=2", "engine.gradient_checkpointing=true"],
    "eval": [f"eval.{what}" for what in ("every=2", "clients=true", "diagnostics=true", "masked=true", "tiers=true")],
    "checkpoint": ["checkpoint.every=2"],
}
OF_TEXTS: dict[str, list[str]] = {
    "partition": [
        "partition.kind=pathological, partition.classes=1",
        "partition.kind=natural, data.client=owner",
        "partition.alpha=0.001",
        "partition.sequence.experiences=2",
    ],
    "model": ["model.head=frozen", "model.dtype=bfloat16", "model.pooling=stock"],
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2 * len(METHODS)))
@pytest.mark.parametrize("task", ["lowrank", "tiny"])
def test_a_combination_is_refused_in_words_or_survives_an_interruption(
    task: str, seed: int, tiny: Any, tmp_path: Path
) -> None:
    draw, make = random.Random(f"{task} {seed}"), lowrank if task == "lowrank" else tiny
    choices = CHOICES if task == "lowrank" else CHOICES | OF_TEXTS
    method = METHODS[seed // 2] if seed % 2 else "flasc"  # most objectives go with flasc, and few with other methods
    settings = ["server.rounds=4", f"seed={seed}", f"method.name={method}", "client.momentum=0"]
    for choice in draw.choice(OBJECTIVES), *(draw.choice(choices[axis]) for axis in draw.sample([*choices], 6)):
        try:
            prepare(make(*settings, *choice.split(", ")))
            settings += choice.split(", ")
        except UserError as refusal:
            for line in str(refusal).splitlines():
                assert re.match(r"[a-z]+(\.[a-z_]+)*: \S", line), line

    experiment, stop = make(*settings), draw.randint(1, 3)
    rayfed.run(experiment, tmp_path / "whole")
    with rayfed.iter_rounds(experiment, tmp_path / "cut") as rounds:
        for record in rounds:
            if record["round"] == stop:
                break
    rayfed.run(experiment, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
