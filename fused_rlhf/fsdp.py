"""A head in a group of its own under FSDP2: read where its shards are, and not made whole for a forward.

FSDP2's hooks on it sleep while the model runs, and known zeros stand for its product. What goes by its parameters' own
graph, `DTensor.to_local`, arrives in their gradients as FSDP2 leaves them: averaged over ranks, and reduced in its dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_rlhf import private
from fused_rlhf.kernels.interface import Stream
from fused_rlhf.op.streams import gathered


@dataclass(frozen=True)
class Shards:
    """Of a head whose weight is a DTensor, (V, H) in rows over ranks."""

    head: Any  # the module
    vocabulary: int
    group: private.FSDPGroup

    @staticmethod
    def of(head: nn.Module, weight: Tensor) -> Shards | None:
        """None where the weight cannot be streamed: it is whole, FSDP2 shards it together with other modules or along
        another dimension, or it lies elsewhere than it is computed with."""
        if not _in_rows(weight):
            return None
        group = private.fsdp_group(head)
        local = weight.to_local()  # type: ignore[attr-defined]
        if group is None or local.device != group.device or type(local.detach()) is not Tensor:
            return None
        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
        if (
            mesh.get_group(mesh.ndim - 1).group_name != group.ranks
        ):  # rows of a tensor-parallel head, which replicas share
            return None
        return Shards(head, len(weight), group)

    def cast(self, hidden: Tensor) -> Tensor:
        """The head's input as FSDP2 would cast it."""
        dtype = self.group.param_dtype
        wanted = self.group.casts_inputs and dtype is not None and hidden.is_floating_point()
        return hidden.to(dtype) if wanted else hidden

    def stream(self, parameter: Any) -> Stream:
        mesh, last = parameter.device_mesh, parameter.device_mesh.ndim - 1
        dtype = self.group.param_dtype or parameter.dtype
        reduce_dtype = self.group.reduce_dtype or dtype
        return Stream(
            mesh.get_group(last).group_name,
            mesh.size(last),
            len(parameter),
            dtype,
            torch.float32 if reduce_dtype == torch.float16 else reduce_dtype,  # a sum may leave its range
            float(self.group.divisor or mesh.size()),
            mesh.get_group(0).group_name if last and mesh.size(0) > 1 else "",
        )

    def whole(self, parameter: Any) -> Any:
        """A small one gathered, with its graph; what is whole or None as it is."""
        return gathered(parameter.to_local(), self.stream(parameter)) if _in_rows(parameter) else parameter

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """The head is called with no rows at all, and answers without its weight."""

        def no_logits(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            if hidden.numel():
                raise RuntimeError("the head was called while another thread streams it")
            return hidden.new_zeros((*hidden.shape[:-1], self.vocabulary)) + hidden.sum()

        with forward_replaced(self.head, no_logits), private.fsdp_asleep(self.head):
            yield


@contextmanager
def forward_replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Calls of the module run another function, between the module's own hooks."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _in_rows(value: Any) -> bool:
    """Whether it is a DTensor in rows over the ranks of one dimension of its mesh, each row on one of them."""
    if not isinstance(value, Tensor) or not hasattr(value, "placements"):
        return False
    from torch.distributed.tensor import Replicate, Shard  # whoever has made one has imported it

    *others, last = value.placements
    return type(last) is Shard and last.dim == 0 and len(others) < 2 and all(type(o) is Replicate for o in others)
