"""Stacked adapters into any transformers model: PEFT says which layers, the stack says how they train.

`match` finds the layers exactly as PEFT would for the same `target_modules` (names, regular expression, `all-linear`,
or PEFT's default for the architecture). `Stack` swaps them for stacked layers and moves adapters in and out of slots.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rayfed.device import to_device
from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, Layout, LowRank
from rayfed.lora.packed.layers import StackedLinear, StackedLora, layer_shape
from rayfed.lora.packed.segments import Batch

if TYPE_CHECKING:
    from peft import LoraConfig

    from rayfed.config.method import Lora


def peft_config(lora: Lora, head: Sequence[str] = ()) -> LoraConfig:
    """The run's adapter in PEFT's own words; ``head`` are the modules trained in full."""
    from peft import LoraConfig

    target = lora.target_modules
    return LoraConfig(
        task_type="SEQ_CLS",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT says int and computes with floats just as well
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=list(target) if isinstance(target, tuple) else target,
        layers_to_transform=list(lora.layers_to_transform) if lora.layers_to_transform is not None else None,
        modules_to_save=list(head) or None,
    )


def match(model: nn.Module, config: LoraConfig, head: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that gets an adapter, by module name, in model order.

    Raises UserError where an expression is not one, nothing matches, a matched module is no linear layer, or the rank
    exceeds a layer's size.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", "custom")
        if kind not in DEFAULTS:
            raise UserError(f"lora.target_modules: got null, but PEFT has no default for {kind!r}; name the modules")
        config.target_modules = list(DEFAULTS[kind])
    everything = config.target_modules == "all-linear"
    if isinstance(config.target_modules, str):
        try:
            re.compile(config.target_modules)
        except re.error as error:
            raise UserError(
                f"lora.target_modules: got {_shown(config)}, but it is no regular expression ({error}); "
                "a list of names is allowed, too"
            ) from None
    shapes: dict[str, tuple[int, int]] = {}
    linear: set[str] = set()
    for name, module in model.named_modules():
        if not name or any(name == h or name.startswith(h + ".") for h in head):
            continue
        try:
            shape = layer_shape(module)
        except TypeError:
            shape = None
        if shape:
            linear.add(name.rpartition(".")[2])
        if (everything and shape) or (not everything and check_target_module_exists(config, name)):
            if shape is None:
                raise UserError(
                    f"lora.target_modules: got {_shown(config)}, but it matches {name}, a {type(module).__name__}; "
                    "adapters fit linear layers (nn.Linear, Conv1D)"
                )
            shapes[name] = shape
    if not shapes and config.layers_to_transform is not None:
        raise UserError(
            f"lora.layers_to_transform: got {config.layers_to_transform}, but no layer of these numbers holds "
            f"{_shown(config)}"
        )
    if not shapes:
        raise UserError(
            f"lora.target_modules: got {_shown(config)}, but it matches no layer; "
            f"this model's linear layers are {', '.join(sorted(linear))}"
        )
    smallest = min(shapes, key=lambda name: min(shapes[name]))
    if config.r > min(shapes[smallest]):
        raise UserError(
            f"lora.rank: got {config.r}, but {smallest} is {shapes[smallest][0]} x {shapes[smallest][1]}; "
            f"at most {min(shapes[smallest])} is allowed"
        )
    return shapes


class Stack:
    """All stacked layers of one model: slots into which adapters are loaded, trained and read back.

    Freezes the model, replaces the adapted layers and the head's linear layers in place. ``head`` names modules; each
    must be made of nn.Linear layers (others hold no parameters), else UserError. ``shapes`` names the adapted layers.
    """

    def __init__(self, model: nn.Module, shapes: Iterable[str], head: Sequence[str], dropout: float = 0.0) -> None:
        model.requires_grad_(False)
        self.batch = Batch()
        self.lora: dict[str, StackedLora] = {}
        self.head: dict[str, StackedLinear] = {}
        for name in shapes:
            layer = StackedLora(model.get_submodule(name), self.batch, dropout, name)
            _replace(model, name, layer)
            self.lora[name] = layer
        for name, linear in head_layers(model, head).items():
            stacked = StackedLinear(linear, self.batch)
            _replace(model, name, stacked)
            self.head[name] = stacked
        self.dropout = dropout
        self._snapshots: dict[tuple[str, str], Tensor] = {}

    def tensors(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(name, part, stacked parameter (K, ...)) for every trainable tensor; names as in `Layout`."""
        for name, layer in self.lora.items():
            yield name, "A", layer.A_KRI
            yield name, "B", layer.B_KOR
            if layer.R_KRR is not None:
                yield name, "R", layer.R_KRR
        for name, linear in self.head.items():
            yield f"{name}.weight", "head", linear.weight_KOI
            if linear.bias_KO is not None:
                yield f"{name}.bias", "head", linear.bias_KO

    def factors(self, slot: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(B (out, r), A (r, in)) of a slot for every adapted layer, in model order; r is the widest slot's rank."""
        for layer in self.lora.values():
            yield layer.B_KOR[slot], layer.A_KRI[slot]

    @torch.no_grad()
    def load(self, adapters: Sequence[Adapter], bases: Sequence[Mapping[str, LowRank | Tensor]] = ()) -> None:
        """Makes a slot for every adapter, over its frozen change of the base; what was there before is gone.

        In every layer a slot is as wide as the widest of its pairs. An adapter may leave a layer out that has a frozen
        change. KeyError for unknown names, and for layers with neither.
        """
        below = bases or [{}] * len(adapters)
        for adapter, base in zip(adapters, below, strict=True):
            named = set(adapter.layers) | set(base)
            if named != set(self.lora):
                raise KeyError(f"the adapter's layers are not the model's: {sorted(named ^ set(self.lora))}")
        for name, layer in self.lora.items():
            layer.load([a.layers.get(name) for a in adapters], [base.get(name) for base in below])
        for name, linear in self.head.items():
            biases = [a.head[f"{name}.bias"] for a in adapters] if linear.bias_KO is not None else []
            linear.load([a.head[f"{name}.weight"] for a in adapters], biases)
        self._snapshots = {}

    @torch.no_grad()
    def snapshot(self, slots: Sequence[int]) -> None:
        """Takes down what these slots hold now, for `read`: what trains on beside them changes it no more.

        However many slots these are, they cost a few operations for every tensor, and wait for none of them.
        """
        for name, part, parameter in self.tensors():
            kept = self._snapshots.get((name, part))
            if len(slots) == len(parameter):
                self._snapshots[name, part] = parameter.detach().clone()
                continue
            if kept is None:
                kept = self._snapshots[name, part] = torch.zeros_like(parameter)
            index = to_device(torch.tensor(slots), parameter.device)
            kept.index_copy_(0, index, parameter.index_select(0, index))

    def read(self, layouts: Sequence[Layout]) -> list[Tensor]:
        """What every slot held when it was kept, as flat vectors (n,) on the CPU; it is let go of."""
        kept = {place: tensor.to("cpu") for place, tensor in self._snapshots.items()}
        self._snapshots = {}
        return [
            torch.cat([self.crop(kept[e.name, e.part][k], e.part, e.shape).reshape(-1) for e in layout.entries])
            for k, layout in enumerate(layouts)
        ]

    def crop(self, tensor: Tensor, part: str, shape: Sequence[int]) -> Tensor:
        """The corner of a slot's padded tensor that a client of smaller rank owns, as a view."""
        if part == "A":
            return tensor[: shape[0]]
        if part == "R":
            return tensor[: shape[0], : shape[1]]
        return tensor[:, : shape[1]] if part == "B" else tensor


def head_layers(model: nn.Module, head: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers inside the head's modules by full name; UserError where a head holds any other parameters."""
    layers: dict[str, nn.Linear] = {}
    for top in head:
        for name, module in model.get_submodule(top).named_modules(prefix=top):
            if isinstance(module, nn.Linear):
                layers[name] = module
            elif any(True for _ in module.parameters(recurse=False)):
                raise UserError(
                    f"model.name: the head {name} is a {type(module).__name__}, but only heads made of linear layers "
                    "can be trained per client"
                )
    return layers


def head_values(model: nn.Module, head: Sequence[str]) -> dict[str, Tensor]:
    """The head's present values by parameter name (float32 copies): where its training starts."""
    return {
        f"{name}.{kind}": parameter.detach().float().cpu().clone()
        for name, layer in head_layers(model, head).items()
        for kind, parameter in layer.named_parameters()
    }


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _shown(config: LoraConfig) -> str:
    target = config.target_modules
    return repr(sorted(target)) if isinstance(target, set | list) else repr(target)
