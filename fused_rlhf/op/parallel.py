"""A vocabulary-parallel head: each rank of a group holds some rows of the weight, and all have the same hidden states.

    forward    a header of a few integers, then [world, N, few] numbers: every rank's partial statistics, merged in rank order;
               the logits of named tokens, which one rank has each, and the statistics of kept sets go with them
    backward   the sum of d_hidden over the group, (N, H) in fp32; dW stays where its rows are
    one pass   the statistics of each block of rows by themselves; the blocks are those of the rank with the smallest
    jsd        likewise the maximum and the sum of both heads, and each rank's part of the divergence in the end

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
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fused_rlhf import private
from fused_rlhf.backends.chunked_divergence import kl_terms, times
from fused_rlhf.kernels.interface import (
    Backend,
    BoundObjective,
    Comparison,
    Entries,
    EntryGrads,
    Grads,
    Kind,
    Maybe,
    Needs,
    Projection,
    RowPairs,
    Rows,
    Shard,
    ShardStats,
    Stats,
    Sums,
    TokenGrads,
)
from fused_rlhf.kernels.statistics import Partials, merge, reference_of
from fused_rlhf.op.head import Head
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
    ids: int = 0  # and of other tokens that are named
    largest: int = -1  # target
    largest_id: int = -1
    columns: int = 0  # rows of the weight here
    start: int = -1  # as the head says; -1: not
    vocabulary: int = -1
    block: int = 0  # rows of a block, as this rank would have them; 0: it would have none

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

    def through(
        self,
        head: Projection,
        asked: Head,
        rows: Rows,
        *options: Any,
        named: tuple[Tensor, ...] = (),
        block: int = 0,
    ) -> Shard:
        """This rank's shard, once all ranks have let their calls in.

        asked: the head as the caller gave it. rows: those to compute. options: what must be the same on every rank, beside
        `named`: ids of other tokens that are asked for, and the rows they are asked for, if any. block: as in `Shard`,
        as this rank would have it.

        Raises:
            RuntimeError: another rank refused its call.
            ValueError: the calls, or the shards, do not fit together; on every rank alike.
        """
        targets = rows.targets
        ids, *of_rows = (tokens.reshape(-1) for tokens in named or (targets[:0],))
        summary = [_largest(targets), _checksum(targets), _largest(ids), _checksum(torch.cat([ids, *of_rows]))]
        largest, checksum, largest_id, of_ids = torch.stack(summary).tolist()
        start, size = (-1 if value is None else value for value in (asked.vocab_start, asked.vocab_size))
        hashed = _hash(rows.hidden, head, self.hidden_grad, *options)
        self.passed = True  # from here on the others hear of a failure by the exchange itself
        header = Header(
            0, targets.numel(), hashed, checksum, of_ids, largest, largest_id, head.vocabulary, start, size, block
        )
        everyone = header.exchanged(self.group)
        start, total = _place(everyone, dist.get_rank(self.group))
        block = min(header.block for header in everyone)
        return Shard(self.group.group_name, len(everyone), start, total, self.hidden_grad == "sum", block)

    def together(self, hidden: Tensor, head: Projection, *options: Any) -> None:
        """As `through` for a head that is streamed: each rank has rows of its own, and the same way to go."""
        hashed = _hash(hidden, head, *options)
        self.passed = True
        _agree(Header(0, options=hashed).exchanged(self.group), ("options", "the same options, dtypes and shapes"))


def _hash(hidden: Tensor, head: Projection, *options: Any) -> int:
    """Of what must be the same on every rank."""
    operands = hidden, head.weight, head.bias, head.lora_b
    trained = [t if t is None else t.requires_grad and torch.is_grad_enabled() for t in operands]
    shared = (*options, head.transform, head.compute_dtype, head.adapter_dtype, head.round_logits, head.grad_filter)
    shared += (*trained, head.weight.shape[1], head.weight.device.type, head.copies)
    return zlib.crc32(repr(shared).encode())


def _largest(tokens: Tensor) -> Tensor:
    return tokens.amax() if tokens.numel() else tokens.new_tensor(-1)


def _checksum(tokens: Tensor) -> Tensor:
    return (tokens * torch.arange(1, tokens.numel() + 1, device=tokens.device)).sum()


def sharded(head: Projection, shard: Shard | None) -> Projection:
    """The head as this shard, without the rows that pad the vocabulary."""
    if shard is None:
        return head
    if head.stream is not None:
        raise ValueError("process_group must be None with a reference's head that FSDP2 shards")
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
        ("ids", "the same ids or kept sets"),
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
    for name, largest in (("targets", everyone[0].largest), ("ids", everyone[0].largest_id)):
        if largest >= total:
            raise ValueError(f"{name} must lie in [0, {total}), the vocabulary of all ranks, got {largest}")
    return starts[rank], total


def gathered(shard: Shard, *numbers: Tensor) -> list[Tensor]:
    """(world, n, k) of all ranks for each (n, k) of this one: one all-gather."""
    mine = torch.cat(numbers, 1)
    everyone = mine.new_empty((shard.world, *mine.shape))
    dist.all_gather(list(everyone.unbind()), mine, group=private.process_group(shard.group))
    return list(everyone.split([part.shape[1] for part in numbers], -1))


def merged(
    shard: Shard, found: ShardStats, targets: Tensor, outputs: tuple[str, ...], *more: Tensor
) -> tuple[Stats, list[Tensor]]:
    """The statistics of all ranks, and (world, n, k) of what else is to be told, (n, k); targets (n,) of the vocabulary."""
    parts = found.partials.after(shard.start)
    normaliser = [] if found.normaliser is None else [found.normaliser[:, None]]
    packed, *rest = gathered(shard, parts.packed(), *normaliser, *more)
    whole = merge([Partials.unpacked(part, outputs) for part in packed])
    logprobs, extra = whole.finish(targets, shard.vocabulary, outputs)
    mass = None
    if found.mass is not None:
        own = parts.maximum + parts.total.log()
        mass = found.mass * (own - extra["lse"]).exp()[:, None]
    stats = Stats.of(logprobs, extra, mass)
    if found.normaliser is not None:  # in units of ln 2
        everyone = rest.pop(0)[..., 0].double() * LN2
        stats = replace(stats, normaliser=everyone.logsumexp(0).div(LN2).to(packed.dtype))
    return stats, rest


def statistics(
    backend: Backend, rows: Rows, head: Projection, outputs: tuple[str, ...], ids: Tensor | None = None
) -> tuple[Stats, Tensor | None]:
    """As `Backend.statistics`, over the shards of all ranks; and the logits of ids, (N, K) each."""
    shard = head.shard
    of_ids = None if ids is None else _id_logits(backend, rows, head, ids)
    if shard is None:
        return backend.statistics(rows, head, outputs), of_ids
    found = backend.partials(local_rows(rows, shard), head, outputs)
    if of_ids is None:
        return merged(shard, found, rows.targets, outputs)[0], None
    stats, (everyone,) = merged(shard, found, rows.targets, outputs, of_ids)
    return stats, everyone.sum(0)  # all but one of them are 0


def _id_logits(backend: Backend, rows: Rows, head: Projection, ids: Tensor) -> Tensor:
    """(N, K), 0 for those that are another rank's."""
    entries, here = own_entries(entries_of(rows, ids), head)
    found = backend.gathered(entries, head) if entries.count else rows.temperature.new_empty(0)
    if here is not None:
        found = found.new_zeros(ids.numel()).index_copy_(0, here, found)
    return found.view(ids.shape)


