"""Devices: how tensors get there, and what a process that trains sets first, so that equal plans give equal bits."""

from __future__ import annotations

import os

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. A GPU copies it by itself, from pinned memory, while this process goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def prepare_process(threads: int, device: str, deterministic: bool) -> None:
    """Fixes what CPU and GPU kernels would otherwise take from the machine: thread count, choice of algorithm."""
    torch.set_num_threads(threads)
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
