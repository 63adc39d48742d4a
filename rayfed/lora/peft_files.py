"""Adapters in PEFT's file format: written so that stock PEFT loads them, and read without trust in their source.

`write_peft` needs the tensors alone, not the base model. Values are stored as float32. The scale is stored as
`lora_alpha`, so that PEFT computes the ``alpha / r`` (or ``alpha / sqrt(r)``) that the run trained with.

An adapter of a model that transformers cannot build as a whole (`root` in `rayfed.tasks.models.spec.ModelSpec`) is
written as the adapter of one of its modules, the encoder, with the head in a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rayfed.errors import UserError, allowed, first_line
from rayfed.files import regular
from rayfed.lora.adapter import Adapter, LowRank, scale_of
from rayfed.lora.peft import PREFIX, is_conv1d

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
CLASSES = "classes.json"  # the names of the classes, which PEFT does not have
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
MORE = (
    "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens",
)  # fmt: skip
"""Settings that make more of PEFT's LoRA than pairs of one rank and scale; so do those named use_... and ..._config."""
KEEPS_BASE = ("gaussian", "eva", "orthogonal")
"""Ways to initialise a LoRA that leave the base's weights as they are; others, such as pissa, change them."""


def write_peft(folder: Path, adapter: Adapter, settings: Mapping[str, Any], root: str = "") -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into the existing ``folder``.

    ``settings`` come from `rayfed.lora.peft.peft_settings`; all pairs have the rank and the scale that they state. With
    a ``root``, layers are named relative to it, and the head lies in `head.safetensors` under its own names.
    """
    tensors = {}
    for name, pair in adapter.layers.items():
        tensors[f"{PREFIX}{name.removeprefix(root)}.lora_A.weight"] = pair.A
        tensors[f"{PREFIX}{name.removeprefix(root)}.lora_B.weight"] = pair.B
    if root:
        _save(adapter.head, folder / HEAD)
    else:
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in adapter.head.items()}
    _save(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_peft(
    model: nn.Module, folder: Path, shapes: Mapping[str, tuple[int, int]], head: Mapping[str, Tensor],
    head_modules: Sequence[str], root: str = "",
) -> PeftModel:  # fmt: skip
    """The model with the adapter of a folder that `write_peft` wrote, as a PeftModel in evaluation mode.

    ``shapes`` has (out, in) of every adapted layer, ``head`` the parameters of the ``head_modules``. The folder may be
    anybody's: only rank, alpha and safetensors are read, so that no code, other base or pickle in it is used.

    Raises UserError where a file is missing, no regular file or damaged, or does not fit the model.
    """
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    rank, alpha, rslora = _rank_and_scale(folder)
    tensors = {_with_root(name, root): tensor for name, tensor in _read(folder, WEIGHTS).items()}
    if root:
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in _read(folder, HEAD).items()}
    expected = {f"{PREFIX}{name}": tuple(tensor.shape) for name, tensor in head.items()}
    for name, (out, inner) in shapes.items():
        expected |= {f"{PREFIX}{name}.lora_A.weight": (rank, inner), f"{PREFIX}{name}.lora_B.weight": (out, rank)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            here, there = found.get(name, "missing"), expected.get(name, "missing")
            raise allowed("adapter", str(folder), f"its tensor {name} is {here}, and in the run's model it is {there}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT declares int, but computes with floats as well
        use_rslora=rslora,
        target_modules=list(shapes),
        modules_to_save=list(head_modules) or None,
        fan_in_fan_out=any(is_conv1d(model.get_submodule(name)) for name in shapes),
        inference_mode=True,
    )
    loaded = PeftModel(model, config)
    set_peft_model_state_dict(loaded, tensors)
    return loaded.eval()


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA as its folder has it: pairs by layer, the head's tensors by name (none: empty), the names of classes."""

    layers: dict[str, LowRank]
    head: dict[str, Tensor]
    classes: tuple[str, ...] | None  # None: the folder does not name them