def entries_of(rows: Rows, ids: Tensor) -> Entries:
    """All of (N, K) ids."""
    count, K = ids.shape
    row = torch.arange(count, device=ids.device)[:, None].expand(count, K).reshape(-1)
    return Entries(rows.hidden, rows.temperature, row, ids.reshape(-1))


def own_entries(entries: Entries, head: Projection) -> tuple[Entries, Tensor | None]:
    """Those of this rank's columns, counted from its first, and which they are; None: all. Waits for the device."""
    if head.shard is None:
        return entries, None
    local = entries.ids - head.shard.start
    here = ((local >= 0) & (local < head.vocabulary)).nonzero().squeeze(1)
    return replace(entries, rows=entries.rows[here], ids=local[here]), here


def own_entry_grads(grads: EntryGrads | None, head: Projection) -> EntryGrads | None:
    """Likewise; None where there are none."""
    if grads is None:
        return None
    entries, here = own_entries(grads.entries, head)
    if here is not None:
        grads = EntryGrads(entries, grads.logits[here], grads.upstream[here])
    return grads if entries.count else None


def within_sets(
    backend: Backend, rows: Rows, head: Projection, partials: Partials, outputs: tuple[str, ...], whole: bool
) -> tuple[Partials, Stats | None]:
    """Over the kept sets of all ranks, of which `partials` are this one's, and where `whole` over the whole vocabulary."""
    shard = head.shard
    if shard is None:
        return partials, backend.statistics(rows, head, ()) if whole else None
    if whole:
        found = backend.partials(local_rows(rows, shard), head, ())
        of_all, (everyone,) = merged(shard, found, rows.targets, (), partials.packed())
    else:
        of_all, (everyone,) = None, gathered(shard, partials.packed())
    return merge([Partials.unpacked(part, outputs) for part in everyone]), of_all


