"""The W&B workspace for rayfed's runs: its panels and their metrics as plain data, which wandb-workspaces builds.

`SECTIONS` is the definition. It names only what runs write: metrics of a round (the keys of `metrics.jsonl`), figures
of the summary, settings by dotted key. W&B has no heat map of settings among its panels: density x rank is a scatter
plot whose points are coloured, red for the worst and green for the best. Bytes are shown as they are logged; W&B
abbreviates them (9.2M).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayfed.errors import UserError

WORST, BEST = "#d7301f", "#1a9850"


@dataclass(frozen=True)
class Curves:
    """Metrics of a round against another of them."""

    title: str
    x: str
    y: tuple[str, ...]


@dataclass(frozen=True)
class Points:
    """One point a run: ``x``, ``y`` and the colour are settings (`config:KEY`) or figures of the summary."""

    title: str
    x: str
    y: str
    color: str | None = None
    more_is_better: bool = True


@dataclass(frozen=True)
class Parallel:
    """One line a run through columns: settings (`config:KEY`) or figures of the summary."""

    title: str
    columns: tuple[str, ...]


Panel = Curves | Points | Parallel
DENSITY_UP, DENSITY_DOWN, RANK = "config:wire.up.density", "config:wire.down.density", "config:lora.rank"
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Accuracy against bytes": (
        Curves("Validation accuracy against bytes", "bytes/total", ("eval/accuracy", "eval/accuracy_masked")),
        Curves("Test accuracy against bytes", "bytes/total", ("test/accuracy", "test/accuracy_masked")),
        Points("What each run reached, for how many bytes", "bytes/total", "final/test_accuracy"),
    ),
    "Density and rank": (
        Points("Accuracy by density and rank", DENSITY_UP, RANK, color="final/test_accuracy"),
        Points("Bytes by density and rank", DENSITY_UP, RANK, color="bytes/total", more_is_better=False),
        Parallel(
            "From settings to accuracy", (DENSITY_DOWN, DENSITY_UP, RANK, "bytes/total", "final/test_accuracy")
        ),
    ),
    "What each client gets (eval.clients)": (
        Curves(
            "Accuracy over the clients: 10 %, median, 90 %", "round",
            ("test/accuracy_clients_p10", "test/accuracy_clients_p50", "test/accuracy_clients_p90"),
        ),
        Curves("Mean accuracy over the clients against bytes", "bytes/total", ("test/accuracy_clients",)),
    ),
    "Cohort and time": (
        Curves("Effective cohort", "round", ("clients/ok", "clients/retried", "clients/split")),
        Curves("Seconds: server, training, whole round", "round", ("time/server_s", "time/train_s", "time/round_s")),
        Curves("Bytes a round", "round", ("bytes/down", "bytes/up")),
    ),
    "Training": (
        Curves("Loss", "round", ("train/loss", "eval/loss")),
        Curves("Share of the gap to the known answer", "bytes/total", ("eval/gap",)),
    ),
}  # fmt: skip


def names(panel: Panel) -> tuple[str, ...]:
    """Everything that the panel shows: metrics, figures of the summary, settings as `config:KEY`."""
    if isinstance(panel, Curves):
        return panel.x, *panel.y
    if isinstance(panel, Parallel):
        return panel.columns
    return tuple(name for name in (panel.x, panel.y, panel.color) if name is not None)


def build(project: str, entity: str = "", name: str = "rayfed") -> Any:
    """The definition as a `wandb_workspaces` Workspace, whose `save()` needs a login. UserError without the package."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError("workspace: wandb-workspaces is not installed: pip install 'rayfed[workspace]'") from None
    sections = [
        ws.Section(name=title, panels=[_panel(wr, panel) for panel in panels], is_open=number < 2)
        for number, (title, panels) in enumerate(SECTIONS.items())
    ]
    settings = ws.WorkspaceSettings(x_axis="round")
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def definition(workspace: Any) -> dict[str, Any]:
    """The workspace as the JSON that W&B stores for it. Ids of panels are drawn anew each time."""
    return workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)  # there is no public way


def _panel(wr: Any, panel: Panel) -> Any:
    if isinstance(panel, Curves):
        return wr.LinePlot(title=panel.title, x=panel.x, y=list(panel.y), title_x=panel.x)
    if isinstance(panel, Parallel):
        columns = [wr.ParallelCoordinatesPlotColumn(metric=_of_a_run(wr, name)) for name in panel.columns]
        return wr.ParallelCoordinatesPlot(title=panel.title, columns=columns)
    x, y = _of_a_run(wr, panel.x), _of_a_run(wr, panel.y)
    if panel.color is None:
        return wr.ScatterPlot(title=panel.title, x=x, y=y)
    colors = (WORST, BEST) if panel.more_is_better else (BEST, WORST)
    gradient = [wr.GradientPoint(color=color, offset=offset) for color, offset in zip(colors, (0, 100))]
    return wr.ScatterPlot(title=panel.title, x=x, y=y, z=_of_a_run(wr, panel.color), gradient=gradient)


def _of_a_run(wr: Any, name: str) -> Any:
    return wr.Config(name.removeprefix("config:")) if name.startswith("config:") else wr.SummaryMetric(name)
