"""The adapter that a run starts from, where the settings name one (`model.adapter`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rayfed.config.adapter import adapter_digest, adapter_folder
from rayfed.config.method import Lora
from rayfed.config.task import Model
from rayfed.errors import allowed
from rayfed.lora.adapter import Adapter, fresh_adapter, scale_of
from rayfed.lora.algebra import pad, rescale
from rayfed.lora.peft_files import read_peft
from rayfed.tasks.models.spec import ModelSpec


def initial_adapter(
    settings: Model, lora: Lora, seed: int, spec: ModelSpec, classes: Sequence[str]
) -> tuple[Adapter, str] | None:
    """The adapter at the run's rank and scale, and a line about it for the log; None where the settings name none.

    A smaller rank is padded: further columns of B are 0, and further rows of A are those of a new adapter. The head is
    a new one where the folder's does not fit. UserError where the folder is not the one whose digest the settings have,
    cannot be read, or does not fit the model.
    """
    if settings.adapter is None:
        return None
    if (digest := adapter_digest(settings.adapter)) != settings.adapter_digest:
        what = f"its files have the digest {digest}, and model.adapter_digest is {settings.adapter_digest}"
        raise allowed("model.adapter", settings.adapter, what)
    read = read_peft(adapter_folder(settings.adapter))
    pairs = {spec.root + name: pair for name, pair in read.layers.items()}
    here = {name: (pair.B.shape[0], pair.A.shape[1]) for name, pair in pairs.items()}
    for name in sorted(here.keys() | spec.shapes.keys()):
        if here.get(name) != spec.shapes.get(name):
            own, wanted = here.get(name, "missing"), spec.shapes.get(name, "not adapted (lora.target_modules)")
            raise allowed(
                "model.adapter", settings.adapter, f"its layer {name} is {own}, and in the run it is {wanted}"
            )
    rank = max(pair.rank for pair in pairs.values())
    if rank > lora.rank:
        raise allowed("lora.rank", lora.rank, f"model.adapter has rank {rank}, and no rank of it may be left out")
    scale = scale_of(lora.rank, lora.alpha, lora.rslora)
    fresh = fresh_adapter(spec.shapes, spec.head, lora.rank, scale, seed)
    layers = {
        name: pad(pair if pair.scale == scale else rescale(pair, scale), lora.rank, fresh.layers[name].A)
        for name, pair in pairs.items()
    }
    head, why = _head(spec, read.head, read.classes, classes)
    note = f"model.adapter: starts from {settings.adapter} (rank {rank}, digest {digest}), {why}"
    return Adapter(layers, fresh.head if head is None else head), note


def _head(
    spec: ModelSpec, given: Mapping[str, Tensor], named: Sequence[str] | None, classes: Sequence[str]
) -> tuple[Mapping[str, Tensor] | None, str]:
    """The head to start from (None: a new one), and what is to be said of it."""
    if not spec.head:
        return None, "with the run's frozen head"
    if not given:
        return None, "with a new head: it has none"
    if {name: tensor.shape for name, tensor in given.items()} != {name: t.shape for name, t in spec.head.items()}:
        return None, "with a new head: its own has other tensors"
    if named is None:
        return given, "with its head, whose classes have no names"
    if list(named) != list(classes):
        return None, "with a new head: its own is for other classes"
    return given, "with its head"
