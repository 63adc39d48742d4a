"""Runs from Python: `run` to the end, or `iter_rounds` one round at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rayfed import config
from rayfed.api.plans import Components, Settings, build_components, describe_objects, make_plan, read_settings
from rayfed.api.resume import check_settings, follow_settings
from rayfed.clients.plan import RunPlan
from rayfed.config import Experiment
from rayfed.engine.callbacks import Callback, check_callbacks
from rayfed.engine.local_executor import run_here
from rayfed.errors import UserError
from rayfed.files import PARTIAL, remove_path
from rayfed.keywords import suggest_keywords
from rayfed.methods import Method
from rayfed.run_directory import check_out, disk_errors, locked_out, share_lock
from rayfed.server.change_rounds import complete
from rayfed.storage import RemoteFolder, fetch, is_uri, local_folder, uploaded
from rayfed.tasks.base import Task
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.models.cache import forget_base
from rayfed.tracking import Record, Sink, SinkList, Table, open_console, read_metrics

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory, the summary figures, the number of rounds done."""

    out: Path
    summary: Mapping[str, Any]

    @property
    def rounds(self) -> int:
        """Rounds done."""
        return int(self.summary["rounds"])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl, one mapping a round."""
        return read_metrics(self.out / "metrics.jsonl")

    @cached_property
    def history(self) -> pandas.DataFrame:
        """metrics.jsonl as a DataFrame: one row a round, indexed by `round`, the other keys as columns.

        A value that was not measured is NaN or None. Lists stay lists.
        """
        import pandas

        return pandas.DataFrame(self.metrics).set_index("round")


class Rounds(Iterator[Record]):
    """The rounds of a run, as `iter_rounds` gives them.

    Iterate it to get each round's record. The next round begins when its record is asked for. After the last round the
    results are exported, and `result` is there. `close`, the end of a `with` block, or the end of a `for` loop over a
    `Rounds` without another name, stops the run: what was done is in its checkpoint.
    """

    def __init__(self, records: Generator[Record, None, RunResult]) -> None:
        self._records = records
        self._result: RunResult | None = None

    def __next__(self) -> Record:
        try:
            return next(self._records)
        except StopIteration as end:
            self._result = self._result or end.value
            raise StopIteration from None

    @property
    def result(self) -> RunResult:
        """What `run` returns. UserError before the iteration has reached its end."""
        if self._result is None:
            raise UserError("result: the run has no result yet; iterate over its rounds to the end")
        return self._result

    def close(self) -> None:
        """Stops the run after the last finished round, with a checkpoint, and frees its folder. Resume goes on."""
        self._records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@suggest_keywords
def run(
    experiment: Settings, out: str | Path | None = None, resume: bool = False, *, task: Task | None = None,
    method: Method | None = None, callbacks: Sequence[Callback] = (), sink: Sink | None = None,
    federation: Federation | None = None,
) -> RunResult:  # fmt: skip
    """Runs the experiment to the end and returns what came out.

    Args:
        experiment: settings: an `Experiment`, the path of a YAML file, or a mapping of sections as in such a file.
        out: the run directory (default `runs/NAME-TIME`), or the URI of an object store, to which the directory is
            uploaded after every checkpoint and at the end. It must be empty or absent unless ``resume``.
        resume: continues from the last whole checkpoint, from the start where there is none.
        task: what is learned, in place of the sections `data` and `model`: `rayfed.TextClassification(...)` with your
            own rows, or an object of your own subclass of `rayfed.Task`.
        method: an object of a subclass of `rayfed.Method`, in place of the section `method`.
        callbacks: `rayfed.Callback` objects, called between the rounds.
        sink: receives what the console shows.
        federation: data that are loaded already, see `prepare`.

    Raises UserError before anything is started or written where something is wrong, RunError where a started run cannot
    go on.
    """
    with _rounds(experiment, out, resume, task, method, callbacks, sink, federation, waits=False) as rounds:
        for _ in rounds:
            pass
        return rounds.result


@suggest_keywords
def iter_rounds(
    experiment: Settings, out: str | Path | None = None, resume: bool = False, *, task: Task | None = None,
    method: Method | None = None, callbacks: Sequence[Callback] = (), sink: Sink | None = None,
    federation: Federation | None = None,
) -> Rounds:  # fmt: skip
    """The same run, one round at a time: an iterator over the records of rounds, see `Rounds`.

        rounds = rayfed.iter_rounds("config.yaml", out="runs/a")
        for record in rounds:
            print(record["round"], record["train/loss"])
        rounds.result.history

    Arguments as in `run`. Settings and parts are checked at once; data and model when the first record is asked for.
    """
    return _rounds(experiment, out, resume, task, method, callbacks, sink, federation, waits=True)


def _rounds(
    experiment: Settings, out: str | Path | None, resume: bool, task: Task | None, method: Method | None,
    callbacks: Sequence[Callback], sink: Sink | None, federation: Federation | None, waits: bool,
) -> Rounds:  # fmt: skip
    settings = describe_objects(read_settings(experiment), task, method)
    parts = build_components(settings, task, method)
    checked = check_callbacks(callbacks)
    return Rounds(_records(settings, parts, out, resume, checked, sink, federation, waits))


def _records(
    experiment: Experiment, parts: Components, out: str | Path | None, resume: bool, callbacks: Sequence[Callback],
    sink: Sink | None, federation: Federation | None, waits: bool,
) -> Generator[Record, None, RunResult]:  # fmt: skip
    """Runs the experiment: yields each round's record, and returns the RunResult."""
    uri = str(out) if out is not None and is_uri(str(out)) else None
    remote = RemoteFolder(uri) if uri else None
    with locked_out(local_folder(uri) if uri else out, experiment.name, resume) as folder:
        if remote:
            fetch(remote, folder, resume)
        plan = make_plan(_check_out(folder, experiment, resume), parts, federation)
        summary = _Summary()
        console = SinkList(open_console(plan.tracking), summary, *([sink] if sink else []))
        with uploaded(remote, folder), disk_errors(folder), closing(console):
            for leftover in folder.rglob(PARTIAL):
                remove_path(leftover)
            follow_settings(folder, plan)
            yield from _started(plan, folder, resume, uri, console, callbacks, waits)
    return RunResult(folder, summary.figures)


def _started(
    plan: RunPlan, out: Path, resume: bool, uri: str | None, console: Sink, callbacks: Sequence[Callback], waits: bool
) -> Iterator[Record]:
    if plan.engine.kind == "local":
        return run_here(plan, out, resume, uri, console, callbacks)
    from rayfed.engine.driver import run_on_ray  # here: a run without Ray need not import it

    forget_base()
    share_lock(out)  # with the driver
    return run_on_ray(plan, out, resume, uri, console, callbacks, waits)


def _check_out(out: Path, experiment: Experiment, resume: bool) -> Experiment:
    """A fresh run needs a new or empty folder; a resumed one the settings that its folder was made with.

    Returns the settings to run with: `engine.pack: auto` was chosen when the folder was made, and is that number now.
    """
    if not check_out(out, resume, "run", "config.yaml"):
        return experiment
    complete(out)
    known = config.load_config(out / "config.yaml")
    if experiment.engine.pack == "auto" and known.engine.pack != "auto":
        engine = experiment.engine.model_copy(update={"pack": known.engine.pack})
        experiment = experiment.model_copy(update={"engine": engine})
    check_settings(out, known, experiment)
    return experiment


class _Summary(Sink):
    """Keeps the summary of a run."""

    def __init__(self) -> None:
        self.figures: Mapping[str, Any] = {}

    def finish(self, summary: Record, table: Table | None) -> None:
        self.figures = summary
