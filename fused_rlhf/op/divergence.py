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

Tiling and arithmetic are those of `chunked`. The forward holds both heads' logits for one block of rows, the backward
computes a tile of each again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import relu

from fused_rlhf import backends
from fused_rlhf.backends import chunked, reference
from fused_rlhf.kernels.interface import Grads, Head, Needs
from fused_rlhf.op import autograd

Kind = Literal["forward", "reverse", "jsd"]
KINDS: tuple[Kind, ...] = ("forward", "reverse", "jsd")


@dataclass(frozen=True)
class Comparison:
    """A policy's head, the reference's, and what is computed of the two."""

    policy: Head
    ref: Head
    kind: Kind
    beta: float  # of jsd


class Sums(NamedTuple):
    """What the backward needs of each row, (N,)."""

    lse: Tensor
    ref_lse: Tensor
    shift: Tensor  # lse - ref_lse, more exactly than the two give it
    mean: Tensor  # sum p s; 0 for the forward KL


def backend_of(name: str, hidden: Tensor) -> str:
    """ "chunked" or "reference". "auto" takes FUSED_RLHF_BACKEND, else chunked on every device.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: triton, by name or by the variable.
    """
    meant = os.environ.get(backends.VARIABLE, "auto") if name == "auto" else name
    if meant == "triton":
        raise NotImplementedError('backend="triton": the divergence has no Triton kernel yet; use backend="chunked"')
    return "chunked" if meant == "auto" else backends.choose(name, hidden)


def divergence(hidden: Tensor, ref_hidden: Tensor, of: Comparison, temperature: Tensor, backend: str) -> Tensor:
    """(N,) of (N, H) and (N, H') rows, differentiable in hidden, of.policy.weight and of.policy.bias."""
    autograd.check_temperature(temperature)
    with torch.autocast(hidden.device.type, enabled=False):  # the compute dtypes were read from it already
        if backend == "reference":
            return dense(hidden, ref_hidden, of, temperature)
        return _Divergence.apply(hidden, of.policy.weight, of.policy.bias, ref_hidden, of, temperature)


# --------------------------------------------------------------------------------------------------------- definition


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    return (a * (log_a - log_b).masked_fill(a == 0, 0.0)).sum(-1)


def dense(hidden: Tensor, ref_hidden: Tensor, of: Comparison, temperature: Tensor) -> Tensor:
    """The definition, on both heads' whole logits; gradients are autograd's."""
    log_p = torch.log_softmax(reference.logits(hidden, of.policy, temperature), -1)
    with torch.no_grad():
        log_q = torch.log_softmax(reference.logits(ref_hidden, of.ref, temperature), -1)
    if of.kind == "forward":
        return _kl(log_q, log_p)
    if of.kind == "reverse":
        return _kl(log_p, log_q)
    beta = torch.tensor(of.beta, dtype=log_p.dtype, device=log_p.device)
    floor = torch.finfo(log_p.dtype).min / 4  # -inf in both would make the gradient of logaddexp a NaN
    log_m = torch.logaddexp(log_q.clamp(min=floor) + beta.log(), log_p.clamp(min=floor) + (1 - beta).log())
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


# ----------------------------------------------------------------------------------------------------------- streamed


def _times(weight: Tensor, log: Tensor) -> Tensor:
    """weight * log, 0 where the weight is, whatever the logarithm."""
    return (weight * log).masked_fill_(weight == 0, 0.0)


def _kl_terms(a: Tensor, b: Tensor, gap: Tensor) -> Tensor:
    """a (e^gap - 1 - gap), gap = log b - log a; a e^gap is b, where that would overflow or has nothing to cancel."""
    near = a * (torch.expm1(gap) - gap)
    return torch.where(gap.abs() < 1, near, (b - a) - _times(a, gap))


