"""The export of a run: the global model as a PEFT adapter and, where asked for, as merged weights.

An adapter of rank r (`export.adapter_rank`, by default `lora.rank`) holds a layer's change exactly where the change has
at most that rank. Otherwise it holds the best approximation of that rank, and the lost share of the energy (squared
Frobenius norm over all layers) is reported. Merged weights lose nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rayfed.clients.plan import RunPlan
from rayfed.files import atomic_path
from rayfed.lora.adapter import Adapter, LowRank, scale_of
from rayfed.lora.algebra import factors as of_rank
from rayfed.lora.algebra import norm, pad, rescale, svd, tail_energy
from rayfed.lora.peft import is_conv1d, save_peft
from rayfed.tasks.models.base import MeanPooledClassifier, in_dtype

Changes = Mapping[str, LowRank | Tensor]


def export(plan: RunPlan, out: Path, changes: Changes, head: Mapping[str, Tensor]) -> dict[str, float | str]:
    """Writes `adapter/`, and `merged/` where asked for, both float32.

    Returns the adapter's rank, the share of energy that it lost, and the number format of the base it was trained on.
    """
    rank = plan.export.adapter_rank or plan.lora.rank
    adapter, lost = as_adapter(plan, changes, head, rank)
    settings = {**plan.model.peft, "r": rank, "lora_alpha": plan.lora.alpha}
    classes = json.dumps(list(plan.federation.classes), indent=2) + "\n"
    save_peft(out / "adapter", adapter, settings, {"classes.json": classes})
    if plan.export.merged:
        _save_merged(plan, out / "merged", changes, head)
    return {"export/rank": rank, "export/lost_energy": lost, "export/base_dtype": plan.model.dtype}


def as_adapter(plan: RunPlan, changes: Changes, head: Mapping[str, Tensor], rank: int) -> tuple[Adapter, float]:
    """An adapter of one rank and PEFT's scale with a pair for every layer, and the share of the energy it lost."""
    scale = scale_of(rank, plan.lora.alpha, plan.lora.rslora)
    layers, lost, total = {}, 0.0, 0.0
    for name, start in plan.fresh(rank).layers.items():
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


def _save_merged(plan: RunPlan, path: Path, changes: Changes, head: Mapping[str, Tensor]) -> None:
    """The base model with all changes in its weights, as transformers saves models, with its tokenizer.

    A mean-pooled model is saved as its encoder, with the classifier beside it in `head.safetensors`.
    """
    base = in_dtype(plan.task.load_base(plan.federation), plan.model.dtype)
    model = base.model.float()  # the weights that were trained on, as they were rounded
    for name, change in changes.items():
        layer = model.get_submodule(name)
        matrix = change.dense() if isinstance(change, LowRank) else change
        weight = layer.get_parameter("weight")
        # A new tensor: the base's own weights may be shared.
        weight.data = weight.data + (matrix.T if is_conv1d(layer) else matrix)
    for name, tensor in head.items():
        model.get_parameter(name).data = tensor.clone()
    with atomic_path(path) as folder:
        folder.mkdir()
        if isinstance(model, MeanPooledClassifier):
            model.encoder.save_pretrained(folder)  # type: ignore[operator]
            save_file({name: tensor.clone() for name, tensor in head.items()}, folder / "head.safetensors")
        else:
            model.save_pretrained(folder)  # type: ignore[operator]
        plan.task.save_tokenizer(folder)
