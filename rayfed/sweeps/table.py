"""The results of a sweep: one row a trial, and one table with means and deviations over the seeds.

All numbers come from the trials' own `metrics.jsonl`. Tuned settings are selected by the mean of the metric on
validation data. The reported test metric takes no part in the selection.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rayfed.config import load_config
from rayfed.config.describe import format_value, short_names
from rayfed.config.search import OptunaSettings
from rayfed.config.sweep import SEED, Sweep
from rayfed.errors import UserError
from rayfed.sweeps.plan import FAILED, STOPPED, UNFINISHED, Trial, trial_folder
from rayfed.tracking import Table, read_metrics
from rayfed.tracking.format import format_mb, format_mean

TrialRow = dict[str, Any]
"""A line of sweep.jsonl."""


def trial_row(out: Path, trial: Trial, sweep: Sweep, error: str | None = None, stopped: int | None = None) -> TrialRow:
    """The trial's line in sweep.jsonl: overrides, status, the values that the table shows, and the run's summary.

    A trial whose run has written its summary is done. Of the others, it has failed for the reason ``error``, or was
    ``stopped`` after that round. UserError if its run directory was made with other settings, or is damaged.
    """
    folder, digest = trial_folder(out, trial.name), trial.experiment.digest()
    if (config := folder / "config.yaml").is_file() and (old := load_config(config).digest()) != digest:
        raise UserError(
            f"--resume: {folder} was made with other settings (digest {old}, these have {digest}); "
            "resume with the sweep's own sweep.yaml or choose another --out"
        )
    row: TrialRow = {"trial": trial.name, "overrides": dict(trial.overrides), "status": UNFINISHED, "error": None}
    row["digest"] = digest
    if summary := read_lines(folder / "summary.json"):
        rounds = read_metrics(folder / "metrics.jsonl")
        row |= {"status": "done", **summarize(rounds, sweep, report_key(trial, sweep)), "summary": summary[0]}
    elif error is not None:
        row |= {"status": FAILED, "error": error}
    elif stopped is not None:
        rounds = [own for own in read_metrics(folder / "metrics.jsonl") if own["round"] <= stopped]
        # Not under "metric": a value after fewer rounds takes part in no mean and no selection.
        row |= {"status": STOPPED, "stopped": {"round": stopped, "metric": summarize(rounds, sweep, None)["metric"]}}
    return row


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; none if there is no such file. UserError if it is damaged."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is no object")
    except ValueError as error:
        raise UserError(f"--resume: {path} is damaged ({error}); choose another --out") from None
    return lines


def report_key(trial: Trial, sweep: Sweep) -> str | None:
    """The key shown after the metric: `sweep.report`, else the metric on test data, if trials measure it."""
    on_test = sweep.metric.replace("eval/", "test/", 1)
    return sweep.report or (on_test if on_test != sweep.metric and on_test in trial.metrics else None)


def summarize(rounds: Sequence[Mapping[str, Any]], sweep: Sweep, report: str | None) -> TrialRow:
    """Metric and report in the round that counts, all bytes, the seconds of all rounds and the server's part of them.

    With a second objective (`sweep.search.against`), its sum over the rounds. If the last measured value was not
    finite, the metric is None: an earlier round must not hide a divergence.
    """
    nonfinite = f" {sweep.metric}="
    measured = [own for own in rounds if own.get(sweep.metric) is not None or nonfinite in f" {own.get('nonfinite')}"]
    counted = measured[-1] if measured else {}
    if sweep.at == "best":
        finite = [own for own in measured if own.get(sweep.metric) is not None]
        counted = (max if sweep.mode == "max" else min)(finite, key=lambda own: own[sweep.metric], default={})
    totals = {"seconds": "time/round_s", "server_seconds": "time/server_s"}
    if isinstance(sweep.search, OptunaSettings) and sweep.search.against:
        totals["against"] = sweep.search.against
    row = {
        "round": counted.get("round"),
        "metric": counted.get(sweep.metric),
        "report": counted.get(report) if report else None,
        "bytes": rounds[-1]["bytes/total"] if rounds else None,
        **{name: sum(own.get(key, 0.0) for own in rounds) for name, key in totals.items()},
    }
    return row | ({"against": row["bytes"]} if totals.get("against") == "bytes/total" else {})


@dataclass
class TrialGroup:
    """The trials that differ in the seed alone."""

    labels: dict[str, Any]
    """The labels that they share."""
    trials: list[Trial] = field(default_factory=list)
    rows: list[TrialRow] = field(default_factory=list)
    """The rows of the trials that are done and did not diverge."""
    stopped: list[int] = field(default_factory=list)
    """The last rounds of the trials that were stopped early."""

    def mean(self, key: str) -> float | None:
        """The mean over the seeds; None without values."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return mean(values) if values else None

    def cell(self, key: str, title: str) -> str:
        """The mean, and the sample deviation (n - 1 below) where there are two values or more."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return format_mean(self.mean(key), stdev(values) if len(values) > 1 else None, title)


def groups(trials: Iterable[Trial], rows: Mapping[str, TrialRow]) -> list[TrialGroup]:
    """One group for all trials with the same labels but the seed, in the order of the trials."""
    found: dict[str, TrialGroup] = {}
    for trial in trials:
        labels, row = {key: value for key, value in trial.labels.items() if key != SEED}, rows[trial.name]
        group = found.setdefault(repr(labels), TrialGroup(labels))
        group.trials.append(trial)
        if row.get("metric") is not None:
            group.rows.append(row)
        if row["status"] == STOPPED:
            group.stopped.append(row["stopped"]["round"])
    return list(found.values())


def selected(trials: Sequence[Trial], rows: Mapping[str, TrialRow], sweep: Sweep) -> list[Trial]:
    """The trials, of all seeds, with the best tuned values by the mean metric of the first `tune_seeds` seeds.

    Without `tune`, all trials. Values with fewer finite results never beat values with more: settings that fail at some
    seeds are no choice.
    """
    if not sweep.tune:
        return list(trials)
    first = sweep.parameters.get(SEED, {}).get("grid", [])[: sweep.tune_seeds]
    best: dict[str, tuple[tuple[int, float], str]] = {}
    for group in groups((own for own in trials if sweep.tune_seeds is None or own.overrides[SEED] in first), rows):
        others = repr({key: value for key, value in group.labels.items() if key not in sweep.tune})
        metric = group.mean("metric")
        worth = -math.inf if metric is None else metric if sweep.mode == "max" else -metric
        rank = (len(group.rows), worth), repr(group.labels)
        if others not in best or rank[0] > best[others][0]:
            best[others] = rank
    chosen = {labels for _, labels in best.values()}
    return [own for group in groups(trials, rows) if repr(group.labels) in chosen for own in group.trials]


def make_table(
    trials: Sequence[Trial], rows: Mapping[str, TrialRow], sweep: Sweep, title: str | None = None,
    marks: Mapping[str, str] | None = None,
) -> Table:  # fmt: skip
    """The table of a sweep, by the trials' rows: a line for all seeds. With `tune`, only the best tuned settings.

    A search has a title of its own, and a last column with ``marks``, by the name of the first trial of a line.
    """
    labels = list(dict.fromkeys(key for trial in trials for key in trial.labels if key != SEED))
    report = report_key(trials[0], sweep) if trials else None
    values = {"metric": sweep.metric} if trials else {}
    values |= {"report": report} if report else {}
    body = tuple(
        (
            *(format_value(own.labels[key], quotes=False) if key in own.labels else "" for key in labels),
            *(own.cell(key, name) for key, name in values.items()),
            format_mb(own.mean("bytes"), 2),
            "-" if (seconds := own.mean("seconds")) is None else f"{seconds:.1f}",
            f"{len(own.rows)}/{len(own.trials)}",
            *([", ".join(map(str, own.stopped))] if sweep.stop else []),
            *([] if marks is None else [marks.get(own.trials[0].name, "")]),
        )
        for own in groups(selected(trials, rows, sweep), rows)
    )
    more = (["stopped at round"] if sweep.stop else []) + ([] if marks is None else [""])
    columns = (*short_names(labels).values(), *values.values(), "MB both ways", "seconds", "trials", *more)
    return Table(title or _title(sweep), columns, body)


def _title(sweep: Sweep) -> str:
    when = "last measured" if sweep.at == "last" else f"in the round with the best {sweep.metric}"
    title = f"mean ± deviation over the seeds, {when}"
    if not sweep.tune:
        return title
    seeds = f" of the first {sweep.tune_seeds} seeds" if sweep.tune_seeds else ""
    return f"{title}; {', '.join(sweep.tune)} selected by mean {sweep.metric} ({sweep.mode}){seeds}"
