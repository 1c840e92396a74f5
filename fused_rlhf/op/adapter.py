"""A low-rank adapter on the head: its activations ride behind the hidden states, its second factor in the head."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.kernels.interface import Projection
from fused_rlhf.op.once import once_differentiable

ROWS = 8192  # rows at a time


def no_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """The compute dtype was read from autocast at the door; from here on a cast would be a second one."""
    return torch.autocast(tensor.device.type, enabled=False)


def with_adapter(hidden: Tensor, a: Tensor, scale: float, head: Projection) -> Tensor:
    """(N, H) hidden states as a head with `lora_b` takes them; a (r, H)."""
    with no_autocast(hidden):
        return _LowRank.apply(hidden, a, scale, head)


class _LowRank(torch.autograd.Function):
    """(N, H) -> (N, H + copies r): the hidden states and scale (h A^T), in parts that half precision can hold."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, a: Tensor, scale: float, head: Projection) -> Tensor:  # type: ignore[override]
        factor = a.to(head.adapter_dtype).to(head.wide).T
        blocks = []
        for some in hidden.split(ROWS):
            t = head.parts(scale * (some.to(head.compute_dtype).to(head.wide) @ factor), head.t_parts)
            blocks.append(torch.cat([t[i] for i, _ in head.adapter_pairs], 1))
        x = torch.promote_types(hidden.dtype, head.compute_dtype)
        ctx.save_for_backward(hidden, a)
        ctx.scale, ctx.wide, ctx.pairs = scale, head.wide, head.adapter_pairs
        return torch.cat([hidden.to(x), torch.cat(blocks).to(x)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:  # type: ignore[override]
        hidden, a = ctx.saved_tensors
        H, r = hidden.shape[1], len(a)
        d_a = torch.zeros_like(a, dtype=ctx.wide)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, len(hidden), ROWS):
            rows = slice(i, i + ROWS)
            # The first part of t has the gradient of t itself: it met all parts of B.
            blocks = upstream[rows, H:].to(ctx.wide).split(r, 1)
            d_t = ctx.scale * sum(block for block, (i, _) in zip(blocks, ctx.pairs) if i == 0)
            d_a += d_t.T @ hidden[rows].to(ctx.wide)
            if d_hidden is not None:
                d_hidden[rows] = upstream[rows, :H] + d_t @ a.to(ctx.wide)
        return d_hidden, d_a.to(a.dtype), None, None
