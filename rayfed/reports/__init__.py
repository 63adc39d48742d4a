"""Reports: a self-contained page and figures from run and sweep directories, and the same tables for the terminal.

    read(["runs/a", "runs/b"]) -> Comparison        compares the runs, grouped over seeds
    write_report(comparison, out)                   out/report.html, out/figures/*.svg and *.png

Neither needs torch or Ray. Only `write_report` needs matplotlib (the extra `report`).
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from rayfed.reports.compare import Comparison, compare
from rayfed.reports.runs import find_runs
from rayfed.reports.table import summary
from rayfed.reports.traffic import Link, parse_link

__all__ = ["Comparison", "Link", "figures_available", "parse_link", "read", "summary", "write_report"]


def read(folders: Iterable[str | Path], target: float | None = None) -> Comparison:
    """Compares the runs in these run and sweep directories.

    ``target``: the accuracy (or gap), 0 to 1 exclusive, up to which bytes are counted; default 95 % of the best.
    UserError if a directory has no run, a file is damaged, or the runs have no measure in common.
    """
    runs, notes = find_runs(folders)
    return compare(runs, notes, target)


def figures_available() -> bool:
    """Whether matplotlib is installed, which `write_report` needs."""
    return find_spec("matplotlib") is not None


def write_report(comparison: Comparison, out: Path, link: Link | None = None, files: bool = True) -> Path:
    """Writes `report.html` and, with ``files``, `figures/*.svg` and `*.png` into ``out``. Returns the page's path.

    With a ``link``, also draws accuracy against simulated time. The same runs give the same bytes. UserError if
    matplotlib is not installed or a ledger is damaged.
    """
    from rayfed.files import atomic_write
    from rayfed.reports.drawing import drawing, group_styles, save
    from rayfed.reports.figures import plots, run_plots
    from rayfed.reports.page import SINGLE_RUNS, page
    from rayfed.reports.traffic import read_traffic

    with drawing():
        runs = [run for group in comparison.groups for run in group.runs]
        ledgers = {run: ledger for run in runs if (ledger := read_traffic(run.folder)) is not None}
        styles = group_styles(comparison.groups, comparison.ranked)
        shared = list(plots(comparison, ledgers, styles, link))
        single = [list(run_plots(run, i)) for i, run in enumerate(runs, 1)] if len(runs) <= SINGLE_RUNS else []
        text = page(comparison, ledgers, styles, shared, single, link)
        if files:
            for plot in (*shared, *(plot for plots in single for plot in plots)):
                save(plot.figure(standalone=True), out / "figures" / plot.name, plot.title)
        atomic_write(out / "report.html", text)
    return out / "report.html"
