"""Divergences of two heads in tiles: the streamed form of the formulas in `fused_rlhf.op.divergence`.

The forward holds both heads' logits for one block of rows, the backward computes a tile of each again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import relu

from fused_rlhf.backends import tiling
from fused_rlhf.backends.tiling import Operands, slices
from fused_rlhf.kernels.interface import Comparison, Grads, MergeTotals, Needs, Projection, RowPairs, Rows, Sums, Work
from fused_rlhf.kernels.statistics import reference_of


def times(weight: Tensor, log: Tensor) -> Tensor:
    """weight * log, 0 where the weight is, whatever the logarithm."""
    return (weight * log).masked_fill_(weight == 0, 0.0)


def kl_terms(a: Tensor, b: Tensor, gap: Tensor) -> Tensor:
    """a (e^gap - 1 - gap), gap = log b - log a; a e^gap is b, where that would overflow or has nothing to cancel."""
    near = a * (torch.expm1(gap) - gap)
    return torch.where(gap.abs() < 1, near, (b - a) - times(a, gap))


def _mixture(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log m - log p and log m - log q."""
    share = torch.full_like(d, 1 - beta).masked_fill_(d > 0, beta)  # in m, of the less likely of p and q
    smaller = torch.log1p(share * torch.expm1(-d.abs()))  # log m less the log of the more likely
    return smaller + relu(-d), smaller + relu(d)


def _terms(of: Comparison, p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor | None]:
    """(n, v) terms of the divergence, and of sum p s where that is needed."""
    if of.kind == "forward":
        return kl_terms(q, p, d), None
    if of.kind == "reverse":
        return kl_terms(p, q, -d), times(p, d)
    over_p, over_q = _mixture(d, of.beta)
    of_p = (of.beta - 1) * times(p, over_p)
    return of_p - of.beta * times(q, over_q), of_p


def _d_logits(of: Comparison, p: Tensor, q: Tensor, d: Tensor, mean: Tensor) -> Tensor:
    if of.kind == "forward":
        return p - q
    score = d if of.kind == "reverse" else (of.beta - 1) * _mixture(d, of.beta)[0]
    return times(p, score - mean[:, None])


class _Pair:
    """One call's inputs: two heads, row block by row block and tile by tile."""

    def __init__(self, rows: RowPairs, of: Comparison) -> None:
        self.policy = self._operands(rows.hidden, of.policy, rows.temperature)
        self.ref = self._operands(rows.ref_hidden, of.ref, rows.temperature)
        self.count, self.vocabulary = len(rows.hidden), of.policy.vocabulary
        # Forward and backward take the same blocks, so that they see the same bits.
        agreed = 0 if of.policy.shard is None else of.policy.shard.block
        self.block = agreed or divergence_block(rows, of)

    @staticmethod
    def _operands(hidden: Tensor, head: Projection, temperature: Tensor) -> Operands:
        no_targets = torch.zeros(1, dtype=torch.int64, device=hidden.device).expand(len(hidden))
        return Operands(Rows(hidden, no_targets, temperature), head)

    def row_blocks(self) -> Iterator[slice]:
        return slices(self.count, self.block)

    def tiles(self) -> Iterator[slice]:
        return slices(self.vocabulary, tiling.TILE)


