"""The W&B workspace for rayfed's runs. `SECTIONS` defines the panels as plain data; wandb-workspaces builds them.

The panels use only names that runs log: metrics of a round (the keys of `metrics.jsonl`), values of the W&B summary,
and settings by dotted key. W&B has no heat map of settings. So density and rank share a scatter plot with coloured
points, from red for the worst to green for the best. W&B abbreviates numbers of bytes (9.2M).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayfed.errors import UserError

WORST, BEST = "#d7301f", "#1a9850"


@dataclass(frozen=True)
class Curves:
    """Metrics of a round, ``y``, against another metric of a round, ``x``."""

    title: str
    x: str
    y: tuple[str, ...]


@dataclass(frozen=True)
class Points:
    """One point per run. ``x``, ``y`` and ``color`` are settings (`config:KEY`) or values of the summary."""

    title: str
    x: str
    y: str
    color: str | None = None
    gradient: tuple[str, str] = (WORST, BEST)  # colors of the lowest and the highest value


@dataclass(frozen=True)
class Parallel:
    """One line per run. Columns are settings (`config:KEY`) or values of the summary."""

    title: str
    columns: tuple[str, ...]


Panel = Curves | Points | Parallel
DENSITY_UP, DENSITY_DOWN, RANK = "config:wire.up.density", "config:wire.down.density", "config:lora.rank"
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Accuracy against bytes": (
        Curves(
            "Validation accuracy against bytes", "bytes/total",
            ("eval/accuracy", "eval/accuracy_masked", "eval_subset/accuracy"),
        ),
        Curves("Test accuracy against bytes", "bytes/total", ("test/accuracy", "test/accuracy_masked")),
        Points("Test accuracy and bytes of each run", "bytes/total", "final/test_accuracy"),
    ),
    "Density and rank": (
        Points("Accuracy by density and rank", DENSITY_UP, RANK, color="final/test_accuracy"),
        Points("Bytes by density and rank", DENSITY_UP, RANK, color="bytes/total", gradient=(BEST, WORST)),
        Parallel(
            "From settings to accuracy", (DENSITY_DOWN, DENSITY_UP, RANK, "bytes/total", "final/test_accuracy")
        ),
    ),
    "Accuracy of single clients (eval.clients)": (
        Curves(
            "Accuracy over the clients: 10 %, median, 90 %", "round",
            ("test/accuracy_clients_p10", "test/accuracy_clients_p50", "test/accuracy_clients_p90"),
        ),
        Curves("Mean accuracy over the clients against bytes", "bytes/total", ("test/accuracy_clients",)),
    ),
    "Cohort and time": (
        Curves("Effective cohort", "round", ("clients/ok", "clients/retried", "clients/split", "clients/diverged")),
        Curves("Seconds: server, training, total", "round", ("time/server_s", "time/train_s", "time/round_s")),
        Curves("Bytes per round", "round", ("bytes/down", "bytes/up")),
    ),
    "Training": (
        Curves("Loss", "round", ("train/loss", "eval/loss", "eval_subset/loss")),
        Curves("Share of the gap to the known answer", "bytes/total", ("eval/gap",)),
    ),
}  # fmt: skip


def build(project: str, entity: str = "", name: str = "rayfed") -> Any:
    """The `wandb_workspaces` Workspace with all panels. UserError if wandb-workspaces is not installed.

    The workspace's method `save()` sends it to W&B and needs a login.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError("workspace: wandb-workspaces is not installed: pip install -e '.[workspace]'") from None
    sections = [
        ws.Section(name=title, panels=[_panel(wr, panel) for panel in panels], is_open=number < 2)
        for number, (title, panels) in enumerate(SECTIONS.items())
    ]
    settings = ws.WorkspaceSettings(x_axis="round")
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def definition(workspace: Any) -> dict[str, Any]:
    """The workspace as the JSON that W&B stores. The ids of panels are random."""
    return workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)  # no public method exists


def _panel(wr: Any, panel: Panel) -> Any:
    if isinstance(panel, Curves):
        return wr.LinePlot(title=panel.title, x=panel.x, y=list(panel.y), title_x=panel.x)
    if isinstance(panel, Parallel):
        columns = [wr.ParallelCoordinatesPlotColumn(metric=_run_value(wr, name)) for name in panel.columns]
        return wr.ParallelCoordinatesPlot(title=panel.title, columns=columns)
    x, y = _run_value(wr, panel.x), _run_value(wr, panel.y)
    if panel.color is None:
        return wr.ScatterPlot(title=panel.title, x=x, y=y)
    gradient = [wr.GradientPoint(color=color, offset=offset) for color, offset in zip(panel.gradient, (0, 100))]
    return wr.ScatterPlot(title=panel.title, x=x, y=y, z=_run_value(wr, panel.color), gradient=gradient)


def _run_value(wr: Any, name: str) -> Any:
    return wr.Config(name.removeprefix("config:")) if name.startswith("config:") else wr.SummaryMetric(name)
