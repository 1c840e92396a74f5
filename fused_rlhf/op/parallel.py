"""A vocabulary-parallel head: each rank of a group holds some rows of the weight, and all have the same hidden states.

    forward    a header of a few integers, then [world, N, few] numbers: every rank's partial statistics, merged in rank order
    backward   the sum of d_hidden over the group, (N, H) in fp32; dW stays where its rows are

The header goes first, and says whether a rank refuses the call: then all raise, and no tensor is exchanged. It tells the
sizes of the shards, too. Merging is that of `kernels/statistics.py`, in the same order everywhere: log-probs have the same
bits on every rank.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_rlhf import private
from fused_rlhf.backends.chunked_divergence import kl_terms, times
from fused_rlhf.kernels.interface import (
    Backend,
    Comparison,
    Grads,
    Needs,
    Projection,
    RowPairs,
    Rows,
    Shard,
    Stats,
    Sums,
    TokenGrads,
)
from fused_rlhf.kernels.statistics import Partials, merge
from fused_rlhf.op.once import once_differentiable

HIDDEN_GRADS = ("sum", "local")
LN2 = math.log(2)


@dataclass
class Header:
    """What a rank says of its call: integers."""

    status: int = 1  # 0: let in
    rows: int = 0
    options: int = 0  # a hash of what must be the same everywhere
    targets: int = 0  # likewise, of the targets
    largest: int = -1  # target
    columns: int = 0  # rows of the weight here
    start: int = -1  # as the head says; -1: not
    vocabulary: int = -1

    def exchanged(self, group: Any) -> list[Header]:
        """Those of all ranks."""
        device = _device(group)
        mine = torch.tensor(list(vars(self).values()), dtype=torch.int64, device=device)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, mine, group=group)
        return [Header(*row) for row in torch.stack(found).tolist()]


def _device(group: Any) -> torch.device:
    on_gpu = "nccl" in dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@dataclass
class Gate:
    """A call's way into its group."""

    group: Any
    hidden_grad: str = "sum"
    passed: bool = field(default=False, init=False)

    def through(self, head: Projection, targets: Tensor, vocab: tuple[int | None, int | None], *options: Any) -> Shard:
        """This rank's shard, once all ranks have let their calls in.

        targets: (N,), those to compute. vocab: start and size as the head says, or None. options: what must be the same on
        every rank.

        Raises:
            RuntimeError: another rank refused its call.
            ValueError: the calls, or the shards, do not fit together; on every rank alike.
        """
        numbers = torch.arange(1, targets.numel() + 1, device=targets.device)
        summary = [targets.amax() if targets.numel() else targets.new_tensor(-1), (targets * numbers).sum()]
        largest, checksum = torch.stack(summary).tolist()
        start, size = (-1 if value is None else value for value in vocab)
        hashed = _hash(head, self.hidden_grad, *options)
        self.passed = True  # from here on the others hear of a failure by the exchange itself
        everyone = Header(0, targets.numel(), hashed, checksum, largest, head.vocabulary, start, size).exchanged(
            self.group
        )
        start, total = _place(everyone, dist.get_rank(self.group))
        return Shard(self.group.group_name, len(everyone), start, total, self.hidden_grad == "sum")

    def together(self, hidden: Tensor, head: Projection, *options: Any) -> None:
        """As `through` for a head that is streamed: each rank has rows of its own, and the same way to go."""
        operands = (hidden, head.weight, head.bias, head.lora_b)
        trained = [t is not None and t.requires_grad for t in operands] if torch.is_grad_enabled() else []
        hashed = _hash(head, *trained, *options)
        self.passed = True
        _agree(Header(0, options=hashed).exchanged(self.group), ("options", "the same options, dtypes and shapes"))


def _hash(head: Projection, *options: Any) -> int:
    """Of what must be the same on every rank."""
    shared = (*options, head.transform, head.compute_dtype, head.adapter_dtype, head.round_logits, head.grad_filter)
    shared += (head.weight.shape[1], head.bias is None, head.copies)
    return zlib.crc32(repr(shared).encode())


def sharded(head: Projection, shard: Shard | None) -> Projection:
    """The head as this shard, without the rows that pad the vocabulary."""
    if shard is None:
        return head
    count = min(max(shard.vocabulary - shard.start, 0), head.vocabulary)
    weight = head.weight if count == head.vocabulary else head.weight[:count]
    bias, lora_b = (t if t is None or count == len(t) else t[:count] for t in (head.bias, head.lora_b))
    return replace(head, weight=weight, bias=bias, lora_b=lora_b, shard=shard)


