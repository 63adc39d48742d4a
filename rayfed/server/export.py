"""The export of a run: the global model as a PEFT adapter and, where asked for, as merged weights.

An adapter of rank r (`export.adapter_rank`, by default `lora.rank`) holds a layer's change exactly where the change has
at most that rank. Otherwise it holds the best approximation of that rank. The lost share of the energy (squared
Frobenius norm over all layers) is then reported, and the adapter is evaluated on its own. Merged weights lose nothing.

`adapter/` has all that stock PEFT and transformers need beside the base model: the adapter and the head, the tokenizer,
the names of the classes, and a model card with the lines that load them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor

from rayfed.clients.plan import RunPlan
from rayfed.files import atomic_path
from rayfed.lora.adapter import Adapter, LowRank, scale_of
from rayfed.lora.algebra import factors as of_rank
from rayfed.lora.algebra import norm, pad, rescale, svd, tail_energy
from rayfed.lora.peft import is_conv1d
from rayfed.lora.peft_files import HEAD, write_peft
from rayfed.methods import matrix
from rayfed.server.evaluation.targets import adapter_metrics
from rayfed.server.executor import Executor
from rayfed.server.model_card import model_card
from rayfed.tasks.models.base import MeanPooledClassifier, in_dtype, name_classes

Changes = Mapping[str, LowRank | Tensor]

ROUNDING = 1e-9  # a lost share of the energy up to this is rounding: 3e-5 of the change's norm


def export(
    plan: RunPlan, out: Path, changes: Changes, head: Mapping[str, Tensor], summary: Mapping[str, Any],
    executor: Executor,
) -> dict[str, Any]:  # fmt: skip
    """Writes `adapter/`, and `merged/` where asked for, both float32.

    ``head`` has the trained head's parameters. ``summary`` is the run's, for the model card. Returns the adapter's
    rank, the share of energy that it lost, the number format of its base, and what the adapter itself reaches where
    energy was lost (None elsewhere: there it is the run's model).
    """
    rank = plan.export.adapter_rank or plan.lora.rank
    adapter, lost = as_adapter(plan, changes, {**plan.model.frozen_head, **head}, rank)
    found = adapter_metrics(plan, Adapter(adapter.layers, head), executor) if lost else {}
    metric = plan.task.metric or "accuracy"
    figures = {
        "export/rank": rank,
        "export/lost_energy": lost,
        "export/base_dtype": plan.model.dtype,
        f"export/test_{metric}": found.get(f"test/{metric}"),
        "export/gap": found.get("eval/gap"),
    }
    save_adapter(plan, out / "adapter", adapter, model_card(plan, {**summary, **figures}))
    if plan.export.merged:
        save_merged(plan, out / "merged", changes, adapter.head)
    return figures


def save_adapter(plan: RunPlan, path: Path, adapter: Adapter, card: str) -> None:
    """Writes the folder ``path``: the adapter for PEFT, `classes.json`, the tokenizer, and ``card`` as `README.md`.

    An existing folder is replaced. If writing fails, the old folder stays. All pairs have one rank.
    """
    rank = next(iter(adapter.layers.values())).rank
    with atomic_path(path) as folder:
        folder.mkdir()
        write_peft(folder, adapter, {**plan.model.peft, "r": rank, "lora_alpha": plan.lora.alpha}, plan.model.root)
        plan.task.save_tokenizer(folder)
        classes = json.dumps(list(plan.federation.classes), indent=2) + "\n"
        for name, text in (("classes.json", classes), ("README.md", card)):
            (folder / name).write_text(text, encoding="utf-8")


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
    share = lost / total if total else 0.0
    return Adapter(layers, head), share if share > ROUNDING else 0.0


def save_merged(plan: RunPlan, path: Path, changes: Changes, head: Mapping[str, Tensor]) -> None:
    """The base model with all changes in its weights, as transformers saves models, with its tokenizer.

    ``head`` has all parameters of the head. A mean-pooled model is saved as its encoder, with the classifier in
    `head.safetensors`.
    """
    base = in_dtype(plan.task.load_base(plan.federation), plan.model.dtype)
    model = base.model.float()  # the weights that were trained on, as they were rounded
    for name, change in changes.items():
        layer, W = model.get_submodule(name), matrix(change)
        weight = layer.get_parameter("weight")
        # A new tensor: the base's own weights may be shared.
        weight.data = weight.data + (W.T if is_conv1d(layer) else W)
    for name, tensor in head.items():
        model.get_parameter(name).data = tensor.clone()
    name_classes(model, plan.federation.classes)
    with atomic_path(path) as folder:
        folder.mkdir()
        if isinstance(model, MeanPooledClassifier):
            model.encoder.save_pretrained(folder)  # type: ignore[operator]
            save_file({name: tensor.clone() for name, tensor in head.items()}, folder / HEAD)
        elif hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)  # type: ignore[operator]
        else:  # a module that is not of transformers
            save_model(model, str(folder / "model.safetensors"))
        plan.task.save_tokenizer(folder)
