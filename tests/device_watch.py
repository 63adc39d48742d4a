"""A device that need not be there: torch's `meta` device stands in for a GPU, and a watch sees what is asked of it.

Nothing is computed on it, so this shows no number; it shows what a GPU would be slow at, or refuse: operations that mix
its tensors with the CPU's, copies that this process waits for, and how many kernels are started.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FUSED = [  # what tells torch's optimizers which devices have fused kernels
    mock.patch(f"{module}._get_fused_kernels_supported_devices", return_value=["meta"])
    for module in ("torch.optim.optimizer", "torch.utils._foreach_utils")
]
DEVICE = torch.device("meta")
VIEWS = {  # what only looks at memory in another way, or reserves it
    "view", "_unsafe_view", "_reshape_alias", "expand", "permute", "transpose", "t", "slice", "select", "split",
    "split_with_sizes", "unsqueeze", "squeeze", "as_strided", "detach", "alias", "unbind",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Counts, by operation: ``kernels`` started, ``waits`` for the device, and what ``mixed`` both devices.

    ``bytes`` are those of the tensors that kernels read and write. Fused optimizers are offered on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()
        self.bytes = 0

    def __enter__(self) -> Watch:
        for patch in FUSED:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for patch in FUSED:
            patch.stop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # A GPU's kernels take numbers that the CPU holds, as tensors without dimensions, along.
        devices = {t.device.type for t in tensors if t.ndim or t.device.type != "cpu"}
        if name == "_local_scalar_dense" and devices == {"meta"}:
            self.waits[name] += 1
            return 1.0 if tensors[0].dtype.is_floating_point else 1
        if name == "_to_copy" and devices == {"meta"} and _target(kwargs) == "cpu":
            self.waits[name] += 1
            return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if name == "_to_copy" and devices == {"cpu"} and _target(kwargs) == "meta" and not kwargs.get("non_blocking"):
            self.waits[name] += 1
        if devices == {"cpu", "meta"}:
            self.mixed[name] += 1
        # In place, and torch has not all of them for this device.
        result = None if name.startswith("_fused_") else func(*args, **kwargs)
        made = not tensors and isinstance(result, torch.Tensor) and result.device.type == "meta"  # such as zeros
        if (made or "meta" in devices) and name not in VIEWS:
            self.kernels[name] += 1
            used = {id(t): t for t in (*tensors, *tree_leaves(result)) if isinstance(t, torch.Tensor)}
            self.bytes += sum(t.nbytes for t in used.values() if t.device.type == "meta")
        return result


def _target(kwargs: dict[str, Any]) -> str | None:
    device = kwargs.get("device")
    return None if device is None else torch.device(device).type
