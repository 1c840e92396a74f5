"""Counts what would make the host wait for a GPU, on a CPU whose tensors stand for one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_rlhf.op import logprobs

aten = torch.ops.aten
# Of these the host needs a value or a count before it can go on; a tensor made of numbers is copied from the host.
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.lift_fresh}
READS |= {aten.unique_dim, aten._unique, aten._unique2, aten.unique_consecutive, aten.bincount}
BY_INDEX = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
INSIDE = {f"fused_rlhf::{op._name}": op._init_fn for op in (logprobs._logprobs, logprobs._logprobs_backward)}


class Waits(TorchDispatchMode):
    """While entered: `reads`, by the name of the op, and `launches`, the ops that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.launches: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in INSIDE:  # what an op of ours does is counted, too
            with self:
                return INSIDE[func._schema.name](*args, **kwargs)
        packet = func.overloadpacket
        if packet in READS or _lists_a_mask(packet, args) or _lacks_a_size(func, kwargs):
            self.reads.append(packet.__name__)
        computes_nothing = (
            "empty",
            "new_empty",
            "_local",
            "promote_types",
            "_unsafe_view",
            "lift_fresh",
            "detach",
            "alias",
        )
        if not (func.is_view or packet.__name__.startswith(computes_nothing)):
            self.launches.append(packet.__name__)
        return func(*args, **kwargs)


def _lists_a_mask(packet: Any, args: tuple[Any, ...]) -> bool:
    """Whether it indexes by a mask, whose entries are counted first."""
    if packet not in BY_INDEX:
        return False
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _lacks_a_size(func: Any, kwargs: dict[str, Any]) -> bool:
    return func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None


@contextmanager
def counting() -> Iterator[Waits]:
    """`Waits` that sees `tolist`, too, which of a CPU's tensor calls no op."""
    waits, tolist = Waits(), Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        if tensor.dim():
            waits.reads.append("tolist")
        return tolist(tensor)

    with mock.patch.object(Tensor, "tolist", counted), waits:
        yield waits


def waits_of(call: Callable[[], Tensor]) -> tuple[int, Waits]:
    """Of a call and the backward of what it gives: the reads before the backward, and all that was counted."""
    with counting() as waits:
        value = call()
        forward = len(waits.reads)
        if value.requires_grad:
            value.backward()
    return forward, waits
