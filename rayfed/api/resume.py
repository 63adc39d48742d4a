"""A run that is resumed: its settings must be those of its directory, up to the number of rounds."""

from __future__ import annotations

from pathlib import Path

from rayfed import config
from rayfed.clients.plan import RunPlan
from rayfed.config import Experiment
from rayfed.config.load import dump_settings
from rayfed.config.marks import depends_on_rounds, differences
from rayfed.errors import UserError
from rayfed.server import checkpoint as checkpoints
from rayfed.server.change_rounds import change_rounds, last_common
from rayfed.server.checkpoint import Checkpoint


def check_settings(out: Path, known: Experiment, now: Experiment) -> None:
    """UserError where a run that ``out`` has with the settings ``known`` cannot go on with the settings ``now``."""
    if known.digest() == now.digest():
        return
    before, after = known.server.rounds, now.server.rounds
    if now.model_copy(update={"server": now.server.model_copy(update={"rounds": before})}).digest() != known.digest():
        changed = differences(known.model_dump(mode="json"), now.model_dump(mode="json"))
        raise UserError(
            f"--resume: {out} was made with other settings (digest {known.digest()}, these have {now.digest()}): "
            f"{changed}; resume with its config.yaml or choose another --out"
        )
    done = next(iter(checkpoints.manifests(out / "checkpoints")), None)
    if done is None:
        return
    anew = (
        f"start a new run from its adapter, model.adapter={out}" if (out / "adapter").is_dir() else "name another --out"
    )
    got = f"server.rounds: got {after}, but"
    if after < done.round:
        raise UserError(f"{got} the run in {out} has done {done.round} rounds")
    if (tied := depends_on_rounds(now, before, after)) is not None:
        raise UserError(f"{got} the run in {out} was made for {before}, and {tied} depends on the number; {anew}")
    common = _last_common(out, known, now)
    if common is None:
        raise UserError(
            f"{got} round {done.round} in {out} was evaluated only as the last one (eval.every={now.eval.every}), and "
            f"no checkpoint is left from before it; {anew}"
        )
    if common.progress["stopped"]:
        raise UserError(
            f"{got} the run in {out} was ended after round {common.round}, by eval.early_stop, server.max_mb or a "
            f"callback; {anew}"
        )


def follow_settings(out: Path, plan: RunPlan) -> None:
    """Makes the run directory one of the plan's settings, where these have another number of rounds.

    `check_settings` has allowed it.
    """
    if not (out / "config.yaml").is_file():
        return
    known, now = config.load_config(out / "config.yaml"), config.validate(dict(plan.settings))
    if known.digest() != now.digest() and (common := _last_common(out, known, now)) is not None:
        change_rounds(out, common, plan.digest, dump_settings(dict(plan.settings)))


def _last_common(out: Path, known: Experiment, now: Experiment) -> Checkpoint | None:
    before, after = known.server.rounds, now.server.rounds

    def same(round: int) -> bool:
        return known.eval.full(round, before) == now.eval.full(round, after)

    return last_common(out, after, same)
