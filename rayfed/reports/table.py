"""The tables of a report, as formatted text. The terminal and the page show the same cells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev

from rayfed.reports.compare import Comparison, Measure, RunGroup, RunSummary
from rayfed.reports.labels import spelled
from rayfed.reports.runs import Run
from rayfed.reports.traffic import DIRECTIONS, PARTS, Traffic
from rayfed.tracking import Table
from rayfed.tracking.format import clock, megabytes

DETAILS = (
    "rounds", "sparse model", "best round", "test accuracy, best round", "test loss, best round", "MB down", "MB up",
    "target round",
)  # fmt: skip
BASELINES = {  # column -> key of the summary
    "exported model": "final/test_accuracy",
    "as clients receive it": "final/test_accuracy_masked",
    "frozen base, head trained in the same rounds": "head_only/test_accuracy",
    "frozen base, head trained centrally": "head_only/test_accuracy_central",
}
WORST = 20  # clients in the table of those with the lowest accuracy
Ledgers = Mapping[Run, Traffic]
Number = Callable[[RunSummary], float | None]
Columns = list[tuple[str, Callable[[RunGroup], str]]]  # name and cell of each column


def summary(comparison: Comparison, brief: bool = False) -> Table:
    """One row per group: its score, the round of the score, its bytes, and the bytes and round to the target.

    ``brief`` leaves out the columns DETAILS, for a narrow terminal.
    """
    measure, groups = comparison.measure, comparison.groups
    seeds = any(len(group.runs) > 1 for group in groups)
    columns: Columns = [("", lambda g: g.label)]
    if seeds:
        columns.append(("seeds", lambda g: _fraction(len(g.counted), len(g.runs))))
    columns.append(("rounds", lambda g: _range([run.rounds[-1]["round"] for run in g.counted])))
    columns.append((measure.label, lambda g: _spread(g, measure, lambda r: r.value)))
    if measure.report:
        columns.append((measure.report_label, lambda g: _spread(g, measure, lambda r: r.report)))
        if any(group.values(lambda r: r.masked) for group in groups):
            columns.append(("sparse model", lambda g: _spread(g, measure, lambda r: r.masked)))
        columns.append(("best round", lambda g: _range([r.best_round for r in g.summaries])))
        columns.append((f"{measure.report_label}, best round", lambda g: _spread(g, measure, lambda r: r.best_report)))
    if any(_forgetting(group) for group in groups):
        columns.append(("forgetting", lambda g: _mean_spread(_forgetting(g), measure)))
    columns += [
        ("MB down", lambda g: megabytes(g.mean(lambda r: r.down))),
        ("MB up", lambda g: megabytes(g.mean(lambda r: r.up))),
        ("MB both ways", lambda g: megabytes(g.mean(lambda r: r.bytes))),
    ]
    goal = comparison.target
    if goal is not None:
        columns.append((f"MB to {as_text(goal, measure)}", _to_target))
        columns.append(("target round", lambda g: _range([r.target_round for r in g.summaries])))
    if brief:
        columns = [(name, cell) for name, cell in columns if name not in DETAILS]
    title = "Values of the last round, whose model is exported"
    return _table(f"{title}; mean ± deviation over the seeds" if seeds else title, columns, groups)


def baselines(comparison: Comparison) -> Table | None:
    """The exported model next to the frozen base with only a head trained (`eval.controls`). None without baselines.

    The numbers are those of the runs' summaries; means and deviations are over the seeds.
    """
    rows = []
    for group in comparison.groups:
        cells = [_mean_spread(_summary_values(group, key), comparison.measure) for key in BASELINES.values()]
        if any(cell != "-" for cell in cells[-2:]):
            rows.append((group.label, *cells))
    return Table("Test accuracy of the run and of its baselines", ("", *BASELINES), tuple(rows)) if rows else None


def _summary_values(group: RunGroup, key: str) -> list[float]:
    """The values of the summaries of the group's runs that have one under the key."""
    return [value for run in group.counted if (value := run.summary.get(key)) is not None]


