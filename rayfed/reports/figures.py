"""Which figures a comparison has, and what each of them shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from rayfed.reports import bars, curves
from rayfed.reports.compare import Comparison
from rayfed.reports.curves import Looks, X
from rayfed.reports.heat_map import heat_maps
from rayfed.reports.runs import Run
from rayfed.reports.table import Ledgers, rank_shares, share
from rayfed.reports.traffic import DIRECTIONS, Link

UNLIKE = 0.02  # difference in the share of the uplink above which each direction has a figure of its own
UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
ALIKE = 1.05  # largest over smallest traffic below which no Pareto front is drawn


@dataclass(frozen=True)
class Plot:
    """One figure: its file's name, the section of the page, and ``draw(keyed)``, which makes it."""

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[[bool], Any]
    keyed: bool = False  # whether the groups' common legend explains it


def plots(comparison: Comparison, ledgers: Ledgers, looks: Looks, link: Link | None) -> Iterator[Plot]:
    """The comparison's figures in the order of the page."""
    yield from _curves(comparison, ledgers, looks, link)
    measure = comparison.measure
    if comparison.target is not None and sum(g.target_bytes is not None for g in looks) >= 2:
        title = f"MB both ways to {share(comparison.target, measure)} {measure.label}"
        caption = "Up to the first evaluated round that reached it; means over the seeds, where all of them did."
        yield Plot("target", "target", title, caption, lambda _: bars.target(looks))
    if len(comparison.groups) > 2 and _spreads(comparison):
        caption = "Filled: the Pareto front, which nothing beats in both."
        caption += " It is chosen on validation." if measure.chooses else ""
        title = f"{_capital(measure.label)} and the MB it took"
        yield Plot("pareto", "pareto", title, caption, partial(curves.pareto, comparison, looks), True)
    yield from _grids(comparison)
    if any(run in ledgers for group in looks for run in group.counted):
        caption = "Header, indices and values of all messages, from the ledger."
        yield Plot("traffic", "traffic", "Traffic by part", caption, lambda _: bars.traffic(looks, ledgers))
    if len({rank for group in looks for rank in rank_shares(group)}) > 1:
        yield Plot("ranks", "mix", "Ranks that took part", "Share of all client rounds.", lambda _: bars.ranks(looks))
    for way, does in zip(DIRECTIONS, ("receives", "sends")):
        runs = [run for group in looks for run in group.counted]
        if len({size for run in runs for size in curves.entries_a_client(run, way).values()}) > 1:
            title = f"Entries a client {does} in a round"
            draw = partial(curves.entries, looks, way)
            yield Plot(f"entries-{way}", "mix", title, "Mean over the round's clients.", draw, True)


def run_plots(run: Run, number: int) -> Iterator[Plot]:
    """One run's own figures: all its splits and models, and what each tier of clients would receive."""
    section = f"run-{number}"
    figures = {
        "share of the gap left": "eval/gap",
        "validation": "eval/accuracy",
        "test": "test/accuracy",
        "validation, sparse model": "eval/accuracy_masked",
        "test, sparse model": "test/accuracy_masked",
    }
    if own := _series(run, figures):
        title = "Gap against rounds" if run.known_answer else "Accuracy against rounds"
        yield Plot(section, section, title, "", lambda _: curves.lines(own, log=run.known_answer))
    if losses := _series(run, {"training": "train/loss", "validation": "eval/loss", "test": "test/loss"}):
        draw = partial(_lines, losses, False)
        yield Plot(f"{section}-loss", section, "Loss against rounds", "", draw)
    prefix = "test/accuracy_rank_"
    keys = dict.fromkeys(key for record in run.rounds for key in record if key.startswith(prefix))
    names = {"rank " + key.removeprefix(prefix).replace("_density_", ", density "): key for key in keys}
    if tiers := _series(run, names):
        title = "What each tier of clients would receive"
        yield Plot(f"{section}-tiers", section, title, "Test accuracy.", partial(_lines, tiers, True))
    every = "test/accuracy_clients"
    among = {
        "90th percentile": f"{every}_p90",
        "median": f"{every}_p50",
        "mean": every,
        "10th percentile": f"{every}_p10",
    }
    if clients := _series(run, among):
        title, caption = "What each client gets", "Over the clients: test accuracy on classes weighted like their own."
        yield Plot(f"{section}-clients", section, title, caption, partial(_lines, clients, True))