def read_peft(folder: Path) -> PeftAdapter:
    """The plain LoRA in the folder, anybody's, in float32. Only safetensors and JSON are read, and no base model.

    UserError, which names `model.adapter`, where a file is missing, no regular file or damaged, and where the adapter
    is more than a pair (B, A) for each layer, all of one rank and scale, and modules that are saved whole.
    """
    field, weights = "model.adapter", str(folder / WEIGHTS)
    rank, alpha, rslora = _rank_and_scale(folder, field)
    _refuse_other_kinds(read_json(folder / CONFIG, field), folder, field)
    tensors = {name: tensor.float() for name, tensor in _read(folder, WEIGHTS, field).items()}
    layers = {}
    for name in sorted(name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)):
        A, B = tensors.pop(name + LORA_A), tensors.pop(name + LORA_B, None)
        if B is None or A.ndim != 2 or B.ndim != 2 or (A.shape[0], B.shape[1]) != (rank, rank):
            raise allowed(field, weights, f"its layer {name} has no B (out, r) and A (r, in) with r={rank}")
        layers[name.removeprefix(PREFIX)] = LowRank(B, A, scale_of(rank, alpha, rslora))
    head = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    if (folder / HEAD).exists():
        head |= {name: tensor.float() for name, tensor in _read(folder, HEAD, field).items()}
    if not layers or any(".lora_" in name for name in head):
        wrong = next((name for name in head if ".lora_" in name), "no layer")
        raise allowed(field, weights, f"it has {wrong}; a layer has {LORA_A} and {LORA_B}")
    parts = {**{name: pair.A for name, pair in layers.items()}, **head}
    for name, tensor in [*parts.items(), *((name, pair.B) for name, pair in layers.items())]:
        if not bool(tensor.isfinite().all()):
            raise allowed(field, str(folder), f"its tensor {name} has values that are not finite")
    classes = read_json(folder / CLASSES, field) if (folder / CLASSES).exists() else None
    return PeftAdapter(layers, head, tuple(map(str, classes)) if isinstance(classes, list) else None)


def _refuse_other_kinds(settings: Mapping[str, Any], folder: Path, field: str) -> None:
    """UserError where `adapter_config.json` describes another adapter than a plain LoRA, or one on a changed base."""
    more = {
        name: value
        for name, value in settings.items()
        if value and (name in MORE or name.endswith("_config") or (name.startswith("use_") and name != "use_rslora"))
    }
    if settings.get("peft_type") != "LORA":
        more["peft_type"] = settings.get("peft_type")
    if (start := settings.get("init_lora_weights", True)) not in (True, False, *KEEPS_BASE):
        more["init_lora_weights"] = start
    for name, value in more.items():
        raise allowed(field, str(folder / CONFIG), f"it has {name}={value!r:.60}; only plain LoRA is read")


def read_json(path: Path, field: str = "adapter") -> Any:
    """The value in a JSON file. UserError where it is missing, a link, no regular file, or damaged."""
    try:
        return json.loads(regular(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error, field) from None


def refuse_links(folder: Path) -> None:
    """UserError where the folder is missing or a symbolic link, or has a link at any depth.

    Exports have none. A foreign one may lead to files that are none of its business.
    """
    if not folder.is_symlink() and not folder.is_dir():
        raise allowed("adapter", str(folder), "there is no such folder; a run writes it when it is finished")
    for path in (folder, *(() if folder.is_symlink() else folder.rglob("*"))):
        if path.is_symlink():
            raise allowed("adapter", str(path), "it is a symbolic link; only plain files and folders are read")


def _rank_and_scale(folder: Path, field: str = "adapter") -> tuple[int, float, bool]:
    """Rank, alpha and whether the scale is alpha / sqrt(r), from `adapter_config.json`."""
    settings = read_json(folder / CONFIG, field)
    found: dict[str, Any] = settings if isinstance(settings, dict) else {}
    values: list[Any] = [found.get(name) for name in ("r", "lora_alpha", "use_rslora")]
    rank, alpha, rslora = values
    if type(rank) is int and rank > 0 and type(alpha) in (int, float) and abs(alpha) < 1e9 and type(rslora) is bool:
        return rank, float(alpha), rslora
    what = f"it has r={rank!r}, lora_alpha={alpha!r}, use_rslora={rslora!r}; allowed are an integer above 0, a number, "
    raise allowed(field, str(folder / CONFIG), f"{what}true or false")


def _with_root(name: str, root: str) -> str:
    return f"{PREFIX}{root}{name.removeprefix(PREFIX)}"


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    copies = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}  # safetensors takes no views
    save_file(copies, path, {"format": "pt"})


def _read(folder: Path, name: str, field: str = "adapter") -> dict[str, Tensor]:
    try:
        return load_file(regular(folder / name))
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(folder / name, error, field) from None


def _unreadable(path: Path, error: Exception, field: str) -> UserError:
    return allowed(field, str(path), f"it cannot be read ({first_line(error)}); only the file as it was written is")
