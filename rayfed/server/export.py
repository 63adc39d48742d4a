"""What a run leaves for others to use: the global model as a PEFT adapter and, where asked for, as merged weights.

An adapter of rank r (`export.adapter_rank`, by default `lora.rank`) holds a layer's change exactly where the change has
at most that rank; else it holds the best approximation of that rank, and the share of the energy (squared Frobenius
norm over all layers) that is lost is stated. Merged weights lose nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rayfed.config import Experiment
from rayfed.files import atomic_path
from rayfed.lora.adapter import Adapter, LowRank, scale_of
from rayfed.lora.algebra import factors as of_rank
from rayfed.lora.algebra import norm, pad, rescale, svd, tail_energy
from rayfed.lora.peft import is_conv1d, save_peft
from rayfed.tasks.models.base import base_of, in_dtype, load_tokenizer
from rayfed.tasks.models.spec import ModelSpec

Changes = Mapping[str, LowRank | Tensor]


def export(
    out: Path, changes: Changes, head: Mapping[str, Tensor], model_spec: ModelSpec, experiment: Experiment,
    classes: tuple[str, ...],
) -> dict[str, float | str]:  # fmt: skip
    """Writes `adapter/`, and `merged/` where asked for, both float32.

    Returns the adapter's rank, the share of energy it lost, and the number format of the base that it was trained on.
    """
    rank = experiment.export.adapter_rank or experiment.lora.rank
    alpha = experiment.lora.alpha
    adapter, lost = as_adapter(changes, head, model_spec, experiment, rank)
    settings = {**model_spec.peft, "r": rank, "lora_alpha": alpha}
    save_peft(out / "adapter", adapter, settings, {"classes.json": json.dumps(list(classes), indent=2) + "\n"})
    if experiment.export.merged:
        _save_merged(out / "merged", changes, head, experiment, len(classes))
    return {"export/rank": rank, "export/lost_energy": lost, "export/base_dtype": experiment.model.dtype}


def as_adapter(
    changes: Changes, head: Mapping[str, Tensor], model_spec: ModelSpec, experiment: Experiment, rank: int
) -> tuple[Adapter, float]:
    """An adapter of one rank and PEFT's scale with a pair for every layer, and the share of the energy it lost."""
    scale = scale_of(rank, experiment.lora.alpha, experiment.lora.rslora)
    fresh = model_spec.fresh(rank, experiment)
    layers, lost, total = {}, 0.0, 0.0
    for name, start in fresh.layers.items():
        change = changes.get(name, start)  # a layer that does not train has a fresh pair, which changes nothing
        energy = norm(change) ** 2
        total += energy
        if isinstance(change, LowRank) and change.rank <= rank:
            pair = change if change.scale == scale else rescale(change, scale)
        else:
            spectrum = svd(change, rank, dtype=torch.float64)
            lost += tail_energy(spectrum.S, energy, rank)
            pair = of_rank(spectrum, rank, scale)
        pair = LowRank(pair.B.float(), pair.A.float(), scale)
        layers[name] = pair if pair.rank == rank else pad(pair, rank, start.A)
    return Adapter(layers, head), lost / total if total else 0.0


def _save_merged(
    path: Path, changes: Changes, head: Mapping[str, Tensor], experiment: Experiment, classes: int
) -> None:
    """The base model with all changes in its weights, as transformers saves models, with its tokenizer.

    A mean-pooled model is saved as its encoder, with the classifier beside it in `head.safetensors`.
    """
    base = base_of(experiment, classes)
    in_dtype(base, experiment.model.dtype).float()  # the weights that were trained on, as they were rounded
    with torch.no_grad():
        for name, change in changes.items():
            layer = base.model.get_submodule(name)
            matrix = change.dense() if isinstance(change, LowRank) else change
            weight = layer.get_parameter("weight")
            weight.add_(matrix.T if is_conv1d(layer) else matrix)
        for name, tensor in head.items():
            base.model.get_parameter(name).copy_(tensor)
    with atomic_path(path) as folder:
        folder.mkdir()
        if experiment.model.pooling == "mean":
            base.model.encoder.save_pretrained(folder)  # type: ignore[union-attr,operator]
            save_file({name: tensor.clone() for name, tensor in head.items()}, folder / "head.safetensors")
        else:
            base.model.save_pretrained(folder)  # type: ignore[operator]
        load_tokenizer(experiment.model).save_pretrained(folder)
