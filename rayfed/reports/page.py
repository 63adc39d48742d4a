"""The page: one HTML file, also well-formed XML, without scripts and without references to other files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rayfed import __version__
from rayfed.reports import partition, table
from rayfed.reports.compare import GAP, LOSS, Comparison
from rayfed.reports.drawing import MUTED, Styles, css, inline_svg, swatch
from rayfed.reports.figures import Plot
from rayfed.reports.labels import printable
from rayfed.reports.table import Ledgers, as_text
from rayfed.reports.traffic import Link
from rayfed.tracking.format import megabytes

SINGLE_RUNS = 6  # largest number of runs that get their own sections
HEADINGS = {
    "curves": "Accuracy and traffic",
    "target": "Bytes to the target",
    "pareto": "Pareto front",
    "methods": "Best of each method",
    "grid": "Two settings at a time",
    "traffic": "Traffic by part",
    "mix": "Ranks and densities",
}
OTHER_MEASURES = {GAP: "Gap and traffic", LOSS: "Loss and traffic"}  # in place of the first one


def page(
    comparison: Comparison, ledgers: Ledgers, styles: Styles, plots: Sequence[Plot], single: Sequence[Sequence[Plot]],
    link: Link | None,
) -> str:  # fmt: skip
    """The HTML of the page. ``plots`` are the figures of the comparison, ``single`` the figures of each run."""
    runs = [run for group in comparison.groups for run in group.runs]
    return _environment().get_template("page.html").render(
        version=__version__,
        title=_title(comparison),
        colors=css(),
        lead=list(_lead(comparison)),
        notes=comparison.notes,
        summary=table.summary(comparison),
        baselines=table.baselines(comparison),
        sweeps=_sweep_tables(comparison),
        differing=table.differing(comparison) if comparison.differing else None,
        legend=_legend(comparison, styles),
        sections=list(_sections(comparison, ledgers, plots)),
        runs=[
            (run.folder.resolve().name, table.facts(run), _figures(own), table.clients(run), _data(run.folder))
            for run, own in zip(runs, single)
        ],
        explanations=list(_explanations(comparison, link)),
    )  # fmt: skip


def _environment() -> Environment:
    """Templates in which every text is escaped for HTML and XML, also inside an attribute."""
    return Environment(
        loader=PackageLoader("rayfed.reports", "."), autoescape=True, undefined=StrictUndefined, finalize=_shown,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _shown(value: Any) -> Any:
    """A text without characters that cannot be printed, in which a number and its unit stay on one line.

    What the template marks as `safe`, the page's own SVG and CSS, stays as it is.
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    shown = printable(value)
    for unit in ("%", "MB "):
        shown = shown.replace(f" {unit}", f"\N{NO-BREAK SPACE}{unit}")
    return shown


def _sections(comparison: Comparison, ledgers: Ledgers, plots: Sequence[Plot]) -> Iterable[Mapping[str, Any]]:
    """Heading, figures and table of each section that has a figure; ranks and densities always have their table."""
    tables = {
        "pareto": table.front(comparison), "methods": table.methods(comparison),
        "traffic": table.parts(comparison, ledgers), "mix": table.mix(comparison),
    }  # fmt: skip
    headings = {**HEADINGS, "curves": OTHER_MEASURES.get(comparison.measure, HEADINGS["curves"])}
    for section, heading in headings.items():
        here = [plot for plot in plots if plot.section == section]
        if here or section == "mix":
            yield {
                "heading": heading,
                "legend": any(plot.shared_legend for plot in here),
                "figures": _figures(here),
                "table": tables.get(section),
                "caption": section == "mix",
            }


def _sweeps(comparison: Comparison) -> list[Path]:
    """The directories of the sweeps whose trials are compared."""
    runs = [run for group in comparison.groups for run in group.runs]
    return list(dict.fromkeys(run.folder.resolve().parents[1] for run in runs if run.trial))


def _sweep_tables(comparison: Comparison) -> list[tuple[str, str]]:
    """(name, table.txt) of each sweep that has one."""
    tables = [(folder.name, folder / "table.txt") for folder in _sweeps(comparison)]
    return [(name, path.read_text(encoding="utf-8", errors="replace")) for name, path in tables if path.is_file()]