def _forgetting(group: RunGroup) -> list[float]:
    return _summary_values(group, "sequence/forgetting")


def _mean_spread(values: Sequence[float], measure: Measure) -> str:
    return as_text(mean(values), measure, stdev(values) if len(values) > 1 else None) if values else "-"


def differing(comparison: Comparison) -> Table:
    """The settings that differ, one row per group."""
    keys = list(comparison.differing)
    rows = (
        (group.label, *(spelled(comparison.differing[key][i]) for key in keys))
        for i, group in enumerate(comparison.groups)
    )
    return Table("Settings that differ", ("", *keys), tuple(rows))


def front(comparison: Comparison) -> Table:
    """The Pareto front of accuracy and bytes, fewest bytes first."""
    return _table("Pareto front", [("", lambda g: g.label), *_results(comparison.measure)], comparison.front)


def methods(comparison: Comparison) -> Table:
    """The best group of each method on validation, the best method first."""
    columns: Columns = [("", lambda g: str(g.settings["method.name"])), ("best setting", lambda g: g.label)]
    return _table("Best of each method", [*columns, *_results(comparison.measure)], comparison.best_of_methods)


def parts(comparison: Comparison, ledgers: Ledgers) -> Table:
    """MB by direction and part, and entries per message. Means over the seeds."""
    columns = ["", *(f"{way}: {part}" for way in DIRECTIONS for part in PARTS)]
    columns += [f"entries a message {way}" for way in DIRECTIONS]
    rows = []
    for group in comparison.groups:
        own = [ledgers[run] for run in group.counted if run in ledgers]
        if own:
            sizes = [megabytes(mean(t.bytes(way, part) for t in own)) for way in DIRECTIONS for part in PARTS]
            rows.append((group.label, *sizes, *(_entries(own, way) for way in DIRECTIONS)))
    return Table("Traffic by part, MB", tuple(columns), tuple(rows))


def mix(comparison: Comparison) -> Table:
    """The share of client rounds by rank, and the densities of the settings."""
    ranks = sorted({rank for group in comparison.groups for rank in rank_shares(group)})
    rows = []
    for group in comparison.groups:
        shares = rank_shares(group)
        cells = [f"{100 * shares[rank]:.0f} %" if rank in shares else "-" for rank in ranks]
        rows.append((group.label, *cells, *(_density(group, way) for way in DIRECTIONS)))
    columns = ("", *(f"rank {rank}" for rank in ranks), *(f"density {way}" for way in DIRECTIONS))
    return Table("Ranks, as a share of all client rounds, and densities", columns, tuple(rows))


def rank_shares(group: RunGroup) -> dict[int, float]:
    """Rank -> its share of the client rounds, 0 to 1. Without counts, all clients have `lora.rank`."""
    prefix = "clients/rank_"
    counts: Counter[int] = Counter()
    for record in (record for run in group.counted for record in run.rounds):
        for key, count in record.items():
            if key.startswith(prefix) and count:
                counts[int(key.removeprefix(prefix))] += count
    if not counts:
        return {int(group.settings["lora.rank"]): 1.0}
    return {rank: counts[rank] / counts.total() for rank in sorted(counts)}


def as_text(value: float, measure: Measure, deviation: float | None = None) -> str:
    """`81.2 %`, `81.2 ± 0.4 %`. A gap, which may be tiny, has three significant digits. A loss: `0.8123`."""
    if not measure.share:
        return f"{value:.4f}" if deviation is None else f"{value:.4f} ± {deviation:.4f}"
    digits = 1
    if measure.lower_is_better:
        digits = 2 - math.floor(math.log10(100 * abs(value))) if value else 0
        digits = min(max(digits, 0), 12)
    around = "" if deviation is None else f" ± {100 * deviation:.{digits}f}"
    return f"{100 * value:.{digits}f}{around} %"


