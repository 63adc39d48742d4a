"""Run directories made by hand: every number in them is one that a test chose."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rayfed import wire
from rayfed.config import dump_config, validate
from rayfed.config.load import _apply

Write = Callable[..., Path]


@pytest.fixture
def write_run(writer: Write, tmp_path: Path) -> Write:
    """`writer` in the test's own folder."""
    return partial(writer, folder=tmp_path)


@pytest.fixture(scope="session")
def writer() -> Write:
    """writer("a", "client.lr=0.1", eval=[...], test=[...]) -> its folder, with config, metrics and ledger.

    `eval` and `test` are accuracies by round (None: not evaluated); every round sends `down` and `up` bytes a client.
    More keyword arguments are further keys, a value a round.
    """

    def write(
        name: str,
        *overrides: str,
        eval: Sequence[float | None] = (0.5, 0.6),
        test: Sequence[float | None] | None = None,
        down: Sequence[int] | int = 1000,
        up: Sequence[int] | int = 500,
        finished: bool = True,
        more: Mapping[str, Sequence[Any]] | None = None,
        folder: Path,
    ) -> Path:
        folder = folder / name
        folder.mkdir(parents=True)
        settings: dict[str, Any] = {"server": {"rounds": len(eval) + (not finished), "cohort": 2}}
        for override in overrides:
            _apply(settings, override)
        (folder / "config.yaml").write_text(dump_config(validate(settings)))
        gap = settings.get("data", {}).get("source") == "lowrank"
        ledger = wire.Ledger()
        total, lines = 0, []
        for t, accuracy in enumerate(eval, 1):
            ways = {"down": down, "up": up}
            sent = {way: 2 * (size if isinstance(size, int) else size[t - 1]) for way, size in ways.items()}
            for way, size in sent.items():
                for client in (3, 7):
                    sizes = wire.Sizes(
                        n=90, count=size // 8, bytes_header=10, bytes_indices=20, bytes_values=size // 2 - 30
                    )
                    ledger.add_sizes(round=t, client=client, direction=way, sizes=sizes)
            total += sum(sent.values())
            line: dict[str, Any] = {"round": t, "train/loss": 1 / t, "bytes/down": sent["down"], "bytes/up": sent["up"]}
            line |= {"bytes/total": total, "params/down": sent["down"] // 4, "params/up": sent["up"] // 4}
            line |= {"clients/ok": 2, "time/round_s": 0.5}
            tested = accuracy if test is None else test[t - 1]
            line |= {"eval/gap": accuracy} if gap else {"eval/accuracy": accuracy, "test/accuracy": tested}
            line |= {key: values[t - 1] for key, values in (more or {}).items()}
            lines.append(json.dumps(line))
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        ledger.write(folder / "ledger.parquet")
        ends = ["finish: rounds"] if finished else []
        stamped = "".join(f"2026-11-01T00:00:00.000Z {event}\n" for event in ("start: name x", *ends))
        (folder / "events.log").write_text(stamped)
        return folder

    return write
