"""Heads that a transformers `tp_plan` has sharded: rows of the weight on each rank of a mesh, as DTensors.

transformers puts a forward of its own in the place of the module's: it makes a DTensor of the input, and gathers the output.
What a head multiplies by here is this rank's rows, as plain tensors with their graph; `lm_head.forward` takes the input
before that forward sees it. The gradient of the input is summed over the mesh by whoever computes with the rows, as that
forward would have summed it.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

PLANS = "transformers.distributed.tensor_parallel"  # the module whose functions stand in for a forward


class TensorParallel(NamedTuple):
    """The shards of a head."""

    process_group: Any
    vocabulary: int


def is_planned(module: nn.Module) -> bool:
    """Whether a tp_plan has replaced the module's forward."""
    return getattr(vars(module).get("forward"), "__module__", None) == PLANS


def is_sharded(module: nn.Linear) -> bool:
    """Whether a tp_plan has given each rank rows of the weight.

    Raises:
        ValueError: it is sharded in another way.
    """
    weight = module.weight
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    if not is_planned(module) or distributed is None or not isinstance(weight, distributed.DTensor):
        return False
    if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0):
        placements = ", ".join(map(repr, weight.placements))
        raise ValueError(
            f"unsupported head: under a tp_plan its rows must be sharded over a mesh of one dimension, got {placements} over "
            f"{tuple(weight.device_mesh.shape)} processes"
        )
    return True


def shard_of(module: nn.Linear) -> tuple[Tensor, Tensor | None, TensorParallel]:
    """This rank's rows of weight and bias, with their graph, and where the others are; of a module that `is_sharded`."""
    weight: Any = module.weight
    bias: Any = module.bias
    over = TensorParallel(weight.device_mesh.get_group(), weight.shape[0])
    return weight.to_local(), None if bias is None else bias.to_local(), over
