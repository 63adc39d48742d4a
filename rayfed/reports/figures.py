"""The list of figures of a comparison and of a single run: title, caption and content of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from rayfed.reports import charts, heat_map, run_charts
from rayfed.reports.compare import Comparison
from rayfed.reports.drawing import Styles
from rayfed.reports.runs import Run, natural_key
from rayfed.reports.table import Ledgers, as_text, rank_shares
from rayfed.reports.traffic import DIRECTIONS, Link

UNLIKE = 0.02  # difference in the share of the uplink above which each direction has its own figure
ALIKE = 1.05  # ratio of largest to smallest traffic below which no Pareto front is drawn
WAYS = (  # name of the figure, metric, and the direction in words
    ("bytes", "bytes/total", "both ways", ""),
    ("bytes-down", "bytes/down", "down", ", server to clients"),
    ("bytes-up", "bytes/up", "up", ", clients to server"),
)
MOST_SQUARES = 2000  # largest number of clients, over the rounds shown, in the figure of who trained
UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


@dataclass(frozen=True)
class Plot:
    """One figure: the name of its files, the section of the page, its texts, and the function that draws it.

    With ``shared_legend`` the section's legend explains the figure, and ``draw`` takes whether to add a legend.
    """

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[..., Any]
    shared_legend: bool = False

    def figure(self, standalone: bool) -> Any:
        """The matplotlib figure; if ``standalone``, with its own legend."""
        return self.draw(standalone) if self.shared_legend else self.draw()


def plots(comparison: Comparison, ledgers: Ledgers, styles: Styles, link: Link | None) -> Iterator[Plot]:
    """The figures of the comparison, in the order of the page."""
    yield from _curves(comparison, ledgers, styles, link)
    measure = comparison.measure
    if comparison.target is not None and sum(g.target_bytes is not None for g in styles) >= 2:
        title = f"MB both ways to {as_text(comparison.target, measure)} {measure.label}"
        caption = (
            "Up to the first evaluated round that reached the target. Means over the seeds, if all of them reached it."
        )
        yield Plot("target", "target", title, caption, partial(charts.target, styles))
    sizes = [size for size, _ in comparison.points.values()]
    if len(comparison.groups) > 2 and sizes and max(sizes) > ALIKE * min(sizes):
        caption = "Filled points are the Pareto front: no other point is better in both. Bars: deviation over seeds."
        title = f"{measure.label.capitalize()} and MB both ways"
        yield Plot("pareto", "pareto", title, caption, partial(charts.pareto, comparison, styles), True)
    if len(comparison.best_of_methods) > 1:
        caption = f"For each method its best setting by {measure.label}. Bars: deviation over seeds."
        yield Plot("methods", "methods", "Best of each method", caption, partial(charts.methods, comparison, styles))
    yield from _heat_maps(comparison)
    runs = [run for group in styles for run in group.counted]
    if any(run in ledgers for run in runs):
        caption = "Header, indices and values of all messages, from the ledger."
        yield Plot("traffic", "traffic", "Traffic by part", caption, partial(charts.traffic, styles, ledgers))
    if len({rank for group in styles for rank in rank_shares(group)}) > 1:
        draw = partial(charts.ranks, styles)
        yield Plot("ranks", "mix", "Ranks of the clients", "Share of all client rounds.", draw)
    for way, does in zip(DIRECTIONS, ("receives", "sends")):
        if len({size for run in runs for size in charts.entries_per_client(run, way).values()}) > 1:
            title = f"Entries that a client {does} per round"
            draw = partial(charts.entries, styles, way)
            yield Plot(f"entries-{way}", "mix", title, "Mean over the round's clients.", draw, True)


def run_plots(run: Run, number: int) -> Iterator[Plot]:
    """The figures of one run: curves of all that its metrics.jsonl has; who trained when, each client's accuracy, the
    accuracies by experience, and what is confused."""
    for suffix, title, caption, keys, style in _run_curves(run):
        if series := {name: points for name, key in keys.items() if (points := run.series(key))}:
            draw = partial(charts.lines, series, **style)
            yield Plot(f"run-{number}{suffix}", f"run-{number}", title, caption, draw)
    rounds = {record["round"]: record["clients/trained"] for record in run.rounds if record.get("clients/trained")}
    if shown := _last_rounds(rounds):
        part = f" The last {len(shown)} rounds." if len(shown) < len(rounds) else ""
        title, caption = "Who trained when, at which rank", f"One square for each client in each round.{part}"
        yield Plot(f"run-{number}-trained", f"run-{number}", title, caption, partial(run_charts.trained, shown))
    if (found := run.last_list("test/accuracy_per_client")) and any(value is not None for value in found[1]):
        caption = f"After round {found[0]}, for each client that has rows. Classes count as in its own data."
        draw = partial(run_charts.client_accuracies, found[1], run.last_ranks())
        yield Plot(f"run-{number}-client-accuracies", f"run-{number}", "Test accuracy of each client", caption, draw)
    if any(accuracies := run.by_experience()):
        title = "Test accuracy on the rows of each experience"
        caption = "In percent, after the experience of the line; the model chooses among all classes seen until then."
        draw = partial(run_charts.experiences, accuracies)
        yield Plot(f"run-{number}-experiences", f"run-{number}", title, caption, draw)
    if found := run.last_list("test/confusion_matrix"):
        after = f"Test rows after round {found[0]}"
        caption = f"{after}: labels down, predictions across. Stronger colours are larger shares of a label."
        draw = partial(run_charts.confusion, found[1], run.classes)
        yield Plot(f"run-{number}-confusion", f"run-{number}", "Confusion matrix", caption, draw)


def _run_curves(run: Run) -> Iterator[tuple[str, str, str, dict[str, str], dict[str, bool]]]:
    """(end of the name, title, caption, series -> metric, style of `charts.lines`) of each figure of curves."""
    gap, percent = run.measured("eval/gap"), {"percent": True}
    title = "Gap against rounds" if gap else "Accuracy against rounds"
    subset = "" if not run.measured("eval_subset/accuracy") else "The subset: the same validation rows in every round."
    yield "", title, subset, {
        "share of the gap left": "eval/gap",
        "validation": "eval/accuracy",
        "validation, subset": "eval_subset/accuracy",
        "test": "test/accuracy",
        "validation, sparse model": "eval/accuracy_masked",
        "test, sparse model": "test/accuracy_masked",
    }, percent | {"log": gap}  # fmt: skip
    yield "-loss", "Loss against rounds", "", {
        "training": "train/loss", "validation": "eval/loss", "validation, subset": "eval_subset/loss",
        "test": "test/loss",
    }, {}  # fmt: skip
    tier, clients = "test/accuracy_rank_", "test/accuracy_clients"
    keys = dict.fromkeys(key for record in run.rounds for key in record)
    tiers = {f"rank {k.removeprefix(tier).replace('_density_', ', density ')}": k for k in keys if k.startswith(tier)}
    tiers = {name: tiers[name] for name in sorted(tiers, key=natural_key)}
    caption = "The model that each tier would receive."
    yield "-tiers", "Test accuracy by tier of clients", caption, tiers, percent | {"ordered": True}
    yield "-clients", "Test accuracy over the clients", "For each client, classes count as in its own data.", {
        "90th percentile": f"{clients}_p90", "median": f"{clients}_p50", "mean": clients,
        "10th percentile": f"{clients}_p10",
    }, percent  # fmt: skip
    distances = {
        "mean of products": "diagnostics/to_mean_of_products", "product of means": "diagnostics/to_product_of_means",
    }  # fmt: skip
    caption = "Relative distances of the global model from two averages of the clients' models."
    yield "-diagnostics", "Distance from plain averages", caption, distances, {}
    caption = "What clients are sent next, against what they trained, and the least that one broadcast could reach."
    yield "-broadcast", "Distance of what is sent from what was trained", caption, {
        "largest": "diagnostics/R_max", "R": "diagnostics/R", "least": "diagnostics/R_least",
        "excess": "diagnostics/R_excess",
    }, {}  # fmt: skip
    for key in sorted(key for key in keys if key.startswith("method/")):
        name = key.removeprefix("method/")
        yield (
            f"-method-{name}",
            f"{name} against rounds",
            f"Reported by {run.settings['method.name']}.",
            {name: key},
            {},
        )


def _last_rounds(rounds: run_charts.Trained) -> run_charts.Trained:
    """The last of these rounds in which, together, at most MOST_SQUARES clients trained."""
    shown, squares = {}, 0
    for t in sorted(rounds, reverse=True):
        if (squares := squares + len(rounds[t])) > MOST_SQUARES:
            break
        shown[t] = rounds[t]
    return shown


def _curves(comparison: Comparison, ledgers: Ledgers, styles: Styles, link: Link | None) -> Iterator[Plot]:
    label = comparison.measure.label.capitalize()
    counted = [run for group in comparison.groups for run in group.counted]
    band = " The band reaches from the lowest to the highest seed." if len(counted) > len(comparison.groups) else ""

    def plot(name: str, what: str, caption: str, axis: str, x: charts.X | None = None) -> Plot:
        draw = partial(charts.curves, comparison, styles, x, axis)
        return Plot(name, "curves", f"{label} against {what}", f"{caption}{band}", draw, True)

    subset = any(run.measured(measure.between) for run in counted) if (measure := comparison.measure).between else False
    between = " Markers are full evaluations, the rounds between them a fixed subset of the rows." if subset else ""
    yield plot("rounds", "rounds", f"After each round.{between}", "round")
    shares = [(g.mean(lambda r: r.up) or 0.0) / (g.mean(lambda r: r.bytes) or 1.0) for g in comparison.groups]
    for name, key, words, detail in WAYS if max(shares) - min(shares) > UNLIKE else WAYS[:1]:
        totals = {run: run.series(key) if key == "bytes/total" else run.cumulative(key) for run in counted}
        sizes = {run: {t: size / 1e6 for t, size in own.items()} for run, own in totals.items()}
        yield plot(name, f"MB {words}", f"All bytes {words}{detail}, of all clients.", f"MB {words}", sizes)
    if link is not None and all(run in ledgers for run in counted):
        seconds = {run: ledgers[run].seconds(link) for run in counted}
        longest = max(max(own.values(), default=0.0) for own in seconds.values())
        unit, length = next((unit for unit in UNITS if longest >= 2 * unit[1]), UNITS[-1])
        times = {run: {t: value / length for t, value in own.items()} for run, own in seconds.items()}
        caption = f"Every client has its own link of {link}; a round waits for its slowest client. Transfers only."
        yield plot("link-time", "simulated time", caption, f"{unit} of transfer", times)


def _heat_maps(comparison: Comparison) -> Iterator[Plot]:
    measure, (shown, _) = comparison.measure, comparison.shown
    for grid in heat_map.heat_maps(comparison):
        among = ", ".join(grid.chosen_among)
        best = f" Each cell shows the best {among} by {measure.label}." if among else ""
        cell = "A point for each setting; darker ones are better" if grid.has_points else "Large number"
        sizes = "" if grid.has_points else " Small number: MB both ways."
        caption = f"{cell}: {shown}, mean over seeds.{sizes}{best}"
        yield Plot(grid.name, "grid", grid.title, caption, partial(heat_map.draw, comparison, grid))