@contextmanager
def gate(group: Any, hidden_grad: str = "sum") -> Iterator[Gate | None]:
    """Of a call with `process_group=group`, None without: what is refused inside is told to the group before it is raised."""
    if group is None:
        yield None
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    own = Gate(group, hidden_grad)
    try:
        if hidden_grad not in HIDDEN_GRADS:
            raise ValueError(f"hidden_grad must be one of {list(HIDDEN_GRADS)}, got {hidden_grad!r}")
        yield own
    except Exception:
        if not own.passed:
            Header().exchanged(group)
        raise


def _agree(everyone: list[Header], *fields: tuple[str, str]) -> None:
    """Raises where a rank refused its call, or the ranks do not have the same; fields are (name, in words)."""
    refused = [i for i, header in enumerate(everyone) if header.status]
    if refused:
        raise RuntimeError(
            f"process_group: the call was refused on rank {', '.join(map(str, refused))}; its error says why"
        )
    for name, what in fields:
        values = [getattr(header, name) for header in everyone]
        if len(set(values)) > 1:
            raise ValueError(f"process_group: every rank must have {what}, got {values} by rank")


def _place(everyone: list[Header], rank: int) -> tuple[int, int]:
    """This rank's first column, and the columns of all. Raises where the ranks do not agree."""
    _agree(
        everyone,
        ("rows", "as many rows to compute"),
        ("options", "the same options, dtypes and shapes"),
        ("targets", "the same targets"),
        ("vocabulary", "the same vocab_size, or none"),
    )
    starts, begin = [], 0
    for header in everyone:
        starts.append(begin if header.start < 0 else header.start)
        begin = starts[-1] + header.columns
    total = everyone[0].vocabulary if everyone[0].vocabulary >= 0 else begin
    expected = 0
    for i, header in enumerate(everyone):
        if starts[i] != expected:
            raise ValueError(
                f"vocab_start must be where the rank before ends: {expected} on rank {i}, got {starts[i]} (shards of "
                f"{[h.columns for h in everyone]} rows)"
            )
        expected += header.columns
    if not 0 < total <= expected:
        raise ValueError(f"vocab_size must lie in [1, {expected}], the rows of all shards, got {total}")
    largest = everyone[0].largest
    if largest >= total:
        raise ValueError(f"targets must lie in [0, {total}), the vocabulary of all ranks, got {largest}")
    return starts[rank], total


def statistics(backend: Backend, rows: Rows, head: Projection, outputs: tuple[str, ...]) -> Stats:
    """As `Backend.statistics`, over the shards of all ranks."""
    if head.shard is None:
        return backend.statistics(rows, head, outputs)
    shard = head.shard
    found = backend.partials(_local(rows, shard), head, outputs)
    parts = found.partials.after(shard.start)
    numbers = parts.packed()
    if found.normaliser is not None:
        numbers = torch.cat([numbers, found.normaliser[:, None]], 1)
    gathered = numbers.new_empty((shard.world, *numbers.shape))
    dist.all_gather(list(gathered.unbind()), numbers.contiguous(), group=private.process_group(shard.group))
    everyone = [Partials.unpacked(part, outputs) for part in gathered]
    whole = merge(everyone)
    logprobs, extra = whole.finish(rows.targets, shard.vocabulary, outputs)
    normaliser = None
    if found.normaliser is not None:  # in units of ln 2
        normaliser = torch.logsumexp(gathered[..., -1].double() * LN2, 0).div(LN2).to(numbers.dtype)
    mass = None
    if found.mass is not None:
        own = parts.maximum + parts.total.log()
        mass = found.mass * (own - extra["lse"]).exp()[:, None]
    stats = Stats.of(logprobs, extra, mass)
    return replace(stats, normaliser=normaliser)


def gradients(
    backend: Backend,
    rows: Rows,
    head: Projection,
    stats: Stats,
    upstream: TokenGrads,
    needs: Needs,
    filtered: tuple[Tensor, ...] | None = None,
    entries: Any = None,
) -> Grads:
    """As `Backend.gradients`: of this rank's shard, with d_hidden of all ranks where it is asked to be summed."""
    if head.shard is None:
        return backend.gradients(rows, head, stats, upstream, needs, filtered, entries)
    if head.vocabulary:
        grads = backend.gradients(_local(rows, head.shard), head, stats, upstream, needs, filtered)
    else:
        grads = Grads.zeros(rows.hidden, head, needs)
    return _summed(grads, head)


