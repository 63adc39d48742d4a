"""The page: one HTML file, also well-formed XML, without scripts and without references to other files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

from rayfed import __version__
from rayfed.reports import table
from rayfed.reports.compare import Comparison
from rayfed.reports.drawing import MUTED, Styles, css, inline_svg, swatch
from rayfed.reports.figures import Plot
from rayfed.reports.labels import printable
from rayfed.reports.table import Ledgers, as_percent
from rayfed.reports.traffic import Link
from rayfed.tracking import Table
from rayfed.tracking.format import megabytes

SINGLE_RUNS = 6  # largest number of runs that get their own sections
HEADINGS = {
    "curves": "Accuracy and traffic",
    "target": "Bytes to the target",
    "pareto": "Pareto front",
    "grid": "Density and rank",
    "traffic": "Traffic by part",
    "mix": "Ranks and densities",
}
GAP_HEADING = "Gap and traffic"  # in place of the first one, where the measure is a gap
STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.2rem;margin:2rem 0 .5rem;border-top:1px solid var(--grid);padding-top:1rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
.lead{font-size:1.1rem}
.figures{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));align-items:start}
figure{margin:0;max-width:38rem}
figure>svg{display:block;width:100%;height:auto}
figure svg text{font-family:system-ui,sans-serif}
figcaption{font-size:.85rem}
figcaption b{display:block;font-size:.95rem}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.5rem 0 1rem;padding:0;font-size:.9rem}
.key li{display:flex;align-items:center;gap:.4rem}
.swatch{width:28px;height:12px;flex:none}
.wide{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-size:.85rem;padding-bottom:.3rem}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap;
vertical-align:bottom}
thead th{white-space:normal;min-width:4.2rem}
tbody th,th:first-child{text-align:left;padding-left:0;font-weight:600;position:sticky;left:0;background:var(--paper);
white-space:normal;min-width:min(13rem,36vw);max-width:16rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .8rem;margin:.3rem 0;font-size:.88rem}
dt{opacity:.75}dd{margin:0;overflow-wrap:anywhere}
.note{font-size:.88rem}
:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
@media print{
body{max-width:none;padding:0;font-size:10pt}
h2,h3,.key,dl{break-after:avoid}figure,tr,dl{break-inside:avoid}
.wide{overflow:visible}table{font-size:7pt}th,td{padding:.15rem .3rem}
.figures{grid-template-columns:1fr 1fr}
svg,th,td{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""


def page(
    comparison: Comparison, ledgers: Ledgers, styles: Styles, plots: Sequence[Plot], single: Sequence[Sequence[Plot]],
    link: Link | None,
) -> str:  # fmt: skip
    """The HTML of the page. ``plots`` are the figures of the comparison, ``single`` the figures of each run."""
    title = _title(comparison)
    body = [f"<h1>{_text(title)}</h1>", *(f'<p class="lead">{_text(line)}</p>' for line in _lead(comparison))]
    body += [f'<p class="note">{_text(note)}</p>' for note in comparison.notes]
    body += ["<h2>Summary</h2>", _table(table.summary(comparison))]
    if comparison.differing:
        body += ["<h2>Settings that differ</h2>", _table(table.differing(comparison), caption=False)]
    tables = {
        "pareto": _table(table.front(comparison), caption=False),
        "traffic": _table(table.parts(comparison, ledgers), caption=False),
        "mix": _table(table.mix(comparison)),
    }
    for section, heading in HEADINGS.items():
        here = [plot for plot in plots if plot.section == section]
        if not here and section != "mix":
            continue
        body.append(
            f"<h2>{GAP_HEADING if section == 'curves' and comparison.measure.lower_is_better else heading}</h2>"
        )
        if any(plot.shared_legend for plot in here):
            body.append(_legend(comparison, styles))
        body += [_figures(here), tables.get(section, "")]
    runs = [run for group in comparison.groups for run in group.runs]
    if single:
        body.append(f"<h2>{'Run by run' if len(runs) > 1 else 'The run'}</h2>")
    for run, figures in zip(runs, single):
        name = run.folder.resolve().name
        body += [f"<h3>{_text(name)}</h3>" if len(runs) > 1 else "", _facts(table.facts(run)), _figures(figures)]
    if not single:
        body.append('<p class="note">Figures of a single run: <code>rayfed report</code> with its directory.</p>')
    body += [
        "<h2>How to read this</h2>",
        *(f"<p class='note'>{_text(line)}</p>" for line in _explanations(comparison, link)),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"/>'
        f'<meta name="generator" content="rayfed {__version__}"/>'
        f"<title>{_text(title)}</title><style>{css()}{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _title(comparison: Comparison) -> str:
    if len(comparison.groups) == 1:
        return comparison.groups[0].label
    runs = sum(len(group.runs) for group in comparison.groups)
    return f"{len(comparison.groups)} settings compared" + (f", {runs} runs" if runs > len(comparison.groups) else "")


def _lead(comparison: Comparison) -> Iterable[str]:
    """The main results: the best score, and the fewest bytes to the target."""
    measure, best = comparison.measure, comparison.ranked[0]
    several = len(comparison.groups) > 1
    if best.score is None:
        yield "No run has a finite value."
        return
    report = best.mean(lambda r: r.report) if measure.report else None
    tested = f", {as_percent(report, measure)} on test" if report is not None else ""
    sent = megabytes(best.mean(lambda r: r.best_bytes))
    first = f"Best is {best.label}:" if several else "Reached"
    yield f"{first} {as_percent(best.score, measure)} {measure.label}{tested}, for {sent} MB both ways."
    reached = [(size, group.label) for group in comparison.groups if (size := group.target_bytes) is not None]
    if comparison.target is not None and several and reached:
        fewest, label = min(reached, key=lambda pair: pair[0])
        yield (
            f"Fewest bytes to {as_percent(comparison.target, measure)} {measure.label}: {label}, "
            f"{megabytes(fewest)} MB; {len(reached)} of {len(comparison.groups)} reach it."
        )


def _explanations(comparison: Comparison, link: Link | None) -> Iterable[str]:
    measure = comparison.measure
    yield "1 MB is 1e6 bytes. Bytes are the lengths of the encoded messages of all clients, with headers and indices."
    if measure.selects_round:
        yield "The best round has the best validation accuracy. Its test accuracy has no part in the choice."
    elif measure.lower_is_better:
        yield "The gap is (F(W) - F(W*)) / (F(0) - F(W*)), computed exactly. The last round counts."
    else:
        yield "There is no validation split, so no round is chosen: the last test accuracy counts."
    if comparison.target is not None:
        default = (
            "what is left after 95 % of the best reduction" if measure.lower_is_better else "95 % of the best mean"
        )
        yield (
            f"The target is {as_percent(comparison.target, measure)} {measure.label} "
            f"({'given' if comparison.given_target else default}), the dotted line in the curves. A run reaches the "
            "target in the first evaluated round at or beyond it."
        )
    if any(len(group.runs) > 1 for group in comparison.groups):
        yield (
            "Runs that differ in the seed alone are one group: curves show the mean, tables the mean ± the sample "
            "standard deviation."
        )
    if link is not None:
        yield f"Simulated time: {link}; each client downloads, then uploads; no latency, no training time."


def _legend(comparison: Comparison, styles: Styles) -> str:
    if len(comparison.groups) == 1:
        return ""
    items = [f"<li>{swatch(style.color, style.dash)}{_text(group.label)}</li>" for group, style in styles.items()]
    if rest := len(comparison.groups) - len(styles):
        words = f"{rest} more, with a worse {comparison.measure.label}"
        items.append(f"<li>{swatch(MUTED, '-')}{words}</li>")
    return f'<ul class="key">{"".join(items)}</ul>'


def _figures(plots: Iterable[Plot]) -> str:
    cells = []
    for plot in plots:
        svg = inline_svg(plot.figure(standalone=False), plot.name, plot.title, plot.caption or plot.title)
        cells.append(f"<figure>{svg}<figcaption><b>{_text(plot.title)}</b>{_text(plot.caption)}</figcaption></figure>")
    return f'<div class="figures">{"".join(cells)}</div>' if cells else ""


def _table(table: Table, caption: bool = True) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    above = f"<caption>{_text(table.title)}</caption>" if caption else ""
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{_text(table.title)}"><table>{above}'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(name)}</dt><dd>{_text(value)}</dd>' for name, value in facts)}</dl>"


def _text(text: str) -> str:
    """Escaped for HTML and XML, also inside an attribute. A number and its unit stay on one line."""
    shown = printable(text)
    for unit in ("%", "MB "):
        shown = shown.replace(f" {unit}", f"\N{NO-BREAK SPACE}{unit}")
    return escape(shown, {'"': "&quot;"})
