"""The kept sets of a truncated sampler over a vocabulary-parallel head.

The rules are those of `Truncation`. In the order of the larger logit first, of equals the later column first, each keeps a
prefix, and where it ends is found digit by digit of a logit's bits: of each row the ranks add up how much lies at each of the
64 values that the next six bits can have. What is added are integers, tokens or masses in units of 2^-40 of the likeliest
token's, so that the order of the sum does not matter: all ranks see the same border, to the bit and every time.

Of a block of n rows the ranks exchange the maxima; 6 sums of (n, 64) for top_k, and for top_p, with its mass and what lies at
its border, 9 (11 and 14 in fp64); and how many tokens each keeps. Then, of all rows with large sets, their statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fused_rlhf import private
from fused_rlhf.backends.tiling import TILE, slices
from fused_rlhf.kernels.interface import NARROW, Backend, Border, Cut, KeptSets, Projection, Rows, Shard, Stats
from fused_rlhf.kernels.statistics import Partials, merge, reference_of
from fused_rlhf.op import parallel

DIGIT = 6  # bits
UNITS = 2.0**40  # of mass: a vocabulary's worth fits into int64


def truncated(
    backend: Backend, rows: Rows, head: Projection, cut: Cut, outputs: tuple[str, ...], whole: bool
) -> KeptSets:
    """As `Backend.truncated`; of a shard the named tokens are this rank's, the borders in its columns, the rest of all."""
    shard = head.shard
    if shard is None:
        return backend.truncated(rows, head, cut, outputs, whole)
    local = parallel.local_rows(rows, shard)
    found = [
        _Block.of(_logits(backend, local.pick(at), head), local.pick(at), cut.pick(at), outputs, shard).at(at.start)
        for at in slices(rows.count, shard.block)
    ]
    row, ids, wide, added, all_lse, packed, floor, first = (
        torch.cat(parts) for parts in zip(*(f.parts for f in found))
    )
    of_all = parallel.statistics(backend, rows, head, ())[0] if whole else None
    stats = _statistics(backend, rows, head, wide, packed, all_lse, outputs, of_all)
    return KeptSets(row, ids + shard.start, wide, Border(floor, first), stats, added, of_all)


def _logits(backend: Backend, rows: Rows, head: Projection) -> Tensor:
    if not head.vocabulary:
        return rows.temperature.new_empty(rows.count, 0)
    return backend.logits(rows, head)


def _statistics(
    backend: Backend,
    rows: Rows,
    head: Projection,
    wide: Tensor,
    packed: Tensor,
    all_lse: Tensor,
    outputs: tuple[str, ...],
    of_all: Stats | None,
) -> Stats:
    """Over what is kept of the rows `wide` (M,), of which this rank has `packed` partials.

    all_lse: (M,) of the whole vocabulary, from the same logits.
    """
    shard, targets = head.shard, rows.targets[wide]
    assert shard is not None
    if not len(wide):
        none = packed.new_empty(0)
        return Stats(none, none, dict.fromkeys(outputs, none), normaliser=none if backend.has_normaliser() else None)
    (everyone,) = parallel.gathered(shard, packed)
    kept = merge([Partials.unpacked(part, outputs) for part in everyone])
    stats = Stats.of(*kept.finish(targets, shard.vocabulary, outputs))
    if not backend.has_normaliser():
        return stats
    # What the backend corrects of the log-sum-exp over the whole vocabulary cancels in the share of it that is kept.
    share = stats.lse - all_lse
    exact = parallel.statistics(backend, rows.pick(wide), head, ())[0] if of_all is None else of_all.pick(wide)
    return Stats(exact.logprobs - share, exact.lse + share, stats.extra, normaliser=stats.lse / parallel.LN2)


