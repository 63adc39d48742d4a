"""Offline runs of W&B, read back from the files that `wandb sync` would send."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def blocks(data: bytes) -> Iterator[bytes]:
    """The messages in a `.wandb` file: a LevelDB log, blocks of 32 KiB, records that may be split over blocks."""
    assert data[:4] == b":W&B"
    at, message = 7, b""
    while at < len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


def read_run(folder: Path) -> dict[str, Any]:
    """One folder's run: history without the clock, summary, config, what `define_metric` said, artifacts, exit code."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    (file,) = folder.glob("run-*.wandb")
    run: dict[str, Any] = {"history": [], "summary": {}, "config": {}, "metrics": {}, "best": {}, "artifacts": {}}
    for data in blocks(file.read_bytes()):
        message = Message()
        message.ParseFromString(data)
        kind = message.WhichOneof("record_type")
        if kind == "history":
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in message.history.item}
            run["history"].append({key: value for key, value in row.items() if key not in ("_runtime", "_timestamp")})
        elif kind == "summary":
            run["summary"] |= {
                i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in message.summary.update
            }
        elif kind == "run":
            run["id"], run["name"], run["group"] = message.run.run_id, message.run.display_name, message.run.run_group
            run["project"], run["tags"] = message.run.project, list(message.run.tags)
            run["job_type"] = message.run.job_type
            run["config"] |= {i.key: json.loads(i.value_json) for i in message.run.config.update}
        elif kind == "metric":
            name = message.metric.name or message.metric.glob_name
            run["metrics"][name] = message.metric.step_metric
            ways = [way for way in ("max", "min") if getattr(message.metric.summary, way)]
            run["best"] |= dict.fromkeys([name] if ways else [], "".join(ways))
        elif kind == "artifact":
            files = {entry.path: entry.local_path for entry in message.artifact.manifest.contents}
            run["artifacts"][message.artifact.name] = message.artifact.type, files
        elif kind == "exit":
            run["exit"] = message.exit.exit_code
    return run


def runs(out: Path) -> list[dict[str, Any]]:
    """Those of a run directory, oldest first."""
    return [read_run(folder) for folder in sorted((out / "wandb").glob("offline-run-*"))]
