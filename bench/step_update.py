"""One way to make an update, as `bench.step` measures it: what is prepared beforehand, and what the clock sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fused_rlhf.bench.step_batch import Batch

# Weights stay what they are, so that all rounds compute the same; the optimiser's work does not depend on it.
LEARNING_RATE = 1e-12
MAX_GRAD_NORM = 1e4  # gradients are scaled as always, by 1


@dataclass(frozen=True)
class Update:
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    prepare: Callable[[Batch], Any]
    run: Callable[[Any], tuple[float, float]]  # what `prepare` made -> loss and norm of the gradient
    predicted_bytes: float | None = None  # its activations by `trainers.planning`, where that knows them