@dataclass(frozen=True)
class _Block:
    """What a block of rows keeps here."""

    rows: Tensor  # (e,) as in `KeptSets`, from this block's first row; ids from this rank's first column
    ids: Tensor
    wide: Tensor  # (m,), as is all that follows but `added`
    added: Tensor  # (n,)
    all_lse: Tensor
    packed: Tensor  # (m, numbers): partials over what is kept
    floor: Tensor
    first: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.rows, self.ids, self.wide, self.added, self.all_lse, self.packed, self.floor, self.first)

    def at(self, start: int) -> _Block:
        rows, ids, wide, *rest = self.parts
        return _Block(rows + start, ids, wide + start, *rest)

    @staticmethod
    def of(z: Tensor, rows: Rows, cut: Cut, outputs: tuple[str, ...], shard: Shard) -> _Block:
        """Of (n, V) logits here; targets may lie elsewhere."""
        targets, V = rows.targets, z.shape[1]
        own = Partials.of(z, targets, ())
        (everyone,) = parallel.gathered(shard, own.packed())
        total = merge([Partials.unpacked(part, ()) for part in everyone])
        top = reference_of(total.maximum)
        keep, first = _kept(z, top, cut, shard)

        here = ((targets >= 0) & (targets < V)).nonzero().squeeze(1)
        at = here, targets[here]
        outside = torch.zeros_like(targets, dtype=torch.bool)
        outside[here] = ~keep[at]
        keep[at] = True
        lowest = torch.where(keep & (z > -torch.inf), z, torch.inf)
        lowest[at] = torch.where(outside[here], torch.inf, lowest[at])
        dropped = z.masked_fill(keep, -torch.inf)
        numbers = [keep.sum(1).to(z.dtype), _amin(lowest), _amax(dropped), outside.to(z.dtype)]
        (everyone,) = parallel.gathered(shard, torch.stack(numbers, 1))
        counts, lows, drops, outsides = everyone.unbind(-1)
        low, drop, added = lows.amin(0), drops.amax(0), outsides.sum(0) > 0
        between = low / 2 + drop / 2
        tied = (drop == low) | (between <= drop)
        floor = torch.where(drop == -torch.inf, drop, torch.where(tied, low, between))
        is_wide = counts.sum(0) > NARROW
        wide = is_wide.nonzero().squeeze(1)
        row, ids = (keep & ~is_wide[:, None]).nonzero(as_tuple=True)
        within = z[wide].masked_fill(~keep[wide], -torch.inf)
        packed = Partials.of(within, targets[wide], outputs).packed()
        all_lse = (total.maximum + total.total.log())[wide]
        return _Block(row, ids, wide, added, all_lse, packed, floor[wide], torch.where(drop == low, first, 0)[wide])


def _amax(values: Tensor) -> Tensor:
    return values.amax(1) if values.shape[1] else values.new_full(values.shape[:1], -torch.inf)


def _amin(values: Tensor) -> Tensor:
    return values.amin(1) if values.shape[1] else values.new_full(values.shape[:1], torch.inf)


def _kept(z: Tensor, top: Tensor, cut: Cut, shard: Shard) -> tuple[Tensor, Tensor]:
    """(n, V) bool: what the rules keep of the logits here; and (n,) the first column of those that equal the last one kept."""
    keep, first = z > -torch.inf, torch.zeros_like(top, dtype=torch.int64)
    exps = (z - top[:, None]).exp()
    by_peak = None if cut.min_p is None else exps >= cut.min_p[:, None]
    entering = keep
    if cut.min_p_first and by_peak is not None:
        entering = entering & by_peak
    if cut.top_k is not None:
        every = torch.where(cut.top_k > 0, cut.top_k, torch.iinfo(torch.int64).max)
        kth, _ = _search(z, lambda at: torch.ones_like(z[:, at], dtype=torch.int64), every, shard)
        entering = entering & (_order(z) >= kth[:, None])
    keep = entering
    if cut.top_p is not None:
        mass = (exps.double() * UNITS).round().long() * entering
        need = _share(_added(mass.sum(1), shard), cut.top_p)
        last, before = _search(z, lambda at: mass[:, at], need, shard)
        order = _order(z)
        equal = (order == last[:, None]) & entering
        first, some = _last_columns(equal, mass, before, need, shard)
        keep = (entering & (order > last[:, None])) | some
    if by_peak is not None:
        keep = keep & by_peak
    return keep, first