def _curves(comparison: Comparison, ledgers: Ledgers, looks: Looks, link: Link | None) -> Iterator[Plot]:
    label = _capital(comparison.measure.label)
    seeds = any(len(group.counted) > 1 for group in comparison.groups)
    band = " The band reaches from the lowest to the highest seed." if seeds else ""
    draw = partial(curves.curves, comparison, looks)
    title = f"{label} against rounds"
    yield Plot("rounds", "curves", title, f"After each round.{band}", partial(draw, None, "round"), True)
    for name, key, words, of in (
        ("bytes", "bytes/total", "both ways", ""),
        ("bytes-down", "bytes/down", "down", ", server to clients"),
        ("bytes-up", "bytes/up", "up", ", clients to server"),
    ):
        if of and not _unlike(comparison):
            continue  # the same picture with other numbers on its axis
        caption = f"All bytes {words}{of}, of all clients.{band}"
        title = f"{label} against MB {words}"
        yield Plot(name, "curves", title, caption, partial(draw, _megabytes(key), f"MB {words}"), True)
    counted = [run for group in comparison.groups for run in group.counted]
    if link is not None and all(run in ledgers for run in counted):
        seconds = {run: ledgers[run].seconds(link) for run in counted}
        unit, size = _unit(max(max(own.values(), default=0.0) for own in seconds.values()))
        times = {run: {t: value / size for t, value in own.items()} for run, own in seconds.items()}
        caption = (
            f"Every client on its own link of {link}; a round waits for its slowest client. Transfers alone.{band}"
        )
        title = f"{label} against simulated time"
        drawn = partial(draw, times.__getitem__, f"{unit} of transfer")
        yield Plot("link-time", "curves", title, caption, drawn, True)


def _grids(comparison: Comparison) -> Iterator[Plot]:
    measure = comparison.measure
    what = "test accuracy at the best round on validation" if measure.report else measure.label
    for grid in heat_maps(comparison):
        among = ", ".join(grid.chosen_among)
        kept = f" In each cell the best {among}, by {measure.label}." if among else ""
        name, title = "density-rank", "Density and rank"
        if grid.method:
            name, title = f"{name}-{grid.method}", f"{title}, {grid.method}"
        caption = f"Large: {what}, mean over seeds. Small: MB both ways.{kept}"
        yield Plot(name, "grid", title, caption, partial(_heat_map, comparison, grid))


def _heat_map(comparison: Comparison, grid: Any, _: bool) -> Any:
    return bars.heat_map(comparison, grid)


def _lines(own: Mapping[str, Mapping[int, float]], percent: bool, _: bool) -> Any:
    return curves.lines(own, percent=percent)


def _series(run: Run, keys: Mapping[str, str]) -> dict[str, dict[int, float]]:
    """Name -> the series of its key, of those that were measured."""
    return {name: points for name, key in keys.items() if (points := run.series(key))}


def _megabytes(key: str) -> X:
    if key == "bytes/total":
        return lambda run: {record["round"]: record[key] / 1e6 for record in run.rounds}
    return lambda run: {t: size / 1e6 for t, size in run.sums(key).items()}


def _unlike(comparison: Comparison) -> bool:
    """Whether the two directions share the bytes differently in different groups."""
    shares = [(g.mean(lambda r: r.up) or 0.0) / (g.mean(lambda r: r.bytes) or 1.0) for g in comparison.groups]
    return max(shares) - min(shares) > UNLIKE


def _unit(seconds: float) -> tuple[str, float]:
    """The unit that a time reads well in, and how many seconds it has."""
    return next((unit for unit in UNITS if seconds >= 2 * unit[1]), UNITS[-1])


def _spreads(comparison: Comparison) -> bool:
    """Whether the groups' bytes differ by more than a few percent, so that there is something to weigh."""
    sizes = [size for group in comparison.groups if (size := group.mean(lambda r: r.bytes_then)) is not None]
    return bool(sizes) and max(sizes) > ALIKE * min(sizes)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
