"""The stack: replaces layers of any transformers model by stacked layers and moves adapters in and out of their slots.

`rayfed.lora.peft.match_targets` names the layers to replace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rayfed.device import to_device
from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, Layout, LowRank
from rayfed.lora.packed.layers import StackedLinear, StackedLora
from rayfed.lora.packed.segments import Batch


class Stack:
    """All stacked layers of one model: adapters are loaded into slots, trained there, and read back.

    Freezes the model and replaces the adapted layers and the linear layers of the head in place. ``layers`` names the
    adapted layers. ``head`` names modules whose parameters all belong to nn.Linear layers (else UserError).
    ``compute`` is the format of the operands in products with adapters (None: that of the adapters); the head computes
    in float32.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[str], head: Sequence[str], dropout: float = 0.0,
        compute: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        model.requires_grad_(False)
        self.batch = Batch()
        self.lora: dict[str, StackedLora] = {}
        self.head: dict[str, StackedLinear] = {}
        for name in layers:
            self.lora[name] = StackedLora(model.get_submodule(name), self.batch, dropout, name, compute)
            _replace(model, name, self.lora[name])
        for name, linear in head_layers(model, head).items():
            self.head[name] = StackedLinear(linear, self.batch)
            _replace(model, name, self.head[name])
        self.dropout = dropout
        self._snapshots: dict[tuple[str, str], Tensor] = {}

    def tensors(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(name, part, stacked parameter (K, ...)) of every trainable tensor. Names and parts are those of `Layout`."""
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
        """B (out, r) and A (r, in) of a slot for every adapted layer, in model order. r is the stack's largest rank."""
        for layer in self.lora.values():
            yield layer.B_KOR[slot], layer.A_KRI[slot]

    @torch.no_grad()
    def load(self, adapters: Sequence[Adapter], bases: Sequence[Mapping[str, LowRank | Tensor]] = ()) -> None:
        """Replaces all slots: one for every adapter.

        ``bases`` has the frozen base change (out, in) by layer for every adapter, or is empty. An adapter may leave out
        a layer that has a base change.

        Raises:
            KeyError: an unknown layer name, or a layer with neither a pair nor a base change.
        """
        bases = bases or [{}] * len(adapters)
        for adapter, base in zip(adapters, bases, strict=True):
            names = set(adapter.layers) | set(base)
            if names != set(self.lora):
                raise KeyError(f"the adapter's layers are not the model's: {sorted(names ^ set(self.lora))}")
        for name, layer in self.lora.items():
            layer.load([a.layers.get(name) for a in adapters], [base.get(name) for base in bases])
        for name, linear in self.head.items():
            biases = [a.head[f"{name}.bias"] for a in adapters] if linear.bias_KO is not None else []
            linear.load([a.head[f"{name}.weight"] for a in adapters], biases)
        self._snapshots = {}

    @torch.no_grad()
    def snapshot(self, slots: Sequence[int]) -> None:
        """Copies the present values of these slots on the device, for `read_snapshots`. Later steps change no copy.

        The cost is a few operations per tensor for any number of slots. A GPU is not waited for.
        """
        for name, part, parameter in self.tensors():
            if (name, part) not in self._snapshots:
                self._snapshots[name, part] = torch.zeros_like(parameter)
            index = to_device(torch.tensor(slots), parameter.device)
            self._snapshots[name, part].index_copy_(0, index, parameter.index_select(0, index))

    def read_snapshots(self, layouts: Sequence[Layout]) -> list[Tensor]:
        """The snapshot of every slot as a flat vector (n,) on the CPU, by its layout. Then forgets the snapshots."""
        values = {place: tensor.to("cpu") for place, tensor in self._snapshots.items()}
        self._snapshots = {}
        return [
            torch.cat([self.crop(values[e.name, e.part][k], e.part, e.shape).reshape(-1) for e in layout.entries])
            for k, layout in enumerate(layouts)
        ]

    def crop(self, tensor: Tensor, part: str, shape: Sequence[int]) -> Tensor:
        """A slot's tensor without the padding to the largest rank: the view of ``shape`` at its start."""
        if part == "A":
            return tensor[: shape[0]]
        if part == "R":
            return tensor[: shape[0], : shape[1]]
        return tensor[:, : shape[1]] if part == "B" else tensor


def head_layers(model: nn.Module, head: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers inside the head's modules by full name. UserError if the head has any other parameters."""
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
    """Float32 copies of the head's weights (out, in) and biases (out,) on the CPU, by parameter name."""
    return {
        f"{name}.{kind}": parameter.detach().float().cpu().clone()
        for name, layer in head_layers(model, head).items()
        for kind, parameter in layer.named_parameters()
    }


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