def _share(mass: Tensor, top_p: Tensor) -> Tensor:
    """(n,) int64: a token is kept where those before it have less than this; more than all of it where nothing is cut."""
    need = (mass.double() * top_p.double()).ceil().long().clamp(min=1)
    return torch.where(top_p < 1, need, torch.iinfo(torch.int64).max)


def _last_columns(equal: Tensor, mass: Tensor, before: Tensor, need: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Of tokens whose logit is the last one kept, of which `before` (n,) lies before: the later columns, while they are needed.

    -> (n,) the first column of these here, and (n, V) bool which they are.
    """
    counts = _everyone(equal.sum(1), shard)  # (world, n)
    of_one = _everyone(_amax(torch.where(equal, mass, 0).double()).clamp(min=0).long(), shard).amax(0)
    rank = dist.get_rank(private.process_group(shard.group))
    after = counts[rank + 1 :].sum(0)  # in later columns, on other ranks
    # The mass of all that come before it is short of what is needed.
    wanted = torch.where(of_one > 0, (need - before + of_one - 1) // of_one.clamp(min=1), torch.iinfo(torch.int64).max)
    here = torch.minimum((wanted - after).clamp(min=0), counts[rank])
    place = equal.flip(1).cumsum(1).flip(1)  # 1 for the last column
    some = equal & (place <= here[:, None])
    V = equal.shape[1]
    columns = torch.arange(V, device=equal.device).expand_as(equal)
    return torch.where(some, columns, V).amin(1) if V else torch.zeros_like(before), some


def _added(values: Tensor, shard: Shard) -> Tensor:
    """Integers of all ranks, added up."""
    dist.all_reduce(values, group=private.process_group(shard.group))
    return values


def _everyone(values: Tensor, shard: Shard) -> Tensor:
    """(world, n) of (n,)."""
    return parallel.gathered(shard, values[:, None])[0][..., 0]


def _order(z: Tensor) -> Tensor:
    """int64, of which the lower bits are in the order of floating numbers: 32 of fp32, 64 of fp64 as if without a sign."""
    if z.dtype == torch.float64:
        bits = (z + 0.0).view(torch.int64)
        return bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)
    narrow = (z + 0.0).view(torch.int32)
    return (narrow ^ ((narrow >> 31) & torch.iinfo(torch.int32).max)).long()


def _digits(dtype: torch.dtype) -> Iterator[int]:
    """Shifts, from the highest digit on; that one has the sign."""
    bits = 64 if dtype == torch.float64 else 32
    return iter(range((bits - 1) // DIGIT * DIGIT, -1, -DIGIT))


def _search(z: Tensor, weights: Callable[[slice], Tensor], want: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """(n,) the largest of `_order` at and above which the weights of all ranks add up to `want` (n,), the least there is where
    they never do; and what lies above it.

    weights: of some columns of z (n, V), int64.
    """
    n, V = z.shape
    above, prefix = torch.zeros_like(want), torch.zeros_like(want)
    half = 1 << (DIGIT - 1)
    for number, shift in enumerate(_digits(z.dtype)):
        sums = z.new_zeros(n, 1 << DIGIT, dtype=torch.int64)
        for at in slices(V, TILE):
            order = _order(z[:, at]) >> shift
            weight = weights(at)
            if number == 0:
                digit = order + half  # signed
            else:
                digit = order & ((1 << DIGIT) - 1)
                weight = weight * ((order >> DIGIT) == prefix[:, None])
            sums.scatter_add_(1, digit, weight)
        upto = _added(sums, shard).flip(1).cumsum(1).flip(1)  # at this digit and above
        digit = ((above[:, None] + upto >= want[:, None]).sum(1) - 1).clamp(min=0)
        above = above + torch.nn.functional.pad(upto, (0, 1)).gather(1, digit[:, None] + 1)[:, 0]
        prefix = digit - half if number == 0 else (prefix << DIGIT) | digit
    return prefix, above
