"""What arguments that are tensors have to be, whoever takes them."""

from __future__ import annotations

import math
import sys
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fused_rlhf import private


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_tensor(name: str, value: object, device: torch.device | None = None) -> None:
    """A tensor with numbers of its own, on `device` where it must be: what all arguments have to be."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if torch.compiler.is_compiling():  # tensors are stand-ins there
        return
    stand_in = private.is_fake(value)  # of someone who traces through us
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not stand_in:
        how = dtensor(value) or f"a {type(value).__name__}; make it one first (a quantised tensor by dequantize())"
        raise TypeError(f"{name} must be a plain tensor, got {how}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on the device of hidden, {device}, got {value.device}")
    if value.is_meta and not stand_in:
        raise ValueError(f"{name} must hold numbers, got a tensor on the meta device")
    if torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name} must not carry a tangent: forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) are not "
            "implemented; use backward"
        )


def dtensor(value: Tensor) -> str:
    """Of a DTensor, what it is and what to do about it; "" of any other tensor."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None or not isinstance(value, distributed.DTensor):
        return ""
    placements = ", ".join(map(repr, value.placements))
    return (
        f"a DTensor, {placements} over {value.device_mesh.size()} processes (tensor parallelism or FSDP2): take the head from "
        "lm_head.forward, of a model that fully_shard or transformers' tp_plan has sharded, or give this process's rows, "
        "to_local(), with a process_group, or gather the tensor: full_tensor(), with grad_placements=[Partial()] where "
        "processes have data of their own"
    )


def check_count(name: str, value: Any, live: int) -> Any:
    """A global count of which this call has a share of `live`: positive; 0 where this call has nothing, and then 1.

    Of a count on a GPU the value is not read.
    """
    if isinstance(value, Tensor):
        if torch.compiler.is_compiling():
            return value
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got {shape(value)}")
        if value.device.type != "cpu":
            return value.clamp(min=1) if live == 0 else value
        number: Any = value.item()
    else:
        number = value
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(value).__name__}")
    if not math.isfinite(number) or number < 0 or (number == 0 and live > 0):
        raise ValueError(f"{name} must be positive, as this call has a share of {live} in it; got {number}")
    return value if number else 1
