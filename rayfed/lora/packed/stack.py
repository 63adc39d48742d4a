"""The stack: replaces layers of any transformers model by stacked layers and moves adapters in and out of their slots.

`rayfed.lora.peft.match_targets` names the layers to replace.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn

from rayfed.device import groups_products, to_device
from rayfed.errors import UserError
from rayfed.lora.adapter import Adapter, Layout, LowRank
from rayfed.lora.packed.kernel import SlotConstants
from rayfed.lora.packed.layers import SameInput, StackedLinear, StackedLora
from rayfed.lora.packed.segments import Batch, Segment
from rayfed.lora.peft import layer_shape

ALIGNED = 16  # float32 numbers
SAME_INPUT = (
    ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("gate_proj", "up_proj"),
)  # fmt: skip
"""Names of layers in transformers' models that read one input, where they are in one module."""


class Stack:
    """All stacked layers of one model: adapters are loaded into slots, trained there, and read back.

    Freezes the model and replaces the adapted layers and the linear layers of the head in place. ``layers`` names the
    adapted layers. ``head`` names modules whose parameters all belong to nn.Linear layers (else UserError).
    ``compute`` is the format of products with adapters; the head computes in float32.

    ``parameters`` holds the values of all slots in float32: for each part of `Layout` one matrix (K, n), a row for
    every slot. Layers read views. So what treats all values alike (an optimizer, a mask, a copy) is a few operations
    for any number of layers. Before the first `load` there is one slot, see `clear`.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[str], head: Sequence[str], dropout: float = 0.0,
        compute: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        model.requires_grad_(False)
        self.dropout, self.compute = dropout, compute
        self.device = next(model.parameters()).device
        layers = list(layers)
        widths = [width for name in layers for width in layer_shape(model.get_submodule(name))]
        grouped = compute == torch.bfloat16 and groups_products(self.device) and not any(width % 8 for width in widths)
        self.batch = Batch(grouped)
        self.lora: dict[str, StackedLora] = {}
        self.head: dict[str, StackedLinear] = {}
        for name in layers:
            self.lora[name] = StackedLora(model.get_submodule(name), self.batch, dropout, name)
            _replace(model, name, self.lora[name])
        shared = self.batch.grouped and not dropout  # with dropout, each layer drops entries of its own
        self._same_inputs = [SameInput([self.lora[name] for name in names]) for names in _groups(layers) if shared]
        for name, linear in head_layers(model, head).items():
            self.head[name] = StackedLinear(linear, self.batch)
            _replace(model, name, self.head[name])
        self.clear()

    def clear(self) -> None:
        """Replaces all slots by one without an adapter, and with a head of zeros."""
        shapes = self._shapes_for([])
        self._load([Adapter({}, {name: torch.zeros(s) for (name, part), s in shapes.items() if part == "head"})], [{}])

    def load(self, adapters: Sequence[Adapter], bases: Sequence[Mapping[str, LowRank | Tensor]] = ()) -> None:
        """Replaces all slots: one for every adapter. Ranks may differ: each layer has the largest rank of the adapters.

        ``bases`` has the frozen base change (out, in) by layer for every adapter, or is empty. An adapter may leave out
        a layer that has a base change. All values train, see `train`. Memory and bits depend on these arguments alone.

        Raises:
            KeyError: an unknown layer name, or a layer with neither a pair nor a base change.
        """
        bases = bases or [{}] * len(adapters)
        for adapter, base in zip(adapters, bases, strict=True):
            names = set(adapter.layers) | set(base)
            if names != set(self.lora):
                raise KeyError(f"the adapter's layers are not the model's: {sorted(names ^ set(self.lora))}")
        self._load(adapters, bases)

    @torch.no_grad()
    def _load(self, adapters: Sequence[Adapter], bases: Sequence[Mapping[str, LowRank | Tensor]]) -> None:
        self._shapes = self._shapes_for(adapters)
        self._sizes = _column_sizes(self._shapes)
        self.trained, self._snapshots = set(self._shapes), dict[str, Tensor]()
        flat = {part: torch.zeros(len(adapters), sum(sizes)) for part, sizes in self._sizes.items()}
        for (name, part), stacked in self.views(flat).items():
            for slot, adapter in enumerate(adapters):
                tensor = adapter.head[name] if part == "head" else getattr(adapter.layers.get(name), part, None)
                if tensor is not None:
                    self.crop(stacked[slot], part, tensor.shape).copy_(tensor)
        self.parameters = {part: nn.Parameter(to_device(values, self.device)) for part, values in flat.items()}
        scales = {name: [a.layers[name].scale if name in a.layers else 0.0 for a in adapters] for name in self.lora}
        scaled_here = self.device.type != "cpu" or self.batch.grouped  # once for all layers, not in each
        self._scales_B = self._scale_columns(scales) if scaled_here and self.lora else None
        for name, layer in self.lora.items():
            # By identity: slots that share a base change share its copy on the device.
            changes = [base.get(name) for base in bases]
            copies = {id(change): self._on_device(change) for change in {id(c): c for c in changes}.values()}
            own = scales[name] if self._scales_B is None else None
            layer.constants = SlotConstants(own, [copies[id(change)] for change in changes])
        for group in self._same_inputs:
            changed = any(c is not None for layer in group.layers for c in layer.constants.base_changes)
            for layer in group.layers:
                layer.same_input = None if changed else group

    def _scale_columns(self, scales: Mapping[str, Sequence[float]]) -> Tensor:
        """The factors on the part B: (K, 1) where a slot has one scale, else (K, n)."""
        by_layer = torch.tensor(list(scales.values())).T  # (K, layers)
        if bool((by_layer == by_layer[:, :1]).all()):
            return to_device(by_layer[:, :1], self.device)
        columns = {"B": torch.zeros(self.parameters["B"].shape)}
        for (name, _), column in self.views(columns).items():
            column.copy_(torch.tensor(scales[name]).view(-1, 1, 1))
        return to_device(columns["B"], self.device)

    def _shapes_for(self, adapters: Sequence[Adapter]) -> dict[tuple[str, str], tuple[int, ...]]:
        """The shape of a slot's tensors by (name, part), in model order."""
        shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        for name, layer in self.lora.items():
            pairs = [adapter.layers[name] for adapter in adapters if name in adapter.layers]
            rank, (outer, inner) = max((pair.rank for pair in pairs), default=1), layer.shape
            rank = -(-rank // 8) * 8 if self.batch.grouped else rank
            shapes[name, "A"], shapes[name, "B"] = (rank, inner), (outer, rank)
            if any(pair.R is not None for pair in pairs):
                shapes[name, "R"] = (rank, rank)
        for name, linear in self.head.items():
            shapes[f"{name}.weight", "head"] = (linear.out_features, linear.in_features)
            if linear.has_bias:
                shapes[f"{name}.bias", "head"] = (linear.out_features,)
        return shapes

    def _on_device(self, change: LowRank | Tensor | None) -> LowRank | Tensor | None:
        def move(tensor: Tensor) -> Tensor:
            return to_device(tensor.to(self.compute), self.device)

        if isinstance(change, LowRank):
            return LowRank(move(change.B), move(change.A), change.scale)
        return None if change is None else move(change)

    def scales(self, name: str) -> tuple[Tensor, bool]:
        """A layer's scale in every slot, (K, 1, 1), and whether the layer's B is multiplied by it already."""
        own = self.lora[name].constants.scales
        if own is not None:
            return to_device(torch.tensor(own), self.device).view(-1, 1, 1), False
        assert self._scales_B is not None
        columns = self._scales_B.expand(self.parameters["B"].shape).contiguous()
        return self.views({"B": columns})[name, "B"][:, :1, :1], True

    def views(self, flat: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """The tensors (K, ...) inside matrices (K, n) by part, such as `parameters`: by (name, part), in model order.

        Names and parts are those of `Layout`.
        """
        columns = {part: iter(matrix.split(self._sizes[part], 1)) for part, matrix in flat.items()}
        found = {}
        for (name, part), shape in self._shapes.items():
            if part in flat:
                found[name, part] = next(columns[part]).view(-1, *shape)
                if math.prod(shape) % ALIGNED:
                    next(columns[part])  # the zeros after it
        return found

    def train(self, places: Collection[tuple[str, str]]) -> None:
        """Only these tensors, given by (name, part), get gradients; others of the same part get zeros."""
        self.trained = set(places)
        for part, parameter in self.parameters.items():
            parameter.requires_grad_(any(p == part for _, p in self.trained))

    @contextmanager
    def using(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Forward passes inside the `with` block take batches of these segments and use the present values."""
        fine = self._trainable(self.parameters)
        if self.lora:
            scaled = self.parameters["B"] if self._scales_B is None else self.parameters["B"] * self._scales_B
            rounded = scaled if "R" in self.parameters else scaled.to(self.compute)  # with a core, B R is rounded
            factors = self._trainable({"A": self.parameters["A"].to(self.compute), "B": rounded})
        for name, layer in self.lora.items():
            layer.A_KRI, layer.B_KOR, layer.R_KRR = factors[name, "A"], factors[name, "B"], fine.get((name, "R"))
        for name, linear in self.head.items():
            linear.weight_KOI, linear.bias_KO = fine[f"{name}.weight", "head"], fine.get((f"{name}.bias", "head"))
        with self.batch.using(segments):
            yield

    def _trainable(self, flat: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """`views`, without a gradient for what does not train."""
        return {place: t if place in self.trained else t.detach() for place, t in self.views(flat).items()}

    def factors(self, slot: int) -> Iterator[tuple[Tensor, Tensor]]:
        """B (out, r) and A (r, in) of a slot for every adapted layer, in model order. r is the stack's largest rank."""
        values = self._trainable(self.parameters)
        for name in self.lora:
            yield values[name, "B"][slot], values[name, "A"][slot]

    @torch.no_grad()
    def snapshot(self, slots: Sequence[int]) -> None:
        """Copies the present values of these slots on the device, for `read_snapshots`. Later steps change no copy.

        The cost is a few operations for any number of slots and layers. A GPU is not waited for.
        """
        index = to_device(torch.tensor(slots), self.device)
        for part, parameter in self.parameters.items():
            if part not in self._snapshots:
                self._snapshots[part] = torch.zeros_like(parameter)
            self._snapshots[part].index_copy_(0, index, parameter.index_select(0, index))

    def read_snapshots(self, layouts: Sequence[Layout]) -> list[Tensor]:
        """The snapshot of every slot as a flat vector (n,) on the CPU, by its layout. Then forgets the snapshots."""
        values = self.views({part: tensor.to("cpu") for part, tensor in self._snapshots.items()})
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


def _groups(names: Sequence[str]) -> list[list[str]]:
    """Neighbours among the layers that read one input, by their names in transformers."""

    def key(name: str) -> tuple[str, Sequence[str]]:
        parent, _, child = name.rpartition(".")
        return parent, next((kind for kind in SAME_INPUT if child in kind), (child,))

    return [group for _, found in groupby(names, key) if len(group := list(found)) > 1]


def _column_sizes(shapes: Mapping[tuple[str, str], tuple[int, ...]]) -> dict[str, list[int]]:
    """By part, the columns of each tensor, followed by those of the zeros after it where there are any.

    Each tensor begins at a multiple of 64 bytes, as memory of its own would: matrix libraries choose code by that.
    """
    sizes: dict[str, list[int]] = {}
    for (_, part), shape in shapes.items():
        columns = math.prod(shape)
        sizes.setdefault(part, []).extend(size for size in (columns, -columns % ALIGNED) if size)
    return sizes


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
