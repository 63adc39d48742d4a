"""What every process that trains sets first, so that equal settings give equal bits."""

from __future__ import annotations

import torch

from rayfed.config import Experiment


def prepare_process(experiment: Experiment) -> None:
    """Fixes what CPU and GPU kernels would otherwise take from the machine: thread count, choice of algorithm."""
    torch.set_num_threads(experiment.engine.threads)
    if experiment.engine.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)