def gradients(
    backend: Backend,
    rows: Rows,
    head: Projection,
    stats: Stats,
    upstream: TokenGrads,
    needs: Needs,
    filtered: tuple[Tensor, ...] | None = None,
    entries: EntryGrads | None = None,
) -> Grads:
    """As `Backend.gradients`, of this rank's shard: d_hidden has yet to be `summed`. entries: this rank's."""
    if head.shard is None:
        return backend.gradients(rows, head, stats, upstream, needs, filtered, entries)
    if head.vocabulary == 0:
        return Grads.zeros(rows.hidden, head, needs)
    return backend.gradients(local_rows(rows, head.shard), head, stats, upstream, needs, filtered, entries)


def summed(d_hidden: Maybe, shard: Shard | None) -> Maybe:
    """That of all ranks, where it is asked to be summed; d_hidden itself may be overwritten."""
    if d_hidden is None or shard is None or not shard.sums_hidden:
        return d_hidden
    total = d_hidden.to(torch.promote_types(d_hidden.dtype, torch.float32))
    dist.all_reduce(total, group=private.process_group(shard.group))
    return cast(Maybe, total.to(d_hidden.dtype))


def one_pass(
    backend: Backend, rows: Rows, head: Projection, outputs: tuple[str, ...], objective: BoundObjective, needs: Needs
) -> tuple[Stats, Tensor, Grads]:
    """As `Backend.one_pass`, over the shards of all ranks, block by block of rows: d_hidden has yet to be `summed`."""
    shard = head.shard
    if shard is None:
        return backend.one_pass(rows, head, outputs, objective, needs)
    local = local_rows(rows, shard)

    def merge(found: ShardStats, some: slice, outputs: tuple[str, ...]) -> Stats:
        return merged(shard, found, rows.targets[some], outputs)[0]

    if head.vocabulary:
        return backend.one_pass(local, head, outputs, objective, needs, merge)
    stats, losses = [], []
    for some in _blocks(rows.count, shard):
        stats.append(merge(backend.partials(local.pick(some), head, outputs), some, outputs))
        losses.append(objective(some, stats[-1].logprobs, stats[-1].entropy)[0])
    return Stats.joined(stats), torch.cat(losses), Grads.zeros(rows.hidden, head, needs)


def _blocks(count: int, shard: Shard) -> Iterator[slice]:
    return (slice(start, min(start + shard.block, count)) for start in range(0, count, shard.block))


