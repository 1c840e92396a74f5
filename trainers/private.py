"""What the trainers use of accelerate and transformers that these do not promise to keep, and why there is no other way.

tests/test_trainers_private.py says what breaks where one of them changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch import nn
from torch.autograd.graph import save_on_cpu


def forget_accelerators() -> None:
    """accelerate keeps the first accelerator's precision and plugins for as long as the process lives, and refuses others:
    a second run in one process, as in a notebook or a test, could not have its own."""
    AcceleratorState._reset_state()


def sync_gradients(accelerator: Accelerator, wanted: bool) -> None:
    """Whether the next backward is an update's last. What accelerate offers for it, `accumulate`, counts calls by itself;
    an optimiser that it prepared asks its state alone."""
    accelerator.gradient_state._set_sync_gradients(wanted)


def trackers() -> list[str]:
    """Names that accelerate has a tracker for; it lists only the installed ones, not those that could be."""
    return sorted(LOGGER_TYPE_TO_CLASS)


def blocks_of(module: nn.Module) -> set[str]:
    """Class names of the transformer blocks below, by the attribute with which transformers tells accelerate what not to
    split: no public one says what to shard."""
    return {name for child in module.modules() for name in getattr(child, "_no_split_modules", None) or ()}


def offload_inputs(model: nn.Module) -> None:
    """Checkpointed blocks keep their inputs in the CPU's memory: by the attribute in which transformers has what checkpoints
    a block, since it takes only torch's own function with other arguments. torch saves such inputs where hooks reach them."""
    for module in model.modules():
        if (inner := getattr(module, "_gradient_checkpointing_func", None)) is not None:
            module._gradient_checkpointing_func = partial(_offloaded, inner)  # type: ignore[assignment]


def _offloaded(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return inner(*args, **kwargs)
