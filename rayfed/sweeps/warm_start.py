"""A run that continues another's checkpoint under other settings: the same model, exactly.

Under another rate, density or such (`live` in `rayfed.config.marks`) a checkpoint means what it meant: its tensors,
what single clients keep and who has merged what are taken over bit for bit, whatever the method. Under a larger rank
they grow.

Growing a layer's pair from rank r to R adds rows to A and zero columns to B, so the new ranks add nothing to the
product; the rows are those that a run of rank R would have started with. Where the scale alpha / r changes with the
rank, B takes the ratio: bit for bit where that is a power of two, else to a rounding of float32. The server optimizer's
moments grow alike: B's by the ratio, second moments by its square, and new entries at what a new run starts from. (An
adaptive server optimizer takes its next steps at a length of its own: a change of scale is no symmetry of it.)

What can grow: states of factors alone, of `flasc` with a refreshed mask and of `fedit`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rayfed.config import Experiment, dump_config, load_config
from rayfed.errors import UserError
from rayfed.files import atomic_path, atomic_write, write_json
from rayfed.lora.adapter import Adapter, Layout, LowRank, fresh_adapter, scale_of
from rayfed.lora.algebra import pad, rescale
from rayfed.methods.fedit import FedIT
from rayfed.methods.flasc import Flasc
from rayfed.server import checkpoint as checkpoints
from rayfed.server.axes import resolve
from rayfed.server.client_state import ClientStore, digest_of
from rayfed.wire import Ledger

Tensors = dict[str, Tensor]
SQUARES = ("v", "exp_avg_sq")  # moments that go with the square of a gradient
NOTE = "continues.json"  # in the run's directory: which run and round it continues, and that round's digest


def check_growing(experiment: Experiment) -> None:
    """UserError where a run with these settings could not be continued at another rank or density."""
    method = resolve(experiment).method
    if not isinstance(method, FedIT | Flasc):
        raise UserError(
            f"method.name: got {experiment.method.name!r}, but sweep.search goes on at another rank, which flasc "
            "and fedit can"
        )
    if isinstance(method, Flasc) and method.mask == "fixed":
        raise UserError("method.mask: got 'fixed', but sweep.search changes the density: refresh")
    if experiment.profiles.kind != "same":
        raise UserError(f"profiles.kind: got {experiment.profiles.kind!r}, but sweep.search sets one rank: same")
    if experiment.lora.train == "head":
        raise UserError("lora.train: got 'head', but sweep.search looks for a rank: all")
    if experiment.eval.early_stop is not None:
        raise UserError("eval.early_stop: got a section, but the probes of sweep.search are of equal length: null")


def check_carrying(experiment: Experiment, varied: Iterable[str]) -> None:
    """UserError where a run with these settings could not be continued under other values of the ``varied`` ones."""
    method = resolve(experiment).method
    if isinstance(method, Flasc) and method.mask == "fixed" and any(key.startswith("wire.") for key in varied):
        raise UserError("method.mask: got 'fixed', but sweep.search changes the density: refresh")
    if experiment.eval.early_stop is not None:
        raise UserError("eval.early_stop: got a section, but the members of sweep.search are of equal length: null")


def warm_start(source: Path, folder: Path, experiment: Experiment) -> None:
    """Makes ``folder`` a run of ``experiment`` that has done what the finished run in ``source`` has done.

    ``experiment`` differs from the source's settings in those and server.rounds; or also in rank, where
    `check_growing` holds. The folder gets its config.yaml last: without one it was never made.
    """
    settings = load_config(source / "config.yaml")
    found = checkpoints.latest(source / "checkpoints", settings.digest())
    if found is None or found.round >= experiment.server.rounds:
        raise UserError(f"{source}: no checkpoint to continue for {experiment.server.rounds} rounds")
    clients = ClientStore(source / "clients").restore(found.clients)
    method, optimizer = checkpoints.load_tensors(source / "checkpoints", found, digest_of(clients))
    made = replace(found, experiment=experiment.digest())
    if any(getattr(settings.lora, field) != getattr(experiment.lora, field) for field in ("rank", "alpha", "rslora")):
        made, method, optimizer = _grown(made, method, optimizer, experiment)
    checkpoints.save(folder / "checkpoints", made, method, optimizer, experiment.checkpoint.keep)
    for kept in clients.values():
        own = folder / kept.path.relative_to(source)
        own.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept.path, own)
    shutil.copyfile(source / "metrics.jsonl", folder / "metrics.jsonl")
    with atomic_path(folder / "ledger.parquet") as ledger:
        shutil.copytree(source / "ledger.parquet", ledger, ignore=shutil.ignore_patterns(".*"))
        Ledger.resume(ledger, found.round)
    write_json(folder / NOTE, {"trial": source.name, "round": found.round, "state/digest": found.digest})
    atomic_write(folder / "config.yaml", dump_config(experiment))


def _grown(
    made: checkpoints.Checkpoint, method: Tensors, optimizer: Tensors, experiment: Experiment
) -> tuple[checkpoints.Checkpoint, Tensors, Tensors]:
    """The checkpoint, its method's tensors and its optimizer's, at the rank of ``experiment``."""
    old = Layout.from_json(made.facts["layout"])
    start = _fresh(old, method["vector"], experiment)
    grown = {"vector": grow(method["vector"], old, start)}
    moments = grow_moments(optimizer, old, start, resolve(experiment).optimizer.eps)
    digest = checkpoints.state_digest(made.round, grown, moments)
    return replace(made, digest=digest, facts={**made.facts, "layout": start.layout.to_json()}), grown, moments


def grow(vector: Tensor, old: Layout, start: Adapter) -> Tensor:
    """The adapter (n,) of layout ``old`` in the layout of ``start``, a fresh adapter of the same layers: same products.

    ValueError where ``start`` has a smaller rank.
    """
    before = old.unflatten(vector)
    layers = {}
    for name, fresh in start.layers.items():
        pair = before.layers[name]
        same = pair if pair.scale == fresh.scale else rescale(pair, fresh.scale)
        layers[name] = pad(same, fresh.rank, fresh.A)
    return Adapter(layers, before.head).flatten()


def grow_moments(moments: Mapping[str, Tensor], old: Layout, start: Adapter, eps: float) -> dict[str, Tensor]:
    """The server optimizer's tensors for the grown adapter; those that are no vector (n,), a step count, stay.

    ``eps``: fedadam's second moment starts at its square.
    """
    grown = {}
    for name, tensor in moments.items():
        kind = name.rpartition(".")[2]
        if tensor.shape != (old.size,):
            grown[name] = tensor
            continue
        before = old.unflatten(tensor)
        layers = {}
        for layer, fresh in start.layers.items():
            pair = before.layers[layer]
            ratio = pair.scale / fresh.scale
            first = torch.full((fresh.rank, pair.A.shape[1]), eps**2 if kind == "v" else 0.0)
            B = torch.full_like(fresh.B, eps**2 if kind == "v" else 0.0)
            B[:, : pair.rank] = pair.B * (ratio**2 if kind in SQUARES else ratio)
            first[: pair.rank] = pair.A
            layers[layer] = LowRank(B, first, fresh.scale)
        grown[name] = Adapter(layers, before.head).flatten()
    return grown


def _fresh(old: Layout, vector: Tensor, experiment: Experiment) -> Adapter:
    """What a new run of ``experiment`` starts from, on the layers of ``old``; no base model is asked."""
    before, lora = old.unflatten(vector), experiment.lora
    shapes = {name: (pair.B.shape[0], pair.A.shape[1]) for name, pair in before.layers.items()}
    return fresh_adapter(shapes, before.head, lora.rank, scale_of(lora.rank, lora.alpha, lora.rslora), experiment.seed)