def _figures(plots: Iterable[Plot]) -> list[tuple[Plot, str]]:
    """Each figure with its SVG element."""
    return [
        (plot, inline_svg(plot.figure(standalone=False), plot.name, plot.title, plot.caption or plot.title))
        for plot in plots
    ]


def _data(folder: Path) -> dict[str, Any] | None:
    """The partition of a run's data: figure, facts, table and definitions; None where the run has left none."""
    found = partition.read_partition(folder)
    return found and {
        "svg": partition.svg(found, inline=True),
        "facts": partition.facts(found).items(),
        "table": partition.table(found),
        "experiences": partition.experiences(found),
        "notes": partition.notes(found),
    }


def _legend(comparison: Comparison, styles: Styles) -> list[tuple[str, str]]:
    """The sample and the name of each group; empty for a single group."""
    if len(comparison.groups) == 1:
        return []
    items = [(swatch(style.color, style.dash), group.label) for group, style in styles.items()]
    if rest := len(comparison.groups) - len(styles):
        items.append((swatch(MUTED, "-"), f"{rest} more, with a worse {comparison.measure.label}"))
    return items


def _title(comparison: Comparison) -> str:
    if len(comparison.groups) == 1:
        return comparison.groups[0].label
    runs, sweeps = [run for group in comparison.groups for run in group.runs], _sweeps(comparison)
    name = f"{sweeps[0].name}: " if len(sweeps) == 1 and all(run.trial for run in runs) else ""
    several = f", {len(runs)} runs" if len(runs) > len(comparison.groups) else ""
    return f"{name}{len(comparison.groups)} settings compared{several}"


def _lead(comparison: Comparison) -> Iterable[str]:
    """The main results: the score of the exported model, and the fewest bytes to the target."""
    measure, best = comparison.measure, comparison.ranked[0]
    several = len(comparison.groups) > 1
    if best.score is None:
        yield "No run has a finite value."
        return
    tested = best.mean(lambda r: r.report) if measure.report else None
    reached = f"{as_text(best.score, measure)} {measure.label}"
    if tested is not None:
        reached = f"{as_text(tested, measure)} {measure.report_label}, {reached}"
    first = f"Best is {best.label}:" if several else "The exported model reaches"
    yield f"{first} {reached}, for {megabytes(best.mean(lambda r: r.bytes))} MB both ways."
    targets = [(size, group.label) for group in comparison.groups if (size := group.target_bytes) is not None]
    if comparison.target is not None and several and targets:
        fewest, label = min(targets, key=lambda pair: pair[0])
        yield (
            f"Fewest bytes to {as_text(comparison.target, measure)} {measure.label}: {label}, "
            f"{megabytes(fewest)} MB; {len(targets)} of {len(comparison.groups)} reach it."
        )


def _explanations(comparison: Comparison, link: Link | None) -> Iterable[str]:
    measure = comparison.measure
    yield "1 MB is 1e6 bytes. Bytes are the lengths of the encoded messages of all clients, with headers and indices."
    if measure is GAP:
        yield "The gap is (F(W) - F(W*)) / (F(0) - F(W*)), computed exactly. The last round counts."
    elif measure is LOSS:
        yield "The last evaluated round counts: its model is the one that a run exports."
    else:
        yield (
            "The last evaluated round counts: its model is the one that a run exports, and its test accuracy is "
            "final/test_accuracy in the run's summary."
        )
    if measure.report:
        yield f"Runs are ranked by {measure.label}. The {measure.report_label} has no part in any choice."
    if comparison.target is not None:
        default = "what is left after 95 % of the best reduction" if measure is GAP else "95 % of the best mean"
        yield (
            f"The target is {as_text(comparison.target, measure)} {measure.label} "
            f"({'given' if comparison.given_target else default}), the dotted line in the curves. A run reaches the "
            "target in the first fully evaluated round at or beyond it."
        )
    if any(len(group.runs) > 1 for group in comparison.groups):
        yield (
            "Runs that differ in the seed alone are one group: curves show the mean and the range, tables and bars the "
            "mean ± the sample standard deviation."
        )
    if link is not None:
        yield f"Simulated time: {link}; each client downloads, then uploads; no latency, no training time."