def _mixture(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log m - log p and log m - log q."""
    share = torch.full_like(d, 1 - beta).masked_fill_(d > 0, beta)  # in m, of the less likely of p and q
    smaller = torch.log1p(share * torch.expm1(-d.abs()))  # log m less the log of the more likely
    return smaller + relu(-d), smaller + relu(d)


def _terms(of: Comparison, p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor | None]:
    """(n, v) terms of the divergence, and of sum p s where that is needed."""
    if of.kind == "forward":
        return _kl_terms(q, p, d), None
    if of.kind == "reverse":
        return _kl_terms(p, q, -d), _times(p, d)
    over_p, over_q = _mixture(d, of.beta)
    of_p = (of.beta - 1) * _times(p, over_p)
    return of_p - of.beta * _times(q, over_q), of_p


def _d_logits(of: Comparison, p: Tensor, q: Tensor, d: Tensor, mean: Tensor) -> Tensor:
    if of.kind == "forward":
        return p - q
    score = d if of.kind == "reverse" else (of.beta - 1) * _mixture(d, of.beta)[0]
    return _times(p, score - mean[:, None])


class _Pair:
    """One call's inputs: two heads, row block by row block and tile by tile."""

    def __init__(self, hidden: Tensor, ref_hidden: Tensor, of: Comparison, temperature: Tensor) -> None:
        self.policy = chunked.Operands(hidden, of.policy, temperature)
        self.ref = chunked.Operands(ref_hidden, of.ref, temperature)
        self.count, self.vocabulary = len(hidden), len(of.policy.weight)
        # Forward and backward take the same blocks, so that they see the same bits.
        self.block = chunked.row_block(2 * self.vocabulary, self.policy.wide.itemsize)

    def row_blocks(self) -> Iterator[slice]:
        return chunked.slices(self.count, self.block)

    def tiles(self) -> Iterator[slice]:
        return chunked.slices(self.vocabulary, chunked.TILE)


def _logits(op: chunked.Operands, x: Tensor, w: Tensor, rows: slice, columns: slice, out: Tensor) -> Tensor:
    return op.logits(x, w, op.row_scale[rows], op.temperature[rows], columns, out)


def _whole_rows(pair: _Pair, op: chunked.Operands, rows: slice, out: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves the (n, V) logits of these rows in `out`; -> their maximum and sum exp(z - maximum), (n,)."""
    x = op.x(rows)
    maximum = torch.full_like(op.temperature[rows], -torch.inf)
    for columns in pair.tiles():
        z = _logits(op, x, op.w(columns), rows, columns, out[:, columns])
        maximum = torch.maximum(maximum, z.amax(1))
    total = torch.zeros_like(maximum)
    for columns in pair.tiles():
        total += (out[:, columns] - maximum[:, None]).exp_().sum(1)
    return maximum, total


def forward(hidden: Tensor, ref_hidden: Tensor, of: Comparison, temperature: Tensor) -> tuple[Tensor, Sums]:
    """Rows outermost: both heads' logits of a block are kept until its divergence is known."""
    pair = _Pair(hidden, ref_hidden, of, temperature)
    value = torch.zeros_like(temperature)
    sums = Sums(*(torch.zeros_like(temperature) for _ in Sums._fields))
    kept = pair.policy.new(2, min(pair.block, pair.count), pair.vocabulary)
    for rows in pair.row_blocks():
        whole_z, whole_r = kept[:, : len(temperature[rows])]
        maximum, total = _whole_rows(pair, pair.policy, rows, whole_z)
        ref_maximum, ref_total = _whole_rows(pair, pair.ref, rows, whole_r)
        sums.lse[rows], sums.ref_lse[rows] = maximum + total.log(), ref_maximum + ref_total.log()
        sums.shift[rows] = (maximum - ref_maximum) + (total / ref_total).log()
        for columns in pair.tiles():
            terms, means = _terms(of, *_compared(whole_z[:, columns], whole_r[:, columns], sums, rows))
            value[rows] += terms.sum(1)
            if means is not None:
                sums.mean[rows] += means.sum(1)
    return value, sums


def _compared(z: Tensor, r: Tensor, sums: Sums, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and d of (n, v) logits, which are overwritten."""
    d = (z - r).sub_(sums.shift[rows, None])
    return z.sub_(sums.lse[rows, None]).exp_(), r.sub_(sums.ref_lse[rows, None]).exp_(), d


def backward(
    hidden: Tensor,
    ref_hidden: Tensor,
    of: Comparison,
    temperature: Tensor,
    sums: Sums,
    upstream: Tensor,
    needs: Needs,
) -> Grads:
    """Vocabulary outermost: each tile of dW is finished before the next."""
    pair = _Pair(hidden, ref_hidden, of, temperature)
    op, weight, bias, cap = pair.policy, of.policy.weight, of.policy.bias, of.policy.softcap
    g = upstream.to(op.wide) if cap is None else upstream.to(op.wide) / temperature  # else it is part of row_scale
    d_weight = torch.zeros_like(weight) if needs.weight else None
    d_bias = torch.zeros_like(bias, dtype=op.wide) if needs.bias and bias is not None else None
    d_x = torch.zeros_like(hidden, dtype=op.wide) if needs.hidden else None
    tiles = op.new(2, min(pair.block, pair.count) * chunked.TILE)
    for columns in pair.tiles():
        w, ref_w = op.w(columns), pair.ref.w(columns)
        d_tile = None if d_weight is None else torch.zeros_like(w, dtype=op.wide)
        for rows in pair.row_blocks():
            x, y = op.x(rows), pair.ref.x(rows)
            out = tiles[:, : len(x) * len(w)].view(2, len(x), len(w))
            z = _logits(op, x, w, rows, columns, out[0])
            r = _logits(pair.ref, y, ref_w, rows, columns, out[1])
            # du/dz of the cap is 1 - tanh^2
            slope = None if cap is None else 1 - (z * (temperature[rows, None] / cap)).square_()
            dz = _d_logits(of, *_compared(z, r, sums, rows), sums.mean[rows]).mul_(g[rows, None])
            if slope is not None:
                dz.mul_(slope)
            if d_bias is not None:
                d_bias[columns].addmv_(dz.T, op.row_scale[rows])
            dz = dz.to(op.narrow)
            if d_x is not None:
                chunked.add_product_(d_x[rows], dz, w, first=False)
            if d_tile is not None:
                chunked.add_product_(d_tile, dz.T, x.to(op.narrow), first=False)
        if d_weight is not None and d_tile is not None:
            d_weight[columns] = d_tile
    if d_x is not None:
        d_x = d_x.mul_(op.row_scale[:, None]).to(hidden.dtype)
    return Grads(d_x, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        of: Comparison,
        temperature: Tensor,
    ) -> Tensor:
        value, sums = forward(hidden, ref_hidden, of, temperature)
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, of.ref.weight, of.ref.bias, temperature, *sums)
        ctx.of = of
        ctx.set_materialize_grads(False)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None) -> tuple:  # type: ignore[override]
        if upstream is None:
            return (None,) * 6
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, *sums = ctx.saved_tensors
        of = replace(
            ctx.of,
            policy=replace(ctx.of.policy, weight=weight, bias=bias),
            ref=replace(ctx.of.ref, weight=ref_weight, bias=ref_bias),
        )
        live = (upstream != 0).nonzero().squeeze(1)  # a NaN is not zero: it stays, and is seen
        rows = None if len(live) == len(upstream) else live
        x, y, t, g, *some = (autograd.select(v, rows) for v in (hidden, ref_hidden, temperature, upstream, *sums))
        with torch.autocast(hidden.device.type, enabled=False):
            grads = backward(x, y, of, t, Sums(*some), g, Needs(*ctx.needs_input_grad[:3]))
        return autograd.scatter(grads.hidden, rows, len(hidden)), grads.weight, grads.bias, None, None, None
