"""The hash chain of a run: one SHA-256 a round, `state/chain`, that covers everything the round's result rests on.

A round's link covers the link before, the digest of the settings that decide the result, the round's rows of the ledger
(which client received and sent which payload: sizes and CRC-32) and `state/digest`. Two runs with equal links have sent
equal messages and reached equal states in every round so far. `verify` computes the chain again from the files of a run
directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayfed.errors import RunError, UserError, first_line
from rayfed.server import checkpoint as checkpoints
from rayfed.tracking import read_metrics
from rayfed.wire.ledger import COLUMNS, DIRECTIONS, rounds_of


def link(before: str, settings: str, rows: np.ndarray, state: str) -> str:
    """The chain (64 hex digits) after one more round.

    Args:
        before: the chain before the round; empty before the first one.
        settings: the settings' digest.
        rows: the round's rows of the ledger, int64, shape (rows, columns), in the ledger's order.
        state: the round's `state/digest`.
    """
    digest = hashlib.sha256(f"{before}|{settings}|{state}|".encode())
    digest.update(np.ascontiguousarray(rows, "<i8").tobytes())
    return digest.hexdigest()


def verify(out: Path, settings: str, first: int = 0) -> str:
    """Compares the files of a run directory with each other; one line about what was found.

    The chain is computed from the ledger for every round after ``first``, the round after which the run continued
    another one, and compared with metrics.jsonl; so are the bytes. Then every checkpoint is read and checked.

    ``settings`` is the digest of the settings in config.yaml. UserError where the folder is no run directory, RunError
    at the first difference.
    """
    records = {int(record["round"]): record for record in read_metrics(out / "metrics.jsonl")}
    if sorted(records) != list(range(1, len(records) + 1)):
        raise RunError(f"{out}: metrics.jsonl does not have one line for each round")
    before, last = str(records[first].get("state/chain")) if first else "", 0
    found = checkpoints.folders(out / "checkpoints")
    newest = int(found[0].name.removeprefix("round-")) if found else 0  # the ledger is written before
    for last, rows in _rounds(out, newest):
        if last <= first:
            continue
        record = records.get(last)
        if record is None:
            raise RunError(f"{out}: ledger.parquet has round {last}, but metrics.jsonl does not")
        for way, direction in enumerate(DIRECTIONS):
            size = int(rows[rows[:, 2] == way, 3].sum())
            if size != record.get(f"bytes/{direction}"):
                raise RunError(
                    f"{out}: round {last} has {size} bytes {direction} in ledger.parquet, but "
                    f"{record.get(f'bytes/{direction}')} in metrics.jsonl"
                )
        before = link(before, settings, rows, str(record.get("state/digest")))
        if before != record.get("state/chain"):
            raise RunError(
                f"{out}: round {last} has another state/chain in metrics.jsonl than its files give: the settings, the "
                "ledger or a state digest was changed"
            )
    for folder in found:
        try:
            checkpoint = checkpoints.read(out, folder, settings).checkpoint
        except (UserError, checkpoints.Damaged) as error:
            raise RunError(f"{folder}: {first_line(error)}") from None
        if checkpoint.round <= first:
            continue  # made from the other run's
        recorded = records.get(checkpoint.round, {})
        if (checkpoint.digest, checkpoint.chain) != (recorded.get("state/digest"), recorded.get("state/chain")):
            raise RunError(f"{folder}: its digest or its chain is not the one in metrics.jsonl")
    later = f"; rounds {last + 1} to {len(records)} have no checkpoint yet" if len(records) > last else ""
    return f"rounds {first + 1} to {last} and {len(found)} checkpoints are as they were written{later}: chain {before}"


def rechained(out: Path, records: Sequence[Mapping[str, Any]], settings: str) -> list[dict[str, Any]]:
    """The records with the chain that they have where the settings' digest is ``settings``; all else stays.

    ``records`` are those of rounds 1 to n of the run directory ``out``, whose ledger has these rounds. The rounds of a
    run that this one continued keep their chain.
    """
    first, new = continued_after(out), [dict(record) for record in records]
    before = str(new[first - 1]["state/chain"]) if first else ""
    for number, rows in _rounds(out, len(new)):
        if first < number <= len(new):
            record = new[number - 1]
            before = record["state/chain"] = link(before, settings, rows, record["state/digest"])
    return new


def continued_after(out: Path) -> int:
    """The round after which the run continued another run, as a sweep's trial may; 0 for all other runs."""
    note = out / "continues.json"
    return int(json.loads(note.read_text(encoding="utf-8"))["round"]) if note.is_file() else 0


def _rounds(out: Path, least: int) -> Iterator[tuple[int, Any]]:
    """Every round in the ledger with its rows, and at least the first ``least``: a round without clients has none."""
    none, number = np.zeros((0, len(COLUMNS)), np.int64), 0
    try:
        for found, rows in rounds_of(out / "ledger.parquet"):
            yield from ((empty, none) for empty in range(number + 1, found))
            yield found, rows
            number = found
    except ValueError as error:
        raise RunError(first_line(error)) from None
    yield from ((empty, none) for empty in range(number + 1, least + 1))
