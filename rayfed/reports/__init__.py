"""Reports: a self-contained page and figures from run and sweep directories, and the same table for the terminal.

    read(["runs/a", "runs/b"]) -> Comparison        runs, grouped over seeds, against each other
    write_report(comparison, out)                   out/report.html, out/figures/*.svg and *.png

Neither needs torch or Ray; only `write_report` needs matplotlib (the extra `report`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rayfed.reports.compare import Comparison, compare
from rayfed.reports.runs import find_runs
from rayfed.reports.table import summary
from rayfed.reports.traffic import Link, parse_link

__all__ = ["Comparison", "Link", "figures_available", "parse_link", "read", "summary", "write_report"]


def read(folders: Iterable[str | Path], target: float | None = None) -> Comparison:
    """The runs in these run and sweep directories, compared. UserError, one line, where something is wrong."""
    runs, notes = find_runs(folders)
    return compare(runs, notes, target)


def figures_available() -> bool:
    """Whether matplotlib is there, which `write_report` needs."""
    from rayfed.reports.plots import available

    return available()


def write_report(comparison: Comparison, out: Path, link: Link | None = None, files: bool = True) -> Path:
    """Writes `report.html` and, with ``files``, its figures as SVG and PNG into ``out``; returns the page's path.

    Same runs, same bytes. With a ``link``, also accuracy against simulated time. UserError where matplotlib is missing.
    """
    from rayfed.files import atomic_write
    from rayfed.reports.figures import plots, run_plots
    from rayfed.reports.page import RUN_BY_RUN, page
    from rayfed.reports.plots import drawing, save
    from rayfed.reports.style import looks
    from rayfed.reports.traffic import read_traffic

    with drawing():
        runs = [run for group in comparison.groups for run in group.runs]
        ledgers = {run: found for run in runs if (found := read_traffic(run.folder)) is not None}
        drawn = looks(comparison.groups, comparison.ranked)
        shared = list(plots(comparison, ledgers, drawn, link))
        own = [list(run_plots(run, i)) for i, run in enumerate(runs, 1)] if len(runs) <= RUN_BY_RUN else []
        text = page(comparison, ledgers, drawn, shared, own, link)
        if files:
            for plot in (*shared, *(plot for plots in own for plot in plots)):
                save(plot.draw(True), out / "figures" / plot.name, plot.title)
        atomic_write(out / "report.html", text)
    return out / "report.html"
