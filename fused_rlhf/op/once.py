"""A backward that is not to be differentiated: torch's `once_differentiable`, without its gap.

torch's raises where the upstream gradient has a graph. Where it has none, as that of a plain loss, the gradients come back
without one, and a penalty on them added to other terms would silently count for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:  # type: ignore[override]
        raise RuntimeError(
            "second derivatives are not implemented: the backward of fused_rlhf's functions is once_differentiable"
        )


def once_differentiable(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """For the backward of an autograd.Function: gradients taken with `create_graph` raise when they are differentiated."""

    @functools.wraps(backward)
    def once(ctx: Any, *upstream: Any) -> tuple:
        with torch.no_grad():
            found = backward(ctx, *upstream)
        if not torch.is_grad_enabled():  # no graph of the gradients is wanted
            return found
        anchor = torch.zeros((), requires_grad=True)
        return tuple(_Once.apply(value, anchor) if isinstance(value, Tensor) else value for value in found)

    return once
