"""What came out of a sweep: a line a trial, and one table with means and deviations over the seeds.

Figures are read from each trial's own `metrics.jsonl`. A tuned setting is chosen by the mean of the metric, which is
measured on validation data; what is reported of the choice never took part in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rayfed.config.sweep import SEED, Sweep
from rayfed.sweeps.plan import Trial
from rayfed.sweeps.space import text
from rayfed.sweeps.trial import outcome, place
from rayfed.tracking import Table, read_metrics

TrialRow = dict[str, Any]
TIME, SERVER_TIME = "time/round_s", "time/server_s"
UNFINISHED = "unfinished"
STOPPED = "stopped"  # by the section `stop`: it has not finished, and need not
NOT_CHOSEN = "not chosen"  # its tuned values lost on the seeds that choose: it need not run
PERCENT = ("accuracy", "accuracy_masked", "accuracy_clients", "gap")


def line_of(out: Path, trial: Trial, sweep: Sweep) -> TrialRow:
    """The trial's line in sweep.jsonl: overrides, status, the figures that the table is made of, the run's summary."""
    ended = outcome(out, trial)
    line: TrialRow = {
        "trial": trial.name,
        "overrides": dict(trial.overrides),
        "status": ended.status if ended else UNFINISHED,
        "error": ended.error if ended else None,
        "digest": trial.experiment.digest(),
    }
    if ended and ended.status == "done":
        rounds = read_metrics(place(out, trial) / "metrics.jsonl")
        line |= figures(rounds, sweep, reported(sweep, trial.experiment.data.source)) | {"summary": ended.summary}
    if ended and ended.status == STOPPED:
        # Not under "metric": a figure of fewer rounds takes part in no mean and no choice.
        rounds = [r for r in read_metrics(place(out, trial) / "metrics.jsonl") if r["round"] <= (ended.round or 0)]
        line["stopped"] = {"round": ended.round, "metric": figures(rounds, sweep, None)["metric"]}
    return line


def reported(sweep: Sweep, source: str) -> str | None:
    """The key shown beside the metric: `report`, or the test twin of a metric that is measured on validation data."""
    if sweep.report or source == "lowrank" or not sweep.metric.startswith("eval/"):
        return sweep.report
    return sweep.metric.replace("eval/", "test/", 1)


def figures(rounds: Sequence[Mapping[str, Any]], sweep: Sweep, report: str | None) -> TrialRow:
    """Metric and report at the round that counts, all bytes, the seconds of all rounds and the server's part of them.

    A metric that was not finite when it was last measured is null: no earlier round may speak for a run that diverged.
    """
    measured = [r for r in rounds if r.get(sweep.metric) is not None or _diverged(r, sweep.metric)]
    if sweep.at == "best":
        sign = 1 if sweep.mode == "max" else -1
        finite = [r for r in measured if r.get(sweep.metric) is not None]
        chosen = max(finite, key=lambda r: sign * r[sweep.metric], default={})
    else:
        chosen = measured[-1] if measured else {}
    return {
        "round": chosen.get("round"),
        "metric": chosen.get(sweep.metric),
        "report": chosen.get(report) if report else None,
        "bytes": rounds[-1]["bytes/total"] if rounds else None,
        "seconds": sum(r[TIME] for r in rounds),
        "server_seconds": sum(r.get(SERVER_TIME, 0.0) for r in rounds),
    }


def _diverged(record: Mapping[str, Any], key: str) -> bool:
    return any(word.startswith(f"{key}=") for word in str(record.get("nonfinite", "")).split())


@dataclass(frozen=True)
class TrialGroup:
    """The trials that differ in their seed alone: what they share, and the lines of those that count.

    ``stopped``: the rounds after which others were stopped.
    """

    shared: dict[str, Any]
    trials: int
    lines: list[TrialRow]
    stopped: list[int]

    def mean(self, figure: str) -> float | None:
        values = [line[figure] for line in self.lines if line.get(figure) is not None]
        return mean(values) if values else None

    def deviation(self, figure: str) -> float | None:
        """Sample deviation over the seeds (n - 1 below); None for fewer than two."""
        values = [line[figure] for line in self.lines if line.get(figure) is not None]
        return stdev(values) if len(values) > 1 else None


def groups(trials: Sequence[Trial], lines: Sequence[TrialRow]) -> list[TrialGroup]:
    """One group for each setting but the seed, in the order of the trials."""
    found: dict[str, TrialGroup] = {}
    for trial, line in zip(trials, lines, strict=True):
        shared = unseeded(trial)
        name = repr(shared)
        group = found.get(name, TrialGroup(shared, 0, [], []))
        counts = [line] if line.get("metric") is not None else []  # done, and did not diverge
        stopped = [line["stopped"]["round"]] if line["status"] == STOPPED else []
        found[name] = TrialGroup(shared, group.trials + 1, [*group.lines, *counts], [*group.stopped, *stopped])
    return list(found.values())


def choosing(trials: Sequence[Trial], sweep: Sweep) -> list[Trial]:
    """The trials that say which tuned values are best: those of the first `tune_seeds` seeds, by default all."""
    if sweep.tune_seeds is None:
        return list(trials)
    first = sweep.parameters[SEED]["grid"][: sweep.tune_seeds]
    return [trial for trial in trials if trial.overrides[SEED] in first]


def chosen(trials: Sequence[Trial], lines: Mapping[str, TrialRow], sweep: Sweep) -> list[Trial]:
    """All seeds' trials with the best tuned values, in their order; without `tune`, all trials."""
    if not sweep.tune:
        return list(trials)
    voters = choosing(trials, sweep)
    best = best_of(groups(voters, [lines[trial.name] for trial in voters]), sweep.tune, sweep.mode)
    wanted = [group.shared for group in best]
    return [trial for trial in trials if unseeded(trial) in wanted]


