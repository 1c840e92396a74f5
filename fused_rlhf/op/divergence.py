"""Divergence of two LM heads over the whole vocabulary, without the logits of either.

With p the policy's probabilities, q the reference's and m = beta q + (1 - beta) p:

    forward   KL(q || p) = sum q (log q - log p)
    reverse   KL(p || q) = sum p (log p - log q)
    jsd       beta KL(q || m) + (1 - beta) KL(p || m)

The terms of these sums cancel where p is close to q. With d = log p - log q, and since the sum of p - q is 0, they equal

    forward   sum q (e^d - 1 - d)
    reverse   sum p (e^-d - 1 + d)
    jsd       sum -beta q log(m / q) - (1 - beta) p log(m / p)

of which no term is negative, and which an error in either log-sum-exp enters squared. Back, with upstream g and
s = log p - log q (reverse) or (1 - beta) (log p - log m) (jsd):

    forward   dz = g (p - q)          reverse, jsd   dz = g p (s - sum p s)

Backends compute them; this file makes an autograd function of theirs.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_rlhf import backends
from fused_rlhf.kernels.interface import Comparison, Needs, Projection, RowPairs, Sums, indices, pick
from fused_rlhf.op import parallel, streamed
from fused_rlhf.op.once import once_differentiable
from fused_rlhf.op.rows import scatter


def divergence(rows: RowPairs, of: Comparison, backend: str) -> Tensor:
    """(N,), differentiable in rows.hidden and the operands of of.policy, once."""
    with torch.autocast(rows.hidden.device.type, enabled=False):  # the compute dtypes were read from it already
        policy = of.policy
        return _Divergence.apply(rows.hidden, policy.weight, policy.bias, policy.lora_b, rows, of, backend)


def divergence_block(rows: RowPairs, of: Comparison, backend: str) -> int:
    """Of sharded heads: rows of a block, as this rank would take them; 0 where the ranks exchange what they found once."""
    if of.kind != "jsd" or not rows.count:
        return 0
    if not of.policy.vocabulary:
        return rows.count
    return backends.resolve(backend, rows.hidden).divergence_block(rows, of)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_b: Tensor | None,
        rows: RowPairs,
        of: Comparison,
        backend: str,
    ) -> Tensor:
        value, sums = _way(of).divergence(backends.resolve(backend, hidden), rows, of)
        ctx.save_for_backward(
            hidden, rows.ref_hidden, rows.temperature, *_operands(of.policy), *_operands(of.ref), *sums
        )
        ctx.of, ctx.backend = of, backend
        ctx.set_materialize_grads(False)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None) -> tuple:  # type: ignore[override]
        if upstream is None:
            return (None,) * 7
        hidden, ref_hidden, temperature, *kept = ctx.saved_tensors
        of = replace(ctx.of, policy=_with(ctx.of.policy, *kept[:3]), ref=_with(ctx.of.ref, *kept[3:6]))
        live = upstream != 0  # a NaN is not zero: it stays, and is seen
        count = int(live.sum())
        some = None if count == len(live) else indices(live, count)
        rows = RowPairs(hidden, ref_hidden, temperature).pick(some)
        g, *sums = (pick(v, some) for v in (upstream, *kept[6:]))
        computed = backends.resolve(ctx.backend, hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            needs = Needs(*ctx.needs_input_grad[:4])
            grads = _way(of).divergence_gradients(computed, rows, of, Sums(*sums), g, needs)
        return (scatter(grads.hidden, some, len(hidden)), *grads[1:], None, None, None)


def _way(of: Comparison) -> ModuleType:
    """Which module goes through the columns of both heads."""
    return parallel if of.policy.stream is None and of.ref.stream is None else streamed


def _operands(head: Projection) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return head.weight, head.bias, head.lora_b


def _with(head: Projection, weight: Tensor, bias: Tensor | None, lora_b: Tensor | None) -> Projection:
    return replace(head, weight=weight, bias=bias, lora_b=lora_b)
