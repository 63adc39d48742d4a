"""The charts of a single run that are no curves: who trained when, accuracies by client and by experience, the
confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayfed.reports import drawing
from rayfed.reports.drawing import INK, MUTED, PAPER, ramp

NAMED = 25  # largest number of classes with names on the axes
Trained = Mapping[int, Sequence[Sequence[int]]]  # round -> [client, rank] of each client that trained


def trained(rounds: Trained) -> Any:
    """One square for every client and round in which the client trained, coloured by its rank."""
    ranks = sorted({rank for pairs in rounds.values() for _, rank in pairs})
    figure, axes = drawing.blank(3.6)
    clients = [client for pairs in rounds.values() for client, _ in pairs]
    size = min(6.0, 200 / (1 + max(rounds) - min(rounds)), max(1.5, 170 / (1 + max(clients) - min(clients))))
    handles = []
    for rank, color in zip(ranks, ramp(len(ranks))):
        points = [(t, client) for t, pairs in rounds.items() for client, own in pairs if own == rank]
        handles += axes.plot(*zip(*points), "s", color=color, markersize=size, markeredgewidth=0)
    axes.set_ylabel("client")
    axes.set_xlabel("round")
    for axis in (axes.xaxis, axes.yaxis):
        drawing.number_axis(axis, whole=True)
    drawing.legend(axes, handles, [f"rank {rank}" for rank in ranks])
    return figure


def client_accuracies(accuracies: Sequence[float | None], ranks: Mapping[int, int]) -> Any:
    """One point for each client that has an accuracy, the lowest first, coloured by ``ranks``: client -> rank."""
    order = sorted((value, client) for client, value in enumerate(accuracies) if value is not None)
    figure, axes = drawing.blank(3.0)
    groups: dict[int | None, list[tuple[int, float]]] = {}
    for place, (value, client) in enumerate(order, 1):
        groups.setdefault(ranks.get(client), []).append((place, value))
    known = sorted(rank for rank in groups if rank is not None)
    colors: dict[int | None, str] = {None: MUTED, **dict(zip(known, ramp(len(known))))}
    shown = [*known, *([None] if None in groups else [])]
    style: Any = {"markersize": min(5.0, 200 / len(order)), "markeredgewidth": 0}
    handles = [axes.plot(*zip(*groups[rank]), "o", color=colors[rank], **style)[0] for rank in shown]
    axes.set_xlabel("clients, the lowest accuracy first")
    axes.set_ylabel("test accuracy")
    drawing.number_axis(axes.xaxis, whole=True)
    drawing.number_axis(axes.yaxis, percent=True)
    drawing.legend(axes, handles, ["has not trained" if rank is None else f"rank {rank}" for rank in shown])
    return figure


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Any:
    """The confusion matrix: labels down, predictions across, coloured by the share of the label's rows."""
    from matplotlib.patches import Rectangle

    steps = ramp(8)
    figure, axes = drawing.blank(4.2)
    few = len(matrix) <= NAMED
    axes.grid(False)
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            if count:
                step = min(int(len(steps) * count / sum(row)), len(steps) - 1)
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=steps[step], linewidth=0))
                if few and len(matrix) <= 12:
                    ink = INK if step < len(steps) // 2 else PAPER
                    axes.text(j, i, f"{count:,}", ha="center", va="center", size=7, color=ink)
    axes.set(xlim=(-0.5, len(matrix) - 0.5), ylim=(len(matrix) - 0.5, -0.5), xlabel="prediction", ylabel="label")
    if few:
        names = classes if len(classes) == len(matrix) else [str(i) for i in range(len(matrix))]
        shown = [drawing.shortened(name, 14) for name in names]
        axes.set_xticks(range(len(matrix)), shown, rotation=90)
        axes.set_yticks(range(len(matrix)), shown)
    return figure


def experiences(accuracies: Sequence[Sequence[float | None]]) -> Any:
    """Row t, column j: the accuracy after experience t on the test rows of experience j, written into the cell."""
    from matplotlib.patches import Rectangle

    steps, count = ramp(8), len(accuracies)
    figure, axes = drawing.blank(1.2 + 0.3 * count)
    axes.grid(False)
    for t, row in enumerate(accuracies, 1):
        for j, value in enumerate(row, 1):
            if value is None:
                continue
            step = min(int(len(steps) * value), len(steps) - 1)
            axes.add_patch(Rectangle((j - 0.48, t - 0.48), 0.96, 0.96, facecolor=steps[step], linewidth=0))
            if count <= NAMED:
                ink = INK if step < len(steps) // 2 else PAPER
                axes.text(j, t, f"{100 * value:.0f}", ha="center", va="center", size=7, color=ink)
    axes.set(xlim=(0.5, count + 0.5), ylim=(count + 0.5, 0.5))
    axes.set(xlabel="test rows of experience", ylabel="after experience")
    for axis in (axes.xaxis, axes.yaxis):
        drawing.number_axis(axis, whole=True)
    return figure
