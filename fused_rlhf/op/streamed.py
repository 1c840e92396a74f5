"""A head that ranks hold in shards, each with tokens of its own: the weight travels, block by block, and is never whole.

    forward    the partial statistics of a block, merged with those of the blocks before
    backward   its dlogits again; d_hidden is summed here, dW of the block goes home

Every rank goes through all blocks, whether it has a row or not.

    memory     shard + its gradient + 2 blocks + 2 gradients of blocks + what the op takes for one + fp32 d_hidden
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_rlhf import backends
from fused_rlhf.kernels.interface import (
    Backend,
    Comparison,
    EntryGrads,
    Grads,
    Needs,
    Projection,
    RowPairs,
    Rows,
    Stats,
    Stream,
    Sums,
    TokenGrads,
    Work,
    indices,
    pick,
)
from fused_rlhf.kernels.statistics import STATISTICS, Partials, merge, with_places
from fused_rlhf.op.adapter import no_autocast
from fused_rlhf.op.once import once_differentiable
from fused_rlhf.op.parallel import LN2, entries_of, whole_divergence
from fused_rlhf.op.rows import scatter
from fused_rlhf.op.streams import Block, Home, blocks, gathered, rows_of_block


def linear_logprobs(rows: Rows, head: Projection, outputs: tuple[str, ...], backend: str) -> Stats:
    """As `op.logprobs.linear_logprobs` of rows that a `Door` has let in; every rank must call, and go back."""
    operands = (rows.hidden, head.weight, head.bias, head.lora_b)
    return Stats.named(_LogProbs.apply(*operands, rows, head, outputs, backend), outputs)


_KEPT = ("entropy", "sum_sq", "max_logit", "argmax")  # of the statistics, for the backward


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_b: Tensor | None,
        rows: Rows,
        head: Projection,
        outputs: tuple[str, ...],
        backend: str,
    ) -> tuple[Tensor, ...]:
        names = Stats.names(outputs)
        with no_autocast(hidden):
            stats = statistics(backends.resolve(backend, hidden), rows, head, with_places(outputs))
        kept = (stats.logprobs, stats.lse, stats.normaliser, *map(stats.extra.get, _KEPT))
        ctx.save_for_backward(hidden, weight, bias, lora_b, rows.targets, rows.temperature, *kept)
        ctx.head, ctx.names, ctx.backend = head, names, backend
        ctx.mark_non_differentiable(*(stats[name] for name in names if not STATISTICS[name].differentiable))
        ctx.set_materialize_grads(False)
        return stats.flat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple:  # type: ignore[override]
        hidden, weight, bias, lora_b, targets, temperature, logprobs, lse, normaliser, *kept = ctx.saved_tensors
        head = replace(ctx.head, weight=weight, bias=bias, lora_b=lora_b)
        of_logprobs, *rest = upstream
        given = dict(zip(ctx.names, rest))
        grads = TokenGrads(of_logprobs, *(given.get(name) for name in TokenGrads._fields[1:]))
        by_max = given.get("max_logit")
        live = grads.live(targets) if by_max is None else grads.live(targets) | (by_max != 0)
        count = int(live.sum())
        some = None if count == len(live) else indices(live, count)
        extra = {name: value for name, value in zip(_KEPT, kept) if value is not None}
        stats = Stats(logprobs, lse, extra, normaliser=normaliser).pick(some)
        rows, needs = Rows(hidden, targets, temperature).pick(some), Needs(*ctx.needs_input_grad[:4])
        largest = None
        if by_max is not None:
            entries = entries_of(replace(rows, hidden=rows.hidden.to(head.wide)), stats["argmax"][:, None])
            largest = EntryGrads(entries, stats["max_logit"], pick(by_max, some))
        with no_autocast(hidden):
            backend = backends.resolve(ctx.backend, hidden)
            found = gradients(backend, rows, head, stats, grads.pick(some), needs, largest)
        return (scatter(found.hidden, some, len(hidden)), *found[1:], None, None, None, None)


def statistics(backend: Backend, rows: Rows, head: Projection, outputs: tuple[str, ...]) -> Stats:
    """As `Backend.statistics`, over all shards."""
    assert head.stream is not None
    whole, normaliser = Partials.none(rows.temperature.to(head.wide), outputs), None
    for block in blocks(head.weight, head.stream):
        if not rows.count:
            continue
        found = backend.partials(block.rows(rows), block.head(head), outputs)
        whole = merge((whole, block.placed(found.partials)))
        if found.normaliser is not None:  # in units of ln 2
            own = found.normaliser.double() * LN2
            normaliser = own if normaliser is None else torch.logaddexp(normaliser, own)
    logprobs, extra = whole.finish(rows.targets, head.vocabulary, outputs)
    stats = Stats.of(logprobs, extra)
    return stats if normaliser is None else replace(stats, normaliser=normaliser.div(LN2).to(logprobs.dtype))


def gradients(
    backend: Backend,
    rows: Rows,
    head: Projection,
    stats: Stats,
    upstream: TokenGrads,
    needs: Needs,
    entries: EntryGrads | None = None,
) -> Grads:
    """As `Backend.gradients`: of the rows here, but of this rank's shard over the rows of all ranks.

    entries: of these rows; they add to d_hidden, too.
    """
    assert head.stream is not None
    wide = replace(rows, hidden=rows.hidden.to(head.wide))  # each block's d_hidden, too
    total = _Total(rows.hidden, head, needs)
    for block in blocks(head.weight, head.stream):
        found = None
        if rows.count:
            of_columns, own = block.head(head), None if entries is None else block.entries(entries)
            by_mean = upstream.mean_logit
            if by_mean is not None:  # the backend divides by the columns of the block
                by_mean = by_mean * (len(block.weight) / head.vocabulary)
            some = upstream._replace(mean_logit=by_mean)
            found = backend.gradients(block.rows(wide), of_columns, stats, some, needs, entries=own)
            if found.hidden is not None and own is not None:
                found = found._replace(hidden=found.hidden + backend.gathered_hidden(own, of_columns))
        total.add(block, found)
    return total.grads()


class _Total:
    """The gradients of all blocks."""

    def __init__(self, hidden: Tensor, head: Projection, needs: Needs) -> None:
        self.stream, self.dtype, self.home = head.stream, hidden.dtype, None
        if needs.weight and head.stream is not None:
            self.home, needs = Home(head.weight, head.stream), needs._replace(weight=False)
        self.sums = Grads.zeros(hidden[:0], head, needs)
        if needs.hidden:
            self.sums = self.sums._replace(hidden=torch.zeros_like(hidden, dtype=head.wide))

    def add(self, block: Block, found: Grads | None) -> None:
        """None: there are no rows here."""
        hidden, *of_head = self.sums
        if found is not None:
            if hidden is not None and found.hidden is not None:
                hidden += found.hidden
            for total, part in zip(of_head, found[1:]):
                if total is not None and part is not None:
                    total[block.columns] = part
        if self.home is not None:
            weight = None if found is None else found.weight
            self.home.send(block.start, block.count, block.weight[:0] if weight is None else weight)

    def grads(self) -> Grads:
        hidden = None if self.sums.hidden is None else self.sums.hidden.to(self.dtype)
        weight = self.sums.weight if self.home is None else self.home.complete()
        return self.sums._replace(hidden=hidden, weight=weight)


def comparable(of: Comparison) -> Comparison:
    """With heads that can be gone through together: streamed ones as they are where their blocks are of the same columns. Else,
    and for the JSD, whose terms need the whole of a row's sums first, with all their rows."""
    one, other = of.policy.stream, of.ref.stream
    alike = one is None or other is None or (one.world, one.length) == (other.world, other.length)
    return of if alike and of.kind != "jsd" else replace(of, policy=_whole(of.policy), ref=_whole(of.ref))


