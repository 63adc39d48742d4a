"""The list of figures of a comparison and of a single run: title, caption and content of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from rayfed.reports import charts, heat_map
from rayfed.reports.compare import Comparison
from rayfed.reports.drawing import Styles
from rayfed.reports.runs import Run
from rayfed.reports.table import Ledgers, as_percent, rank_shares
from rayfed.reports.traffic import DIRECTIONS, Link

UNLIKE = 0.02  # difference in the share of the uplink above which each direction has its own figure
ALIKE = 1.05  # ratio of largest to smallest traffic below which no Pareto front is drawn
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
        title = f"MB both ways to {as_percent(comparison.target, measure)} {measure.label}"
        caption = (
            "Up to the first evaluated round that reached the target. Means over the seeds, if all of them reached it."
        )
        yield Plot("target", "target", title, caption, partial(charts.target, styles))
    if len(comparison.groups) > 2 and comparison.front and _sizes_differ(comparison):
        caption = "Filled points are the Pareto front: no other point is better in both."
        title = f"{_capital(measure.label)} and MB up to that round"
        yield Plot("pareto", "pareto", title, caption, partial(charts.pareto, comparison, styles), True)
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
    """The figures of one run: every split and model, every tier of clients, and the spread over clients."""
    tier, clients = "test/accuracy_rank_", "test/accuracy_clients"
    tiers = dict.fromkeys(key for record in run.rounds for key in record if key.startswith(tier))
    plots: tuple[tuple[str, str, str, dict[str, str]], ...] = (
        ("", "Gap against rounds" if run.known_answer else "Accuracy against rounds", "", {
            "share of the gap left": "eval/gap",
            "validation": "eval/accuracy",
            "test": "test/accuracy",
            "validation, sparse model": "eval/accuracy_masked",
            "test, sparse model": "test/accuracy_masked",
        }),
        ("-loss", "Loss against rounds", "", {
            "training": "train/loss", "validation": "eval/loss", "test": "test/loss",
        }),
        ("-tiers", "Test accuracy by tier of clients", "The model that each tier would receive.", {
            f"rank {key.removeprefix(tier).replace('_density_', ', density ')}": key for key in tiers
        }),
        ("-clients", "Test accuracy over the clients", "For each client, classes count as in its own data.", {
            "90th percentile": f"{clients}_p90", "median": f"{clients}_p50", "mean": clients,
            "10th percentile": f"{clients}_p10",
        }),
    )  # fmt: skip
    for suffix, title, caption, keys in plots:
        if series := {name: points for name, key in keys.items() if (points := run.series(key))}:
            draw = partial(charts.lines, series, percent=suffix != "-loss", log=not suffix and run.known_answer)
            yield Plot(f"run-{number}{suffix}", f"run-{number}", title, caption, draw)


def _curves(comparison: Comparison, ledgers: Ledgers, styles: Styles, link: Link | None) -> Iterator[Plot]:
    label = _capital(comparison.measure.label)
    counted = [run for group in comparison.groups for run in group.counted]
    seeds = len(counted) > len(comparison.groups)
    band = " The band reaches from the lowest to the highest seed." if seeds else ""
    draw = partial(charts.curves, comparison, styles)
    title = f"{label} against rounds"
    yield Plot("rounds", "curves", title, f"After each round.{band}", partial(draw, None, "round"), True)
    ways = (
        ("bytes/total", "both ways", ""),
        ("bytes/down", "down", ", server to clients"),
        ("bytes/up", "up", ", clients to server"),
    )
    for key, words, detail in ways if _directions_differ(comparison) else ways[:1]:
        sizes = {run: _megabytes(run, key) for run in counted}
        name = key.replace("/", "-").removesuffix("-total")
        caption = f"All bytes {words}{detail}, of all clients.{band}"
        title = f"{label} against MB {words}"
        yield Plot(name, "curves", title, caption, partial(draw, sizes.__getitem__, f"MB {words}"), True)
    if link is not None and all(run in ledgers for run in counted):
        seconds = {run: ledgers[run].seconds(link) for run in counted}
        longest = max(max(own.values(), default=0.0) for own in seconds.values())
        unit, length = next((unit for unit in UNITS if longest >= 2 * unit[1]), UNITS[-1])
        times = {run: {t: value / length for t, value in own.items()} for run, own in seconds.items()}
        caption = (
            f"Every client has its own link of {link}; a round waits for its slowest client. Transfers only.{band}"
        )
        title = f"{label} against simulated time"
        draw = partial(draw, times.__getitem__, f"{unit} of transfer")
        yield Plot("link-time", "curves", title, caption, draw, True)


def _heat_maps(comparison: Comparison) -> Iterator[Plot]:
    measure = comparison.measure
    shown = "test accuracy in the best round on validation" if measure.report else measure.label
    for grid in heat_map.heat_maps(comparison):
        among = ", ".join(grid.chosen_among)
        best = f" Each cell shows the best {among} by {measure.label}." if among else ""
        name, title = "density-rank", "Density and rank"
        if grid.method:
            name, title = f"{name}-{grid.method}", f"{title}, {grid.method}"
        caption = f"Large number: {shown}, mean over seeds. Small number: MB both ways.{best}"
        yield Plot(name, "grid", title, caption, partial(heat_map.draw, comparison, grid))


def _megabytes(run: Run, key: str) -> dict[int, float]:
    """Round -> MB up to and including that round."""
    sizes = run.series(key) if key == "bytes/total" else run.cumulative(key)
    return {t: size / 1e6 for t, size in sizes.items()}


def _directions_differ(comparison: Comparison) -> bool:
    """Whether the share of the uplink in all bytes differs between groups."""
    shares = [(g.mean(lambda r: r.up) or 0.0) / (g.mean(lambda r: r.bytes) or 1.0) for g in comparison.groups]
    return max(shares) - min(shares) > UNLIKE


def _sizes_differ(comparison: Comparison) -> bool:
    """Whether the groups' bytes differ by more than a few percent."""
    sizes = [size for group in comparison.groups if (size := group.mean(lambda r: r.best_bytes)) is not None]
    return bool(sizes) and max(sizes) > ALIKE * min(sizes)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