def divergence(backend: Backend, rows: RowPairs, of: Comparison) -> tuple[Tensor, Sums]:
    """As `Backend.divergence`, over the shards of all ranks: (N,), and the sums over the whole vocabulary."""
    shard = of.policy.shard
    if shard is None:
        return backend.divergence(rows, of)
    if of.kind == "jsd":
        return _mixture_divergence(backend, rows, of, shard)
    return _kl(backend, rows, of, shard)


def _mixture_divergence(backend: Backend, rows: RowPairs, of: Comparison, shard: Shard) -> tuple[Tensor, Sums]:
    """Its terms need the probabilities of a token in the whole vocabulary: the totals of both heads are exchanged for each
    block of rows, and each rank's terms in the end."""

    def merge(totals: Tensor) -> Tensor:
        (everyone,) = gathered(shard, totals)
        found = []
        for maxima, sums in (everyone[..., :2].unbind(-1), everyone[..., 2:].unbind(-1)):
            top = maxima.amax(0)
            found += [top, (sums * (maxima - reference_of(top)).exp()).sum(0)]
        return torch.stack(found, 1)

    if of.policy.vocabulary:
        value, sums = backend.divergence(rows, of, merge)
    else:
        nothing = rows.temperature.new_tensor([-torch.inf, 0.0, -torch.inf, 0.0])
        blocks = [merge(nothing.expand(some.stop - some.start, 4)) for some in _blocks(len(rows.hidden), shard)]
        top, total, ref_top, ref_total = torch.cat(blocks).unbind(1)
        value = torch.zeros_like(rows.temperature)
        shift = (top - ref_top) + (total / ref_total).log()
        sums = Sums(top + total.log(), ref_top + ref_total.log(), shift, value)
    (everyone,) = gathered(shard, torch.stack([value, sums.mean], 1))
    value, mean = everyone.sum(0).unbind(1)
    return value.contiguous(), sums._replace(mean=mean.contiguous())


def _kl(backend: Backend, rows: RowPairs, of: Comparison, shard: Shard) -> tuple[Tensor, Sums]:
    if of.policy.vocabulary:
        value, sums = backend.divergence(rows, of)
    else:
        value = torch.zeros_like(rows.temperature)
        nothing = torch.full_like(value, -torch.inf)
        sums = Sums(nothing, nothing, value, value)
    (everyone,) = gathered(shard, torch.stack([value, sums.lse, sums.ref_lse, sums.shift], 1))
    return whole_divergence(of.kind, *everyone.unbind(-1))


def whole_divergence(kind: Kind, values: Tensor, lses: Tensor, ref_lses: Tensor, shifts: Tensor) -> tuple[Tensor, Sums]:
    """Of what was found within parts of the vocabulary, (parts, N) each.

    With P_r and Q_r the masses of part r in the policy and in the reference, and p_r and q_r the distributions within it,

        KL(q || p) = sum_r Q_r KL(q_r || p_r) + KL(Q || P)

    and likewise the other way round, so that what is found within a part and four numbers of it are enough.
    """
    lse, ref_lse = lses.logsumexp(0), ref_lses.logsumexp(0)
    p, q = (lses - lse).exp(), (ref_lses - ref_lse).exp()
    # lse - ref_lse, exact where all parts differ alike: q sums to 1.
    about = shifts.gather(0, q.argmax(0, keepdim=True))[0]
    shift = about + torch.log1p(times(q, torch.expm1(shifts - about)).sum(0))
    shift = torch.where(shift.isfinite(), shift, lse - ref_lse)
    gap = torch.where((p == 0) & (q == 0), 0.0, shifts - shift)  # log p - log q
    if kind == "forward":
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
    return grads._replace(hidden=summed(grads.hidden, of.policy.shard))


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


def local_rows(rows: Rows, shard: Shard) -> Rows:
    """With targets counted from this rank's first column: those of other ranks are negative or beyond the shard."""
    return replace(rows, targets=rows.targets - shard.start)
