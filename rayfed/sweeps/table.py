"""The results of a sweep: one row a trial, and one table with means and deviations over the seeds.

All numbers come from the trials' own `metrics.jsonl`. Tuned settings are selected by the mean of the metric on
validation data. The reported test metric takes no part in the selection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rayfed.config.describe import format_value
from rayfed.config.sweep import SEED, Sweep
from rayfed.sweeps.plan import Trial
from rayfed.sweeps.space import short_names
from rayfed.sweeps.trial import read_outcome, trial_folder
from rayfed.tracking import Table, read_metrics

TrialRow = dict[str, Any]
"""A line of sweep.jsonl."""
TIME, SERVER_TIME = "time/round_s", "time/server_s"
UNFINISHED = "unfinished"
STOPPED = "stopped"  # by the section `stop`
NOT_SELECTED = "not selected"  # other tuned values were better on the first seeds, so the trial does not run
IN_PERCENT = ("accuracy", "accuracy_masked", "accuracy_clients", "accuracy_unseen", "gap")


def trial_row(out: Path, trial: Trial, sweep: Sweep) -> TrialRow:
    """The trial's line in sweep.jsonl: overrides, status, the values that the table shows, and the run's summary."""
    outcome = read_outcome(out, trial)
    row: TrialRow = {
        "trial": trial.name,
        "overrides": dict(trial.overrides),
        "status": outcome.status if outcome else UNFINISHED,
        "error": outcome.error if outcome else None,
        "digest": trial.experiment.digest(),
    }
    if outcome and outcome.status == "done":
        rounds = read_metrics(trial_folder(out, trial) / "metrics.jsonl")
        row |= summarize(rounds, sweep, report_key(trial, sweep)) | {"summary": outcome.summary}
    if outcome and outcome.status == STOPPED:
        # Not under "metric": a value after fewer rounds takes part in no mean and no selection.
        last = outcome.round or 0
        rounds = [r for r in read_metrics(trial_folder(out, trial) / "metrics.jsonl") if r["round"] <= last]
        row["stopped"] = {"round": outcome.round, "metric": summarize(rounds, sweep, None)["metric"]}
    return row


def report_key(trial: Trial, sweep: Sweep) -> str | None:
    """The key shown after the metric: `sweep.report`, else the metric on test data, if trials measure it."""
    on_test = sweep.metric.replace("eval/", "test/", 1)
    return sweep.report or (on_test if on_test != sweep.metric and on_test in trial.metrics else None)


def value_columns(trial: Trial, sweep: Sweep) -> list[tuple[str, str]]:
    """(key in a trial's row, title) of the columns with the metric and the reported metric."""
    report = report_key(trial, sweep)
    return [("metric", sweep.metric), *([("report", report)] if report else [])]


def summarize(rounds: Sequence[Mapping[str, Any]], sweep: Sweep, report: str | None) -> TrialRow:
    """Metric and report in the round that counts, all bytes, the seconds of all rounds and the server's part of them.

    If the last measured value was not finite, the metric is None: an earlier round must not hide a divergence.
    """
    measured = [r for r in rounds if r.get(sweep.metric) is not None or _diverged(r, sweep.metric)]
    if sweep.at == "best":
        sign = 1 if sweep.mode == "max" else -1
        finite = [r for r in measured if r.get(sweep.metric) is not None]
        counted = max(finite, key=lambda r: sign * r[sweep.metric], default={})
    else:
        counted = measured[-1] if measured else {}
    return {
        "round": counted.get("round"),
        "metric": counted.get(sweep.metric),
        "report": counted.get(report) if report else None,
        "bytes": rounds[-1]["bytes/total"] if rounds else None,
        "seconds": sum(r[TIME] for r in rounds),
        "server_seconds": sum(r.get(SERVER_TIME, 0.0) for r in rounds),
    }


def _diverged(record: Mapping[str, Any], key: str) -> bool:
    return any(word.startswith(f"{key}=") for word in str(record.get("nonfinite", "")).split())


@dataclass(frozen=True)
class TrialGroup:
    """The trials that differ in the seed alone."""

    labels: dict[str, Any]
    """The labels that they share."""
    trials: int
    rows: list[TrialRow]
    """The rows of the trials that are done and did not diverge."""
    stopped: list[int]
    """The last rounds of the trials that were stopped early."""

    def values(self, key: str) -> list[float]:
        """The values of the key that are not None."""
        return [row[key] for row in self.rows if row.get(key) is not None]

    def mean(self, key: str) -> float | None:
        """The mean over the seeds; None without values."""
        return mean(self.values(key)) if self.values(key) else None

    def deviation(self, key: str) -> float | None:
        """Sample deviation over the seeds (n - 1 below); None for fewer than two."""
        return stdev(self.values(key)) if len(self.values(key)) > 1 else None

    def cells(self, columns: Iterable[tuple[str, str]]) -> list[str]:
        """The cells of `value_columns`."""
        return [format_mean(self.mean(key), self.deviation(key), title) for key, title in columns]


def groups(trials: Iterable[Trial], rows: Mapping[str, TrialRow]) -> list[TrialGroup]:
    """One group for all trials with the same settings but the seed, in the order of the trials."""
    found: dict[str, TrialGroup] = {}
    for trial in trials:
        labels, row = labels_without_seed(trial), rows[trial.name]
        group = found.get(repr(labels), TrialGroup(labels, 0, [], []))
        counted = [row] if row.get("metric") is not None else []
        stopped = [row["stopped"]["round"]] if row["status"] == STOPPED else []
        found[repr(labels)] = TrialGroup(labels, group.trials + 1, group.rows + counted, group.stopped + stopped)
    return list(found.values())


def selection_trials(trials: Sequence[Trial], sweep: Sweep) -> list[Trial]:
    """The trials by which tuned values are selected: those of the first `tune_seeds` seeds, by default all."""
    if sweep.tune_seeds is None:
        return list(trials)
    first = sweep.parameters[SEED]["grid"][: sweep.tune_seeds]
    return [trial for trial in trials if trial.overrides[SEED] in first]


def selected_trials(trials: Sequence[Trial], rows: Mapping[str, TrialRow], sweep: Sweep) -> list[Trial]:
    """The trials, of all seeds, with the best tuned values; without `tune`, all trials."""
    if not sweep.tune:
        return list(trials)
    best = best_groups(groups(selection_trials(trials, sweep), rows), sweep.tune, sweep.mode)
    labels = [group.labels for group in best]
    return [trial for trial in trials if labels_without_seed(trial) in labels]


def labels_without_seed(trial: Trial) -> dict[str, Any]:
    """The trial's labels but for the seed."""
    return {key: value for key, value in trial.labels.items() if key != SEED}


def best_groups(found: Iterable[TrialGroup], tune: Sequence[str], mode: str) -> list[TrialGroup]:
    """Among the groups that differ in tuned settings alone, the one with the best mean metric.

    A group with fewer finite results never beats a group with more: settings that fail at some seeds are no choice.
    """
    sign = 1 if mode == "max" else -1
    best: dict[str, tuple[tuple[int, float], TrialGroup]] = {}
    for group in found:
        others = repr({key: value for key, value in group.labels.items() if key not in tune})
        metric = group.mean("metric")
        rank = (len(group.rows), -math.inf if metric is None else sign * metric)
        if others not in best or rank > best[others][0]:
            best[others] = rank, group
    return [group for _, group in best.values()]


def make_table(
    trials: Sequence[Trial], rows: Mapping[str, TrialRow], sweep: Sweep, title: str | None = None,
    mark: Callable[[TrialGroup], str] | None = None,
) -> Table:  # fmt: skip
    """The table of a sweep, by the trials' rows: a line for all seeds. With `tune`, only the best tuned settings.

    A search has a title of its own, and a last column with the ``mark`` of each line.
    """
    labels = list(dict.fromkeys(key for trial in trials for key in trial.labels if key != SEED))
    values = [] if not trials else value_columns(trials[0], sweep)
    body = tuple(
        (
            *format_labels(group.labels, labels),
            *group.cells(values),
            format_mb(group.mean("bytes"), 2),
            _seconds(group.mean("seconds")),
            f"{len(group.rows)}/{group.trials}",
            *([", ".join(map(str, group.stopped))] if sweep.stop else []),
            *([mark(group)] if mark else []),
        )
        for group in groups(selected_trials(trials, rows, sweep), rows)
    )
    more = (["stopped at round"] if sweep.stop else []) + ([""] if mark else [])
    titles = (name for _, name in values)
    columns = (*short_names(labels).values(), *titles, "MB both ways", "seconds", "trials", *more)
    return Table(title or _title(sweep), columns, body)


def _title(sweep: Sweep) -> str:
    when = "last measured" if sweep.at == "last" else f"in the round with the best {sweep.metric}"
    title = f"mean ± deviation over the seeds, {when}"
    if not sweep.tune:
        return title
    seeds = f" of the first {sweep.tune_seeds} seeds" if sweep.tune_seeds else ""
    return f"{title}; {', '.join(sweep.tune)} selected by mean {sweep.metric} ({sweep.mode}){seeds}"


def format_labels(labels: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """The cells of the label columns; empty where there is no such label."""
    return [format_value(labels[key], quotes=False) if key in labels else "" for key in keys]


def format_mean(centre: float | None, deviation: float | None, key: str) -> str:
    """`81.23 ± 0.45 %`, `0.4321 ± 0.0012`; without the deviation if there is none."""
    if centre is None:
        return "-"
    percent = key.rpartition("/")[2] in IN_PERCENT
    scale, digits = (100, 2) if percent else (1, 4)
    around = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
    return f"{scale * centre:.{digits}f}{around}{' %' if percent else ''}"


def format_mb(size: float | None, digits: int = 3) -> str:
    """Bytes as MB, 1e6 bytes."""
    return "-" if size is None else f"{size / 1e6:.{digits}f}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"