def unseeded(trial: Trial) -> dict[str, Any]:
    """What tells the trial apart, but for its seed."""
    return {key: value for key, value in trial.shown.items() if key != SEED}


def best_of(found: Iterable[TrialGroup], tune: Sequence[str], mode: str) -> list[TrialGroup]:
    """Of the groups that differ in tuned settings alone, the one with the best mean metric.

    One with fewer trials that count never beats one with more: what fails or diverges at some seeds is no choice.
    """
    sign = 1 if mode == "max" else -1
    best: dict[str, tuple[tuple[int, float], TrialGroup]] = {}
    for group in found:
        rest = repr({key: value for key, value in group.shared.items() if key not in tune})
        metric = group.mean("metric")
        rank = (len(group.lines), -math.inf if metric is None else sign * metric)
        if rest not in best or rank > best[rest][0]:
            best[rest] = rank, group
    return [group for _, group in best.values()]


def table_of(trials: Sequence[Trial], lines: Sequence[TrialRow], sweep: Sweep) -> Table:
    """The table; with `tune`, only the best of each row's tuned settings."""
    by_name = dict(zip((trial.name for trial in trials), lines, strict=True))
    shown_trials = chosen(trials, by_name, sweep)
    found = groups(shown_trials, [by_name[trial.name] for trial in shown_trials])
    columns = list(dict.fromkeys(key for trial in trials for key in trial.shown if key != SEED))
    report = reported(sweep, trials[0].experiment.data.source)
    shown = [("metric", sweep.metric), *([("report", report)] if report else [])]
    rows = tuple(
        (
            *(text(group.shared[key]) if key in group.shared else "" for key in columns),
            *(spread(group.mean(figure), group.deviation(figure), key) for figure, key in shown),
            "-" if (size := group.mean("bytes")) is None else f"{size / 1e6:.2f}",
            _seconds(group),
            f"{len(group.lines)}/{group.trials}",
            *([", ".join(map(str, group.stopped))] if sweep.stop else []),
        )
        for group in found
    )
    names = (
        *columns,
        *(key for _, key in shown),
        "MB both ways",
        "seconds (the server's own)",
        "trials",
        *(["stopped at round"] if sweep.stop else []),
    )
    return Table(_title(sweep), names, rows)


def _seconds(group: TrialGroup) -> str:
    """`138.3 (4.1)`: of all rounds, and the server's own."""
    whole, server = group.mean("seconds"), group.mean("server_seconds")
    return "-" if whole is None else f"{whole:.1f}" + ("" if server is None else f" ({server:.1f})")


def _title(sweep: Sweep) -> str:
    when = "last measured" if sweep.at == "last" else f"in the round with the best {sweep.metric}"
    if not sweep.tune:
        return f"mean ± deviation over the seeds, {when}"
    voters = f" of the first {sweep.tune_seeds} seeds" if sweep.tune_seeds else ""
    return (
        f"mean ± deviation over the seeds, {when}; {', '.join(sweep.tune)} chosen by mean {sweep.metric} "
        f"({sweep.mode}){voters}"
    )


def spread(centre: float | None, deviation: float | None, key: str) -> str:
    """`81.23 ± 0.45 %`, `0.4321 ± 0.0012`, without the deviation where there is none."""
    if centre is None:
        return "-"
    percent = key.rpartition("/")[2] in PERCENT
    scale, digits = (100, 2) if percent else (1, 4)
    around = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
    return f"{scale * centre:.{digits}f}{around}{' %' if percent else ''}"