def _whole_rows(pair: _Pair, op: Operands, rows: slice, out: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves the (n, V) logits of these rows in `out`; -> their maximum and sum exp(z - maximum), (n,)."""
    x = op.x(rows)
    maximum = torch.full_like(op.temperature[rows], -torch.inf)
    for columns in pair.tiles():
        z = op.logits(x, op.w(columns), rows, columns, out[:, columns])
        maximum = torch.maximum(maximum, z.amax(1))
    total, reference = torch.zeros_like(maximum), reference_of(maximum)
    for columns in pair.tiles():
        total += (out[:, columns] - reference[:, None]).exp_().sum(1)
    return maximum, total


def divergence_block(rows: RowPairs, of: Comparison) -> int:
    return tiling.row_block(2 * of.policy.vocabulary, of.policy.wide.itemsize)


def divergence(rows: RowPairs, of: Comparison, merge: MergeTotals | None = None) -> tuple[Tensor, Sums]:
    """Rows outermost: both heads' logits of a block are kept until its divergence is known."""
    pair, temperature = _Pair(rows, of), rows.temperature
    value = torch.zeros_like(temperature)
    sums = Sums(*(torch.zeros_like(temperature) for _ in Sums._fields))
    kept = pair.policy.new(2, min(pair.block, pair.count), pair.vocabulary)
    for some in pair.row_blocks():
        whole_z, whole_r = kept[:, : len(temperature[some])]
        found = (*_whole_rows(pair, pair.policy, some, whole_z), *_whole_rows(pair, pair.ref, some, whole_r))
        totals = torch.stack(found, 1)
        maximum, total, ref_maximum, ref_total = (totals if merge is None else merge(totals)).unbind(1)
        sums.lse[some], sums.ref_lse[some] = maximum + total.log(), ref_maximum + ref_total.log()
        sums.shift[some] = (maximum - ref_maximum) + (total / ref_total).log()
        for columns in pair.tiles():
            terms, means = _terms(of, *_compared(whole_z[:, columns], whole_r[:, columns], sums, some))
            value[some] += terms.sum(1)
            if means is not None:
                sums.mean[some] += means.sum(1)
    return value, sums


def _compared(z: Tensor, r: Tensor, sums: Sums, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and d of (n, v) logits, which are overwritten."""
    d = (z - r).sub_(sums.shift[rows, None])
    return z.sub_(sums.lse[rows, None]).exp_(), r.sub_(sums.ref_lse[rows, None]).exp_(), d


def divergence_gradients(rows: RowPairs, of: Comparison, sums: Sums, upstream: Tensor, needs: Needs) -> Grads:
    """Vocabulary outermost: each tile of dW is finished before the next."""
    pair, transform, temperature = _Pair(rows, of), of.policy.transform, rows.temperature
    op, sink = pair.policy, of.policy.sink(needs, tiling.TILE)
    g = upstream.to(op.wide) / temperature if op.curved else upstream.to(op.wide)  # else it is part of row_scale
    d_x = torch.zeros_like(rows.hidden, dtype=op.wide) if needs.hidden else None
    tiles = op.new(2, min(pair.block, pair.count) * tiling.TILE)
    for columns in pair.tiles():
        w, ref_w = op.w(columns), pair.ref.w(columns)
        into = sink.open(columns)
        for some in pair.row_blocks():
            x, y = op.x(some), pair.ref.x(some)
            out = tiles[:, : len(x) * len(w)].view(2, len(x), len(w))
            z = op.logits(x, w, some, columns, out[0])
            r = pair.ref.logits(y, ref_w, some, columns, out[1])
            slope = transform.slope(z, temperature[some])
            dz = _d_logits(of, *_compared(z, r, sums, some), sums.mean[some]).mul_(g[some, None])
            if slope is not None:
                dz.mul_(slope)
            if into.bias is not None:
                into.bias.addmv_(dz.T, op.row_scale[some])
            dz = dz.to(op.narrow)
            if d_x is not None:
                tiling.add_product_(d_x[some], dz, w, first=False)
            tiling.add_head_products(of.policy, into, dz, x.to(op.narrow))
        sink.close(into)
    if d_x is not None:
        d_x = d_x.mul_(op.row_scale[:, None]).to(rows.hidden.dtype)
    return sink.grads(d_x)


def divergence_memory(work: Work) -> float:
    """See `chunked.memory`."""
    N, H, V = work.rows, work.hidden_size, work.vocabulary
    tiles = 12 * 4.0 * min(tiling.row_block(V, 4), N) * min(tiling.TILE, V)
    kept = 8.0 * min(tiling.row_block(2 * V, 4), N) * V + tiles
    return max(kept, tiles + 4 * N * H + work.gradients)
