"""Devices: how tensors get there, and what a process that trains sets first, so that equal plans give equal bits."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

KERNELS = "64"  # kernels that oneDNN and torch keep each; see `prepare_process`


def multiplies_bfloat16(device: str) -> bool:
    """Whether the device (`engine.device`) has instructions for products in bfloat16. A GPU elsewhere counts as new."""
    if device == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


def groups_products(device: torch.device) -> bool:
    """Whether `torch.nn.functional.grouped_mm` is one kernel there in bfloat16: on Hopper, on Blackwell of servers.

    Elsewhere torch waits for the offsets and computes one product after the other. A GPU elsewhere counts as new.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device)[0] in (9, 10)
    return device.type != "cpu"


def capability(device: str) -> str:
    """What matrix libraries choose their kernels by: equal plans give equal bits on devices of one capability.

    Of a GPU that this process lacks: only the name of the device.
    """
    if device != "cpu":
        if not torch.cuda.is_available():
            return device
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    cpuinfo = Path("/proc/cpuinfo")  # only on Linux
    vendor = re.search(r"vendor_id\s*: (\S+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    extra = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512_BF16": torch.cpu._is_avx512_bf16_supported()}
    kinds = [torch.backends.cpu.get_cpu_capability(), *(name for name, found in extra.items() if found)]
    return f"{vendor[1] if vendor else platform.machine()} {' '.join(kinds)}"


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. A GPU copies it by itself, from pinned memory, while this process goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def prepare_process(threads: int, device: str, deterministic: bool) -> None:
    """Fixes what CPU and GPU kernels would otherwise take from the machine: thread count, choice of algorithm.

    On a CPU, oneDNN makes a kernel for every shape of a product in 16 bits. By default 1,024 are kept, but batches of
    unpadded texts seldom have equal shapes, and memory would grow by 25 MB a round.
    """
    torch.set_num_threads(threads)
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, KERNELS)
    if device == "cuda":
        prepare_gpu(deterministic)


def prepare_gpu(deterministic: bool) -> None:
    """float32 products in float32; with ``deterministic``, only algorithms that give the same bits every time.

    That is torch's strict mode: where it only warns, attention's backward pass adds up in any order.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # rayfed reads no such memory