def _whole(head: Projection) -> Projection:
    return head if head.stream is None else replace(head, weight=gathered(head.weight, head.stream), stream=None)


def divergence(backend: Backend, rows: RowPairs, of: Comparison) -> tuple[Tensor, Sums]:
    """As `Backend.divergence`, forward or reverse, of what `comparable` gives."""
    found = []
    for _, some in _compared(of):
        if len(rows.temperature):
            value, sums = backend.divergence(rows, some)
            found.append((value, sums.lse, sums.ref_lse, sums.shift))
    if not found:
        none = rows.temperature
        return none, Sums(none, none, none, none)
    return whole_divergence(of.kind, *(torch.stack(parts) for parts in zip(*found)))


def divergence_gradients(
    backend: Backend, rows: RowPairs, of: Comparison, sums: Sums, upstream: Tensor, needs: Needs
) -> Grads:
    """As `Backend.divergence_gradients`; see `gradients`."""
    wide = replace(rows, hidden=rows.hidden.to(of.policy.wide))
    total = _Total(rows.hidden, of.policy, needs)
    for block, some in _compared(of):
        found = None
        if len(rows.temperature):
            found = backend.divergence_gradients(wide, some, sums, upstream, needs)
        total.add(block, found)
    return total.grads()


def _compared(of: Comparison) -> Iterator[tuple[Block, Comparison]]:
    """The same columns of both heads; the block is the policy's where that is streamed."""
    streams = [(head.weight, head.stream) for head in (of.policy, of.ref) if head.stream is not None]
    most = min(rows_of_block(stream, weight.shape[1]) for weight, stream in streams)
    for together in zip(*(blocks(weight, stream, most) for weight, stream in streams)):
        first, last = together[0], together[-1]
        yield first, replace(of, policy=first.head(of.policy), ref=last.head(of.ref))


def memory(backend: Backend, work: Work, stream: Stream) -> float:
    """Bytes at the peak of a call and its backward, the gradient of hidden included, shard and gradient of the shard not."""
    N, H, count = work.rows, work.hidden_size, rows_of_block(stream, work.hidden_size)
    columns, held = min(stream.world * count, stream.length), 2 if count < stream.rows else 1
    numbers = held * stream.dtype.itemsize
    if work.needs.weight:
        numbers += held * stream.reduce_dtype.itemsize
        if stream.reduce_dtype == stream.dtype:  # one of them is what the backend makes, and counts
            numbers -= stream.dtype.itemsize
    wide = torch.promote_types(work.dtype, torch.float32).itemsize
    copies = 2 if work.dtype.itemsize < wide else 1  # d_hidden, and hidden where it is narrower
    of_block = replace(work, route="two_phase", vocabulary=columns)
    return backend.memory(of_block) + numbers * columns * H + copies * wide * N * H
