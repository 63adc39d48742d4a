"""A run that continues the finished run of other settings, with exactly the same model.

A setting that is `live` in `rayfed.config.marks`, such as a rate or a density, does not change the meaning of a
checkpoint. The method's tensors, the clients' own tensors and the record of who has merged which base update are then
copied bit for bit, for every method. At a larger rank, the tensors grow.

A layer's pair grows from rank r to R by new rows of A and zero columns of B, so the product stays the same. The new
rows are those with which a run of rank R would have started. If the scale alpha / r changes with the rank, B is
multiplied by the ratio of the scales: exact if the ratio is a power of two, else up to the rounding of float32. The
moments of the server optimizer grow in the same way: those of B by the ratio, second moments by its square, and new
entries get the values of a new run. (An adaptive server optimizer then takes steps of another length: it is not
invariant to scale.)

Only states that consist of factors can grow: those of `fedit`, and of `flasc` with a refreshed mask.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rayfed.api.plans import build_components
from rayfed.config import Experiment, dump_config, load_config
from rayfed.config.method import Lora
from rayfed.errors import UserError, allowed
from rayfed.files import atomic_path, atomic_write, write_json
from rayfed.lora.adapter import Adapter, Layout, LowRank, fresh_adapter, scale_of
from rayfed.lora.algebra import pad, rescale
from rayfed.methods.fedit import FedIT
from rayfed.methods.flasc import Flasc
from rayfed.objectives import Stateful
from rayfed.server import checkpoint as checkpoints
from rayfed.server.optimizers import ServerOptimizer

Tensors = dict[str, Tensor]
SQUARES = ("v", "exp_avg_sq")  # moments of squared gradients
CONSTANT = {"client.schedule.kind": "constant", "server.schedule.kind": "constant", "eval.controls": False}
"""Overrides of trials that later trials continue: constant rates after the warm-up, and nothing at the end."""
NOTE = "continues.json"  # in the run's directory: the continued trial, its round, and the digest of that state
RANK = ("lora.rank", "lora.alpha", "lora.rslora")


def check_rank_change(experiment: Experiment) -> None:
    """UserError where a run with these settings could not be continued at another rank or density."""
    method, profiles, train = experiment.method.name, experiment.profiles.kind, experiment.lora.train
    if not isinstance(build_components(experiment).method, FedIT | Flasc):
        raise UserError(
            f"method.name: got {method!r}, but sweep.search continues runs at another rank; allowed are flasc and fedit"
        )
    objective = build_components(experiment).objective
    if isinstance(objective, Stateful) and objective.entrywise:
        what = "sweep.search continues runs at another rank, and its vectors have one rank: allowed is fedprox or plain"
        raise allowed("objective.name", experiment.objective.name, what)
    if profiles != "same":
        raise UserError(f"profiles.kind: got {profiles!r}, but sweep.search sets one rank for all clients: same")
    if train == "head":
        raise UserError(f"lora.train: got {train!r}, but sweep.search searches a rank; allowed is all")
    check_live_change(experiment, ["wire.up.density"])


def check_live_change(experiment: Experiment, varied: Iterable[str]) -> None:
    """UserError where a run with these settings could not be continued with other values of ``varied``."""
    method = build_components(experiment).method
    if isinstance(method, Flasc) and method.mask == "fixed" and any(key.startswith("wire.") for key in varied):
        raise UserError("method.mask: got 'fixed', but sweep.search changes the density; allowed is refresh")
    if experiment.eval.early_stop is not None:
        raise UserError("eval.early_stop: got a section, but sweep.search compares runs of equal length: null")
    if experiment.server.max_mb is not None:
        raise allowed("server.max_mb", experiment.server.max_mb, "sweep.search compares runs of equal length: null")


def warm_start(source: Path, folder: Path, experiment: Experiment) -> None:
    """Makes ``folder`` a run of ``experiment`` that has already done the rounds of the finished run in ``source``.

    ``experiment`` has other live settings or more rounds than the source; or also another rank, if `check_rank_change`
    allows that. config.yaml is written last: a folder without it counts as empty.
    """
    settings = load_config(source / "config.yaml")
    found, _ = checkpoints.restore(source, settings.digest())
    if found is None or found.checkpoint.round > experiment.server.rounds:
        raise UserError(f"{source}: no checkpoint to continue for {experiment.server.rounds} rounds")
    method, optimizer = found.method, found.optimizer
    checkpoint = replace(found.checkpoint, experiment=experiment.digest())
    if any(getattr(settings.lora, key) != getattr(experiment.lora, key) for key in ("rank", "alpha", "rslora")):
        checkpoint, method, optimizer = _grown(checkpoint, method, optimizer, experiment)
    keep = experiment.checkpoint.keep
    checkpoints.save(folder / "checkpoints", checkpoint, method, optimizer, keep, found.objective)
    for stored in (*found.clients.values(), *found.objective_clients.values()):
        copy = folder / stored.path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(stored.path, copy)
    shutil.copyfile(source / "metrics.jsonl", folder / "metrics.jsonl")
    with atomic_path(folder / "ledger.parquet") as ledger:
        shutil.copytree(source / "ledger.parquet", ledger, ignore=shutil.ignore_patterns(".*"))
    note = {"trial": source.name, "round": checkpoint.round, "state/digest": found.checkpoint.digest}
    write_json(folder / NOTE, note)
    atomic_write(folder / "config.yaml", dump_config(experiment))


def _grown(
    checkpoint: checkpoints.Checkpoint, method: Tensors, optimizer: Tensors, experiment: Experiment
) -> tuple[checkpoints.Checkpoint, Tensors, Tensors]:
    """The checkpoint, the method's tensors and the optimizer's tensors, at the rank of ``experiment``."""
    old = Layout.from_json(checkpoint.facts["layout"])
    start = _fresh(old, method["vector"], experiment.lora, experiment.seed)
    grown = {"vector": grow(method["vector"], old, start)}
    eps = ServerOptimizer(build_components(experiment).server_optimizer, experiment.server).eps
    moments = grow_moments(optimizer, old, start, eps)
    digest = checkpoints.state_digest(checkpoint.round, grown, moments)
    facts = {**checkpoint.facts, "layout": start.layout.to_json()}
    return replace(checkpoint, digest=digest, facts=facts), grown, moments


def grow(vector: Tensor, old: Layout, start: Adapter) -> Tensor:
    """The adapter (n,) of layout ``old``, in the layout of ``start``, a new adapter of the same layers: same products.

    ValueError if ``start`` has a smaller rank.
    """
    before = old.unflatten(vector)
    layers = {}
    for name, new in start.layers.items():
        pair = before.layers[name]
        layers[name] = pad(pair if pair.scale == new.scale else rescale(pair, new.scale), new.rank, new.A)
    return Adapter(layers, before.head).flatten()


def grow_moments(moments: Mapping[str, Tensor], old: Layout, start: Adapter, eps: float) -> dict[str, Tensor]:
    """The server optimizer's tensors for the grown adapter. Tensors of another shape than (n,), step counts, stay.

    ``eps``: the second moment of fedadam starts at its square.
    """
    grown = {}
    for name, tensor in moments.items():
        kind = name.rpartition(".")[2]
        if tensor.shape != (old.size,):
            grown[name] = tensor
            continue
        before = old.unflatten(tensor)
        layers = {}
        for layer, new in start.layers.items():
            pair = before.layers[layer]
            ratio = pair.scale / new.scale
            A = torch.full((new.rank, pair.A.shape[1]), eps**2 if kind == "v" else 0.0)
            B = torch.full_like(new.B, eps**2 if kind == "v" else 0.0)
            B[:, : pair.rank] = pair.B * (ratio**2 if kind in SQUARES else ratio)
            A[: pair.rank] = pair.A
            layers[layer] = LowRank(B, A, new.scale)
        grown[name] = Adapter(layers, before.head).flatten()
    return grown


def _fresh(old: Layout, vector: Tensor, lora: Lora, seed: int) -> Adapter:
    """The adapter with which a new run starts, on the layers of ``old``, without the base model."""
    before = old.unflatten(vector)
    shapes = {name: (pair.B.shape[0], pair.A.shape[1]) for name, pair in before.layers.items()}
    return fresh_adapter(shapes, before.head, lora.rank, scale_of(lora.rank, lora.alpha, lora.rslora), seed)
