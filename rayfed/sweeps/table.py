"""The results of a sweep: one row a trial, and one table with means and deviations over the seeds.

All numbers come from the trials' own `metrics.jsonl`. Tuned settings are selected by the mean of the metric on
validation data. The reported test metric takes no part in the selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from rayfed.tracking.jsonl import is_measured, read_lines

TrialRow = dict[str, Any]
"""A line of sweep.jsonl."""


def trial_row(out: Path, trial: Trial, sweep: Sweep, error: str | None = None, stopped: int | None = None) -> TrialRow:
    """The trial's line in sweep.jsonl: overrides, status, the values that the table shows, and the run's summary.

    A trial whose run has written its summary is done. Of the others, it has failed for the reason ``error``, or was
    ``stopped`` after that round. UserError if its run directory was made with other settings, or is damaged.
    """
    folder, digest = trial_folder(out, trial.name), trial.experiment.digest()
    if (config := folder / "config.yaml").is_file() and (old := load_config(config).digest()) != digest:
        made = f"{folder} was made with other settings (digest {old}, these have {digest})"
        raise UserError(f"--resume: {made}; resume with the sweep's own sweep.yaml or choose another --out")
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


def report_key(trial: Trial, sweep: Sweep) -> str | None:
    """The key shown after the metric: `sweep.report`, else the metric on test data, if trials measure it."""
    on_test = sweep.metric.replace("eval/", "test/", 1)
    return sweep.report or (on_test if on_test != sweep.metric and on_test in trial.metrics else None)


def summarize(rounds: Sequence[Mapping[str, Any]], sweep: Sweep, report: str | None) -> TrialRow:
    """Metric and report in the round that counts, all bytes, the seconds of all rounds and the server's part of them.

    With a second objective (`sweep.search.against`), its sum over the rounds. If the last measured value was not
    finite, the metric is None: an earlier round must not hide a divergence.
    """
    key = sweep.metric
    if sweep.fallback is not None and not any(is_measured(own, key) for own in rounds):
        key = sweep.fallback
        report = sweep.report or key.replace("eval/", "test/", 1)
    measured = [own for own in rounds if is_measured(own, key)]
    counted = measured[-1] if measured else {}
    if sweep.at == "best":
        finite = [own for own in measured if own.get(key) is not None]
        counted = (max if sweep.mode == "max" else min)(finite, key=lambda own: own[key], default={})

    def total(key: str) -> float | None:
        values = [own.get(key, 0) for own in rounds]
        return max(values, default=None) if key == "bytes/total" else sum(values)  # the first one is a sum already

    totals = {"bytes": "bytes/total", "seconds": "time/round_s", "server_seconds": "time/server_s"}
    if isinstance(sweep.search, OptunaSettings) and sweep.search.against:
        totals["against"] = sweep.search.against
    row = {"round": counted.get("round"), "metric": counted.get(key), "report": counted.get(report) if report else None}
    return row | {name: total(own) for name, own in totals.items()}


def groups(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """The trials that differ in the seed alone, by `group_of`, in the order of the trials."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(group_of(trial), []).append(trial)
    return found


def group_of(trial: Trial, without: Sequence[str] = ()) -> str:
    """A key that is equal for trials with the same labels, but the seed and the settings in ``without``."""
    return repr({key: value for key, value in trial.labels.items() if key != SEED and key not in without})


def values_of(trials: Iterable[Trial], rows: Mapping[str, TrialRow], key: str) -> list[float]:
    """The values of the trials that are done and did not diverge."""
    ended = (row for row in (rows[trial.name] for trial in trials) if row.get("metric") is not None)
    return [row[key] for row in ended if row.get(key) is not None]


def selected(trials: Sequence[Trial], rows: Mapping[str, TrialRow], sweep: Sweep) -> list[Trial]:
    """The trials, of all seeds, with the best tuned values by the mean metric of the first `tune_seeds` seeds.

    Without `tune`, all trials. Values with fewer finite results never beat values with more: settings that fail at some
    seeds are no choice.
    """
    if not sweep.tune:
        return list(trials)
    sign = 1 if sweep.mode == "max" else -1
    best: dict[str, tuple[tuple[int, float], str]] = {}
    for key, group in groups(of_first_seeds(trials, sweep)).items():
        metrics, others = values_of(group, rows, "metric"), group_of(group[0], sweep.tune)
        worth = len(metrics), sign * mean(metrics or [0.0])
        if others not in best or worth > best[others][0]:
            best[others] = worth, key
    chosen = {key for _, key in best.values()}
    return [own for own in trials if group_of(own) in chosen]


def of_first_seeds(trials: Sequence[Trial], sweep: Sweep) -> list[Trial]:
    """The trials of the first `tune_seeds` seeds; without `tune_seeds`, all."""
    seeds = sweep.parameters.get(SEED, {}).get("grid", [])[: sweep.tune_seeds]
    return [trial for trial in trials if sweep.tune_seeds is None or trial.overrides[SEED] in seeds]


def make_table(
    trials: Sequence[Trial], rows: Mapping[str, TrialRow], sweep: Sweep, title: str | None = None,
    marks: Mapping[str, str] | None = None,
) -> Table:  # fmt: skip
    """The table of a sweep, by the trials' rows: a line for all seeds, with means and sample deviations.

    With `tune`, only the best tuned settings have a line. A search has a title of its own, and a last column with
    ``marks``, by the name of the first trial of a line.
    """
    labels = list(dict.fromkeys(key for trial in trials for key in trial.labels if key != SEED))
    report = report_key(trials[0], sweep) if trials else None
    shown = {"metric": sweep.metric, "report": report} if report else {"metric": sweep.metric} if trials else {}
    body = []
    for group in groups(selected(trials, rows, sweep)).values():
        own = group[0].labels
        line = [format_value(own[key], quotes=False) if key in own else "" for key in labels]
        for key, name in shown.items():
            values = values_of(group, rows, key)
            line.append(format_mean(_mean(values), stdev(values) if len(values) > 1 else None, name))
        seconds = _mean(values_of(group, rows, "seconds"))
        line += [format_mb(_mean(values_of(group, rows, "bytes")), 2), "-" if seconds is None else f"{seconds:.1f}"]
        line.append(f"{len(values_of(group, rows, 'metric'))}/{len(group)}")
        if sweep.stop:
            ends = (rows[trial.name].get("stopped") for trial in group)
            line.append(", ".join(str(end["round"]) for end in ends if end))
        body.append((*line, *([] if marks is None else [marks.get(group[0].name, "")])))
    more = ["stopped at round"] * bool(sweep.stop) + [""] * (marks is not None)
    columns = (*short_names(labels).values(), *shown.values(), "MB both ways", "seconds", "trials", *more)
    return Table(title or _title(sweep), columns, tuple(body))


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _title(sweep: Sweep) -> str:
    when = "last measured" if sweep.at == "last" else f"in the round with the best {sweep.metric}"
    where = f" ({sweep.fallback} where there is none)" if sweep.fallback else ""
    seeds = f" of the first {sweep.tune_seeds} seeds" if sweep.tune_seeds else ""
    chosen = f"; {', '.join(sweep.tune)} selected by mean {sweep.metric} ({sweep.mode}){seeds}" if sweep.tune else ""
    return f"mean ± deviation over the seeds, {when}{where}{chosen}"
