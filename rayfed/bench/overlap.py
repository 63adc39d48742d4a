"""Runs whose rounds are evaluated beside the next one's training, against the same runs evaluated at once.

Both on the same Ray workers, in turn. The last round has nothing beside it and is evaluated at once by both, so a long
run gains a little more. What comes out must be the same, or the times say nothing: `same` says so.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from rayfed.bench.round import SETTINGS
from rayfed.bench.timing import Row, compared, timed
from rayfed.clients.blueprint import draw_blueprint
from rayfed.config import Experiment, validate
from rayfed.config.load import assign
from rayfed.engine.driver import stepwise
from rayfed.server.loop import Server
from rayfed.tasks.federation import form_federation
from rayfed.tracking import Fan

PAIRS = 5
SHORT = {"eval.every": 1, "server.rounds": 5, "data.examples": 2000, "partition.clients": 100}


def measure(**overrides: Any) -> list[Row]:
    """MiniLM, evaluated every round: in packs of 5, one for each of two workers, and of 4, three for the two.

    ``overrides`` change the settings, by dotted keys.
    """
    settings = copy.deepcopy(SETTINGS)
    for key, value in {**SHORT, **overrides}.items():
        assign(settings, key, value, f"{key}={value}")
    rows = []
    for pack in [overrides["engine.pack"]] if "engine.pack" in overrides else [5, 4]:
        settings["engine"]["pack"] = pack
        rows.append(compare(validate(settings)))
    return rows


def compare(experiment: Experiment, pairs: int = PAIRS) -> Row:
    """One row: whole runs, from the first cohort to the last record."""
    federation = form_federation(experiment)
    blueprint = draw_blueprint(experiment, len(federation.classes))
    found: dict[bool, list[dict[str, Any]]] = {}

    with tempfile.TemporaryDirectory() as folder, stepwise(experiment, federation, blueprint, Path(folder)) as first:

        def run(overlap: bool) -> None:
            with tempfile.TemporaryDirectory() as out:
                server = Server(first.experiment, federation, blueprint, first.crew, Path(out), Fan(), resume=False)
                server.overlap = overlap
                found[overlap] = [
                    {key: value for key, value in record.items() if not key.startswith("time/")}
                    for record in server.rounds()
                ]

        run(True)  # the workers warm up
        times = [[timed(partial(run, overlap))[0] for overlap in (True, False)] for _ in range(pairs)]
    name = f"{experiment.server.rounds} rounds, packs of {experiment.engine.pack}"
    a, b = "evaluated beside training", "evaluated at once"
    row = compared(name, a, b, [fast for fast, _ in times], [slow for _, slow in times], elsewhere=True)
    row.facts["same"] = found[True] == found[False]
    return row