def facts(run: Run) -> list[tuple[str, str]]:
    """(name, value) pairs of one run: directory, method, seed, rounds, time."""
    state = "finished" if run.finished else "not finished"
    seconds = sum(record.get("time/round_s") or 0.0 for record in run.rounds)
    nonfinite = run.rounds[-1].get("nonfinite")
    return [
        ("directory", str(run.folder)),
        ("method", str(run.settings["method.name"])),
        ("seed", str(run.seed)),
        ("rounds", f"{run.rounds[-1]['round']} of {run.settings['server.rounds']}, {state}"),
        ("time of all rounds", clock(seconds)),
        *([("not finite in the last round", str(nonfinite))] if nonfinite else []),
    ]


def clients(run: Run) -> Table | None:
    """The WORST clients with the lowest test accuracy, and the ranks at which they trained last; None if unknown."""
    found = run.last_list("test/accuracy_per_client")
    known = sorted((value, client) for client, value in enumerate(found[1] if found else ()) if value is not None)
    if found is None or not known:
        return None
    ranks = run.last_ranks()
    rows = [(str(client), str(ranks.get(client, "-")), f"{100 * value:.1f} %") for value, client in known[:WORST]]
    title = f"Clients with the lowest test accuracy after round {found[0]}, of {len(known)}"
    return Table(title, ("client", "trained at rank", "test accuracy"), tuple(rows))


def _results(measure: Measure) -> Columns:
    """The columns with the bytes and the values of a group."""
    columns: Columns = [("MB both ways", lambda g: megabytes(g.mean(lambda r: r.bytes)))]
    columns.append((measure.label, lambda g: _spread(g, measure, lambda r: r.value)))
    if measure.report:
        columns.append((measure.report_label, lambda g: _spread(g, measure, lambda r: r.report)))
    return columns


def _table(title: str, columns: Columns, groups: Sequence[RunGroup]) -> Table:
    rows = (tuple(cell(group) for _, cell in columns) for group in groups)
    return Table(title, tuple(name for name, _ in columns), tuple(rows))


def _spread(group: RunGroup, measure: Measure, number: Number) -> str:
    """`81.2 ± 0.4 %`; with the number of seeds, if some seeds have no value."""
    center = group.mean(number)
    if center is None:
        return "diverged" if any(run.diverged(measure.key) for run in group.counted) else "-"
    seeds, total = len(group.values(number)), len(group.summaries)
    return as_text(center, measure, group.deviation(number)) + (f" ({seeds}/{total})" if seeds < total else "")


def _to_target(group: RunGroup) -> str:
    if group.target_bytes is not None:
        return megabytes(group.target_bytes)
    reached = len(group.values(lambda r: r.target_bytes))
    return f"{reached}/{len(group.summaries)} reached it" if reached else "not reached"


def _range(rounds: Sequence[int | None]) -> str:
    """`20`, or `18 to 20` if the seeds differ."""
    known = [number for number in rounds if number is not None]
    if not known:
        return "-"
    return str(known[0]) if min(known) == max(known) else f"{min(known)} to {max(known)}"


def _fraction(part: int, total: int) -> str:
    return str(total) if part == total else f"{part}/{total}"


def _entries(ledgers: Sequence[Traffic], way: str) -> str:
    sizes = [size for ledger in ledgers if (size := ledger.entries(way)) is not None]
    if not sizes:
        return "-"
    low, middle, high = min(s[0] for s in sizes), mean(s[1] for s in sizes), max(s[2] for s in sizes)
    return f"{middle:,.0f}" if low == high else f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def _density(group: RunGroup, way: str) -> str:
    """The density of the settings: one for each tier if tiers have their own, with its decay."""
    settings = group.settings
    own = settings.get(f"profiles.densities_{way}")
    text = " | ".join(map(spelled, own)) if own else spelled(settings[f"wire.{way}.density"])
    decay = settings[f"wire.{way}.decay"]
    return text if decay == 1 else f"{text}, times {spelled(decay)} every {settings[f'wire.{way}.every']}"
