"""What every process that trains sets first, so that equal settings give equal bits."""

from __future__ import annotations

import os

import torch

from rayfed.config import Experiment


def prepare_process(experiment: Experiment) -> None:
    """Fixes what CPU and GPU kernels would otherwise take from the machine: thread count, choice of algorithm."""
    torch.set_num_threads(experiment.engine.threads)
    if experiment.engine.device == "cuda":
        prepare_gpu(experiment.engine.deterministic)


def prepare_gpu(deterministic: bool) -> None:
    """float32 products in float32; with ``deterministic``, only algorithms that give the same bits every time.

    That is torch's strict mode: where it only warns, attention's way back adds up in any order.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it has not written
