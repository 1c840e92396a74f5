"""A head that ranks hold in shards, each with tokens of its own: the weight travels, block by block, and is never whole.

    forward    the partial statistics of a block, merged with those of the blocks before
    backward   its dlogits again; d_hidden is summed here, dW of the block goes home

Every rank goes through all blocks, whether it has a row or not.

    memory     shard + its gradient + 2 blocks + 2 gradients of blocks + what the op takes for one + fp32 d_hidden
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_rlhf import backends
from fused_rlhf.kernels.interface import (
    Backend,
    Grads,
    Needs,
    Projection,
    Rows,
    Stats,
    Stream,
    TokenGrads,
    Work,
    indices,
)
from fused_rlhf.kernels.statistics import STATISTICS, Partials, merge
from fused_rlhf.op.adapter import no_autocast
from fused_rlhf.op.once import once_differentiable
from fused_rlhf.op.parallel import LN2
from fused_rlhf.op.rows import scatter
from fused_rlhf.op.streams import Home, blocks, rows_of_block


def linear_logprobs(rows: Rows, head: Projection, outputs: tuple[str, ...], backend: str) -> Stats:
    """As `op.logprobs.linear_logprobs` of rows that a `Door` has let in; every rank must call, and go back."""
    operands = (rows.hidden, head.weight, head.bias, head.lora_b)
    logprobs, *found = _LogProbs.apply(*operands, rows, head, outputs, backend)
    return Stats.of(logprobs, dict(zip(_names(outputs), found)))


def _names(outputs: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(("lse", *outputs)))


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
        names = _names(outputs)
        with no_autocast(hidden):
            stats = statistics(backends.resolve(backend, hidden), rows, head, outputs)
        kept = (stats.logprobs, stats.lse, stats.entropy, stats.normaliser)
        ctx.save_for_backward(hidden, weight, bias, lora_b, rows.targets, rows.temperature, *kept)
        ctx.head, ctx.names, ctx.backend = head, names, backend
        ctx.mark_non_differentiable(*(stats[name] for name in names if not STATISTICS[name].differentiable))
        ctx.set_materialize_grads(False)
        return (stats.logprobs, *(stats[name] for name in names))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple:  # type: ignore[override]
        hidden, weight, bias, lora_b, targets, temperature, logprobs, lse, entropy, normaliser = ctx.saved_tensors
        head = replace(ctx.head, weight=weight, bias=bias, lora_b=lora_b)
        of_logprobs, *rest = upstream
        given = dict(zip(ctx.names, rest))
        grads = TokenGrads(of_logprobs, given.get("entropy"), given["lse"])
        live = grads.live(targets)
        count = int(live.sum())
        some = None if count == len(live) else indices(live, count)
        stats = Stats(logprobs, lse, {} if entropy is None else {"entropy": entropy}, normaliser=normaliser).pick(some)
        rows, needs = Rows(hidden, targets, temperature).pick(some), Needs(*ctx.needs_input_grad[:4])
        with no_autocast(hidden):
            found = gradients(backends.resolve(ctx.backend, hidden), rows, head, stats, grads.pick(some), needs)
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
    backend: Backend, rows: Rows, head: Projection, stats: Stats, upstream: TokenGrads, needs: Needs
) -> Grads:
    """As `Backend.gradients`: of the rows here, but of this rank's shard over the rows of all ranks."""
    assert head.stream is not None
    wide = replace(rows, hidden=rows.hidden.to(head.wide))  # each block's d_hidden, too
    d_hidden = torch.zeros_like(wide.hidden) if needs.hidden else None
    whole = replace(head, weight=head.weight[:0])  # bias and B alone
    _, _, d_bias, d_lora = Grads.zeros(rows.hidden, whole, needs)
    home = Home(head.weight, head.stream) if needs.weight else None
    for block in blocks(head.weight, head.stream):
        of_block = block.weight[:0]
        if rows.count:
            found = backend.gradients(block.rows(wide), block.head(head), stats, upstream, needs)
            if d_hidden is not None and found.hidden is not None:
                d_hidden += found.hidden
            for total, part in ((d_bias, found.bias), (d_lora, found.lora)):
                if total is not None and part is not None:
                    total[block.columns] = part
            of_block = of_block if found.weight is None else found.weight
        if home is not None:
            home.send(block.start, block.count, of_block)
    d_weight = None if home is None else home.complete()
    return Grads(None if d_hidden is None else d_hidden.to(rows.hidden.dtype), d_weight, d_bias, d_lora)


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