def _summed(grads: Grads, head: Projection) -> Grads:
    """With d_hidden of all ranks, where it is asked to be summed."""
    if grads.hidden is None or head.shard is None or not head.shard.sums_hidden:
        return grads
    total = grads.hidden.to(head.wide)
    dist.all_reduce(total, group=private.process_group(head.shard.group))
    return grads._replace(hidden=total.to(grads.hidden.dtype))


def divergence(backend: Backend, rows: RowPairs, of: Comparison) -> tuple[Tensor, Sums]:
    """As `Backend.divergence`, over the shards of all ranks: (N,), and the sums over the whole vocabulary.

    With P_r and Q_r the masses of shard r in the policy and in the reference, and p_r and q_r the distributions within it,

        KL(q || p) = sum_r Q_r KL(q_r || p_r) + KL(Q || P)

    and likewise the other way round, so that what a rank finds within its shard and four numbers of it are enough.
    """
    shard = of.policy.shard
    if shard is None:
        return backend.divergence(rows, of)
    if of.policy.vocabulary:
        value, sums = backend.divergence(rows, of)
    else:
        value = torch.zeros_like(rows.temperature)
        nothing = torch.full_like(value, -torch.inf)
        sums = Sums(nothing, nothing, value, value)
    numbers = torch.stack([value, sums.lse, sums.ref_lse, sums.shift], 1)
    gathered = numbers.new_empty((shard.world, *numbers.shape))
    dist.all_gather(list(gathered.unbind()), numbers, group=private.process_group(shard.group))
    values, lses, ref_lses, shifts = gathered.unbind(-1)
    lse, ref_lse = lses.logsumexp(0), ref_lses.logsumexp(0)
    p, q = (lses - lse).exp(), (ref_lses - ref_lse).exp()
    # lse - ref_lse, exact where all shards differ alike: q sums to 1.
    about = shifts.gather(0, q.argmax(0, keepdim=True))[0]
    shift = about + torch.log1p(times(q, torch.expm1(shifts - about)).sum(0))
    shift = torch.where(shift.isfinite(), shift, lse - ref_lse)
    gap = torch.where((p == 0) & (q == 0), 0.0, shifts - shift)  # log p - log q
    if of.kind == "forward":
        whole = (times(q, values) + kl_terms(q, p, gap)).sum(0)
        return whole, Sums(lse, ref_lse, shift, torch.zeros_like(whole))
    whole = (times(p, values) + kl_terms(p, q, -gap)).sum(0)
    return whole, Sums(lse, ref_lse, shift, whole)


def divergence_gradients(
    backend: Backend, rows: RowPairs, of: Comparison, sums: Sums, upstream: Tensor, needs: Needs
) -> Grads:
    """As `Backend.divergence_gradients`: of this rank's shard, with d_hidden as in `gradients`."""
    if of.policy.shard is None or of.policy.vocabulary:
        grads = backend.divergence_gradients(rows, of, sums, upstream, needs)
    else:
        grads = Grads.zeros(rows.hidden, of.policy, needs)
    return _summed(grads, of.policy)


def gather_sequence(hidden: Tensor, group: Any) -> Tensor:
    """(s / world, ...) of each rank -> (s, ...) of all of them, in the order of the ranks.

    For sequence-parallel callers: the backward sums what the ranks have for a part, and leaves each its own
    (reduce-scatter), as `hidden_grad="local"` expects. Every rank must have as many rows.
    """
    return hidden if group is None or dist.get_world_size(group) == 1 else _GatherSequence.apply(hidden, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        world, mine = dist.get_world_size(group), hidden.contiguous()
        whole = mine.new_empty((world * len(mine), *mine.shape[1:]))
        dist.all_gather(list(whole.chunk(world)), mine, group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:  # type: ignore[override]
        parts = [part.contiguous() for part in upstream.chunk(dist.get_world_size(ctx.group))]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=ctx.group)
        return mine, None


def _local(rows: Rows, shard: Shard) -> Rows:
    """With targets counted from this rank's first column: those of other ranks are negative or beyond the shard."""
    return replace(rows, targets=rows.targets - shard.start)
