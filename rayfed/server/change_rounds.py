"""Another number of rounds for a run that exists: `server.rounds` changed on `--resume`.

The run goes on as if it had had that number from the start: equal states, messages, metrics and chain. Every file that
rests on the settings is written anew, and all of them into the folder `changed-rounds` at first. Then they are moved to
their places. A process that dies between two moves leaves the rest in that folder, and `complete` moves it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rayfed.errors import UserError
from rayfed.files import atomic_path, remove_path
from rayfed.server import checkpoint as checkpoints
from rayfed.server.chain import rechained
from rayfed.server.checkpoint import Checkpoint
from rayfed.tracking import read_metrics
from rayfed.tracking.jsonl import to_line

STAGED = "changed-rounds"


def last_common(out: Path, rounds: int, same: Callable[[int], bool]) -> Checkpoint | None:
    """The newest checkpoint of the run up to round ``rounds`` whose round is the ``same`` under both numbers of rounds.

    All rounds but the last one are the same: the last one is evaluated because it is the last. None where there is no
    such checkpoint.
    """
    found = checkpoints.manifests(out / "checkpoints")
    return next((own for own in found if own.round <= rounds and same(own.round)), None)


def change_rounds(out: Path, checkpoint: Checkpoint, digest: str, config: str) -> None:
    """Makes the run directory one that has come to ``checkpoint``, one of its own, with other settings.

    Args:
        digest: the digest of these settings, which differ in the number of rounds alone.
        config: the text of their config.yaml.

    UserError where the checkpoint is damaged.
    """
    folder = out / "checkpoints" / f"round-{checkpoint.round:06d}"
    try:
        found = checkpoints.read(out, folder, checkpoint.experiment)
    except checkpoints.Damaged as error:
        what = "resume with the old server.rounds first, which goes back to an older one"
        raise UserError(f"--resume: {folder} is damaged ({error}); {what}") from None
    records = rechained(out, read_metrics(out / "metrics.jsonl")[: checkpoint.round], digest)
    with atomic_path(out / STAGED) as staged:
        staged.mkdir()
        lines = "".join(f"{to_line(record)}\n" for record in records)
        for name, text in (("metrics.jsonl", lines), ("config.yaml", config)):
            (staged / name).write_text(text, encoding="utf-8")
        checksum = checkpoints.metrics_checksum(staged, checkpoint.round)
        chain = str(records[-1]["state/chain"])
        changed = replace(found.checkpoint, experiment=digest, chain=chain, metrics=checksum)
        checkpoints.save(staged / "checkpoints", changed, found.method, found.optimizer, 1, found.objective)
    complete(out)


def complete(out: Path) -> None:
    """Moves what `change_rounds` wrote to its place, if something is left to move. The old summary is removed."""
    staged = out / STAGED
    if not staged.is_dir():
        return
    for path in sorted(staged.iterdir()):
        if path.is_dir():  # a folder cannot be renamed onto a folder that holds files
            remove_path(out / path.name)
        os.replace(path, out / path.name)
    remove_path(out / "summary.json")
    remove_path(staged)
