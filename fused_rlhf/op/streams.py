"""How rows that ranks hold in shards travel: here in blocks of some rows of every shard, their gradients home again.

block i    rows [i k, (i + 1) k) of every rank's shard, by one all-gather; the next one is on its way meanwhile
home       each rank's gradient of all these rows: their sum, by a reduce-scatter, while the next block is computed
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_rlhf import private
from fused_rlhf.kernels.interface import EntryGrads, Projection, Rows, Stream
from fused_rlhf.kernels.statistics import STATISTICS, Partials
from fused_rlhf.op.once import once_differentiable

BYTES = 64 << 20  # of a block
STEP = 128  # columns that kernels take at a time: a block has a multiple of them of every shard


@dataclass(frozen=True)
class Block:
    """Some rows of every rank's shard, here. Their columns ascend: only the last shards are shorter than the others."""

    stream: Stream
    start: int  # in each shard
    count: int  # of each
    weight: Tensor  # (v, H), v = world count without what is beyond the ends of shards

    @property
    def columns(self) -> Tensor:
        """(v,) int64 of the whole."""
        return self.column_of(torch.arange(len(self.weight), device=self.weight.device))

    def column_of(self, place: Tensor) -> Tensor:
        return place // self.count * self.stream.rows + self.start + place % self.count

    def place_of(self, column: Tensor) -> Tensor:
        """-1 where it is not in the block."""
        owner, row = column // self.stream.rows, column % self.stream.rows - self.start
        inside = (row >= 0) & (row < self.count)
        return torch.where(inside, owner * self.count + row, -1)

    def rows(self, rows: Rows) -> Rows:
        """With targets by their place in the block."""
        return replace(rows, targets=self.place_of(rows.targets))

    def head(self, head: Projection) -> Projection:
        """Its columns; also of a head that is whole, beside the one that the block is of."""
        columns = self.columns
        weight = self.weight if head.stream is not None else head.weight[columns]
        bias, lora_b = (whole if whole is None else whole[columns] for whole in (head.bias, head.lora_b))
        return replace(head, weight=weight, bias=bias, lora_b=lora_b, stream=None)

    def entries(self, grads: EntryGrads) -> EntryGrads | None:
        """Those of its columns, by their place; None where there are none. Waits for the device."""
        place = self.place_of(grads.entries.ids)
        here = (place >= 0).nonzero().squeeze(1)
        entries = replace(grads.entries, rows=grads.entries.rows[here], ids=place[here])
        return EntryGrads(entries, grads.logits[here], grads.upstream[here]) if entries.count else None

    def placed(self, partials: Partials) -> Partials:
        """With columns of the whole."""
        parts = {
            name: self.column_of(part) if STATISTICS[name].of_columns else part for name, part in partials.parts.items()
        }
        return replace(partials, parts=parts)


def rows_of_block(stream: Stream, width: int) -> int:
    """Rows of each shard that a block takes, of this width."""
    most = BYTES // (stream.world * width * stream.dtype.itemsize)
    return max(min(most // STEP * STEP or most, stream.rows), 1)


def blocks(shard: Tensor, stream: Stream, most: int = 0) -> Iterator[Block]:
    """All rows of all shards (R, H), `most` of each at a time. A block is there until the next one is asked for."""
    group, width = private.process_group(stream.group), shard.shape[1]
    most = most or rows_of_block(stream, width)
    starts = range(0, stream.rows, most)
    buffers = [shard.new_empty((stream.world * most, width), dtype=stream.dtype) for _ in starts[:2]]

    def fetched(number: int) -> tuple[Block, Any, Tensor]:
        start = starts[number]
        count = min(most, stream.rows - start)
        into = buffers[number % 2][: stream.world * count]
        own = _padded(shard[start : start + count], count, stream.dtype)
        work = private.all_gather(into, own, group)
        return Block(stream, start, count, into[: _inside(stream, start, count)]), work, own

    coming = fetched(0)
    for number in range(len(starts)):
        block, work, _ = coming
        work.wait()
        if number + 1 < len(starts):
            coming = fetched(number + 1)
        yield block


def _inside(stream: Stream, start: int, count: int) -> int:
    """How many there are of these rows of all shards."""
    ends = [min(max(stream.length - rank * stream.rows, 0), stream.rows) for rank in range(stream.world)]
    return sum(min(max(end - start, 0), count) for end in ends)


def _padded(rows: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(count, ...) of at most as many rows; themselves where nothing is to be done."""
    if len(rows) == count and rows.dtype == dtype:
        return rows.contiguous()
    made = rows.new_zeros((count, *rows.shape[1:]), dtype=dtype)
    made[: len(rows)] = rows
    return made


class Home:
    """Where the gradient of this rank's shard comes together."""

    def __init__(self, shard: Tensor, stream: Stream) -> None:
        self.stream, self.gradient = stream, torch.empty_like(shard)
        self.coming: tuple[int, Tensor, Any, Tensor] | None = None

    def send(self, start: int, count: int, gradient: Tensor) -> None:
        """That of these rows of every shard, (at most world count, ...) of this rank's tokens."""
        stream = self.stream
        own = _padded(gradient, stream.world * count, stream.reduce_dtype)
        self._arrived()
        part = own.new_empty((count, *own.shape[1:]))
        self.coming = start, part, private.reduce_scatter(part, own, private.process_group(stream.group)), own

    def complete(self) -> Tensor:
        """In the shard's dtype."""
        self._arrived()
        return self.gradient

    def _arrived(self) -> None:
        if self.coming is None:
            return
        start, part, work, _ = self.coming
        work.wait()
        if self.stream.replicas:
            dist.all_reduce(part, group=private.process_group(self.stream.replicas))
        own = self.gradient[start : start + len(part)]
        own.copy_(part[: len(own)].div_(self.stream.divisor))
        self.coming = None


def gathered(shard: Tensor, stream: Stream) -> Tensor:
    """(length, ...) in the stream's dtype: a shard's whole, where there is no way around it. Every rank must call."""
    return _Gathered.apply(shard, stream)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        ctx.stream = stream
        ctx.save_for_backward(shard)
        own = _padded(shard, stream.rows, stream.dtype)
        whole = own.new_empty((stream.world * stream.rows, *own.shape[1:]))
        private.all_gather(whole, own, private.process_group(stream.group)).wait()
        return whole[: stream.length]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:  # type: ignore[override]
        (shard,) = ctx.saved_tensors
        home = Home(shard, ctx.stream)
        home.send(0, ctx.stream.rows, upstream)
        return home.complete(), None
