"""Which tokens a cut keeps, found from whole rows of logits.

In the order of the larger logit first, of equals the later column first, every rule keeps a prefix:

    top_k   all tokens whose logit is at least the k-th largest: of equals all or none
    top_p   the tokens before which less than top_p of the mass lies
    min_p   the tokens with exp(z - max) >= min_p

The NARROW + 1 likeliest tokens of a row decide most rows. Of the others the mass is counted in bins of the logit, and only
the tokens of the bin in which top_p falls are put in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rlhf.backends.tiling import TILE, slices
from fused_rlhf.kernels.interface import NARROW, Border, Cut

BINS = 2048


class Sets(NamedTuple):
    """Of n rows."""

    rows: Tensor  # (e,) the tokens kept of rows that are not wide, and their targets
    ids: Tensor
    wide: Tensor  # (m,) the other rows
    border: Border  # theirs
    added: Tensor  # (n,) bool: the target was not in the set

    def after(self, count: int) -> Sets:
        """The same rows, with so many before them."""
        return self._replace(rows=self.rows + count, wide=self.wide + count)

    @staticmethod
    def joined(parts: list[Sets]) -> Sets:
        rows, ids, wide, borders, added = zip(*parts)
        return Sets(torch.cat(rows), torch.cat(ids), torch.cat(wide), Border.joined(borders), torch.cat(added))


def find(z: Tensor, total: Tensor, targets: Tensor, cut: Cut) -> Sets:
    """Of (n, V) logits; total (n,): sum of exp(z - max)."""
    V = z.shape[1]
    count = min(NARROW + 1, V)
    top, column = _ordered(*z.topk(count, dim=1))
    keep, decided = _of_candidates(top, total, cut, everything=count == V)
    decided |= ~top[:, 0].isfinite()  # a row of NaN stays one, whatever is kept of it
    hit = (column == targets[:, None]) & keep
    added = ~hit.any(1)
    wide = (~decided).nonzero().squeeze(1)
    border = Border(top.new_empty(0), targets.new_empty(0))
    if len(wide):
        border = _border(z, top[:, 0], wide, cut.pick(wide))
        at = targets[wide]
        value = z[wide, at]
        inside = (value > border.floor) | ((value == border.floor) & (at >= border.first))
        added[wide] = ~inside | (value == -torch.inf)
    named = torch.where(keep & decided[:, None], column, V)
    named = torch.cat([named, torch.where(added & decided, targets, V)[:, None]], 1).sort(dim=1).values
    rows, at = (named < V).nonzero(as_tuple=True)
    return Sets(rows, named[rows, at], wide, border, added)


def outside(z: Tensor, columns: slice, targets: Tensor, border: Border) -> Tensor:
    """(n, v) bool: the columns beyond the rows' borders, for their logits (n, v) there."""
    floor = border.floor[:, None]
    below = z < floor
    if border.first.any():  # some equals of the floor are beyond it
        column = torch.arange(columns.start, columns.stop, device=z.device)
        below |= (z == floor) & (column < border.first[:, None])
    at = targets - columns.start
    here = ((at >= 0) & (at < z.shape[1])).nonzero().squeeze(1)
    below[here, at[here]] = False
    return below


def _ordered(top: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates with equals in the order of the later column."""
    column, order = column.sort(dim=1, descending=True)
    top, again = top.gather(1, order).sort(dim=1, descending=True, stable=True)
    return top, column.gather(1, again)


def _of_candidates(top: Tensor, total: Tensor, cut: Cut, everything: bool) -> tuple[Tensor, Tensor]:
    """(n, C) which candidates are kept, and (n,) whether that is decided: whether no other token can be."""
    exps = (top - top[:, :1]).exp()
    always = torch.ones_like(top, dtype=torch.bool)
    last = top[:, -1]

    def closed(keep: Tensor) -> Tensor:
        lowest = torch.where(keep, top, torch.inf).amin(1)
        return torch.full_like(keep[:, 0], True) if everything else lowest > last

    def by_count(keep: Tensor) -> Tensor:
        if cut.top_k is None:
            return keep
        k = cut.top_k[:, None]
        kth = top.gather(1, k.clamp(1, top.shape[1]) - 1)
        return keep & ((k <= 0) | (k > top.shape[1]) | (top >= kth))

    def by_peak(keep: Tensor) -> Tensor:
        return keep if cut.min_p is None else keep & (exps >= cut.min_p[:, None])

    first = by_peak(by_count(always)) if cut.min_p_first else by_count(always)
    keep, undecided = first, torch.zeros_like(closed(first))
    if cut.top_p is not None:
        cuts = cut.top_p < 1
        limited = torch.zeros_like(cuts)
        if cut.top_k is not None:
            limited |= cut.top_k > 0
        if cut.min_p is not None and cut.min_p_first:
            limited |= cut.min_p > 0
        mass = torch.where(limited, (exps * first).sum(1), total)
        undecided = cuts & limited & ~closed(first)
        kept = exps * first
        before = kept.cumsum(1) - kept
        keep = first & (~cuts[:, None] | (before < (cut.top_p * mass)[:, None]))
    keep = by_peak(keep) & (top > -torch.inf)
    keep[:, 0] = True
    return keep, closed(keep) & ~undecided


def _border(z: Tensor, maximum: Tensor, wide: Tensor, cut: Cut) -> Border:
    """Of the rows `wide` of (n, V) logits whose maxima are (n,); `cut` is theirs."""
    rows = z if len(wide) == len(z) else z.index_select(0, wide)
    top = maximum[wide]
    floor, first = torch.full_like(top, -torch.inf), torch.zeros_like(wide)
    if cut.top_k is not None:
        floor = _count_border(rows, cut.top_k)
    entering = floor if cut.top_k is not None else None
    if cut.min_p is not None:
        floor = torch.maximum(floor, top + cut.min_p.log())
        entering = floor if cut.min_p_first else entering
    if cut.top_p is None:
        return Border(floor, first)
    of_mass = _mass_border(rows, top, entering, cut.top_p)
    higher = of_mass.floor >= floor
    return Border(torch.where(higher, of_mass.floor, floor), torch.where(higher, of_mass.first, first))


# A floor lies between two logits, so that their rounding may differ when they are computed again.


def _count_border(rows: Tensor, top_k: Tensor) -> Tensor:
    """(m,) between the k-th largest of (m, V) logits, and its equals, and the next; -inf where all are kept."""
    found, V = torch.full_like(rows[:, 0], -torch.inf), rows.shape[1]
    for k in top_k.unique().tolist():
        if not 0 < k < V:
            continue
        some = (top_k == k).nonzero().squeeze(1)
        of_k = rows if len(some) == len(rows) else rows[some]
        kth, following = (of_k.kthvalue(V - at, dim=1).values for at in (k - 1, k))
        near = kth - 16 * torch.finfo(kth.dtype).eps * kth.abs().clamp(min=1)
        found[some] = torch.where(following < kth, (kth + following) / 2, near)
    return found


def _mass_border(rows: Tensor, top: Tensor, entering: Tensor | None, top_p: Tensor) -> Border:
    """Where top_p ends among those of (m, V) logits that are above `entering` (m,), None: among all.

    A token of less than (1 - top_p) / V of the maximum's mass is beyond it: that is how deep the bins go.
    """
    m, V = rows.shape
    depth = (V / (1 - top_p).clamp(min=torch.finfo(top.dtype).eps)).log() + 1
    per_bin = BINS / depth

    def bin_of(below: Tensor, scale: Tensor) -> Tensor:
        return (below * scale).clamp_(max=BINS - 1).long()

    mass = rows.new_zeros(m, BINS)
    for columns in slices(V, TILE):
        z = rows[:, columns]
        below = top[:, None] - z
        number = bin_of(below, per_bin[:, None])
        exps = below.neg_().exp_()
        if entering is not None:
            exps.masked_fill_(z < entering[:, None], 0.0)
        mass.scatter_add_(1, number, exps)
    upto = mass.cumsum(1)
    need = torch.where(top_p < 1, top_p * upto[:, -1], torch.inf)
    last = (upto < need[:, None]).sum(1).clamp(max=BINS - 1)  # the bin in which it ends
    before = torch.nn.functional.pad(upto, (1, 0)).gather(1, last[:, None])[:, 0]

    # The tokens of that bin, and a few about it: the products that made the bins are rounded.
    upper, lower = top - (last - 0.01) / per_bin, top - (last + 1.01) / per_bin
    lower.masked_fill_(last == BINS - 1, -torch.inf)
    found = []
    for columns in slices(V, TILE):
        z = rows[:, columns]
        row, column = ((z <= upper[:, None]) & (z >= lower[:, None])).nonzero(as_tuple=True)
        found.append((row, column + columns.start, z[row, column]))
    row, column, value = (torch.cat(parts) for parts in zip(*found))
    exps = (value - top[row]).exp()
    inside = (bin_of(top[row] - value, per_bin[row]) == last[row]) & (exps > 0)
    if entering is not None:
        inside &= value >= entering[row]
    row, column, value, exps = row[inside], column[inside], value[inside], exps[inside]
    order = column.argsort(descending=True)
    order = order[value[order].argsort(descending=True, stable=True)]
    order = order[row[order].argsort(stable=True)]
    row, column, value, exps = row[order], column[order], value[order], exps[order]
    counts = torch.bincount(row, minlength=m)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    width = int(counts.max()) + 1
    values = rows.new_full((m, width), -torch.inf).index_put_((row, place), value)
    masses = rows.new_zeros(m, width).index_put_((row, place), exps)
    places = row.new_zeros(m, width).index_put_((row, place), column)
    kept = (before[:, None] + masses.cumsum(1) - masses < need[:, None]) & (masses > 0)
    end = (kept.sum(1) - 1).clamp(min=0)[:, None]
    lowest, dropped = values.gather(1, end)[:, 0], values.gather(1, end + 1)[:, 0]
    edge = torch.minimum(top - (last + 1) / per_bin, lowest)
    tied = dropped == lowest  # then the column decides
    floor = torch.where(tied, lowest, (lowest + torch.where(dropped > -torch.inf, dropped, edge)) / 2)
    first = torch.where(tied, places.gather(1, end)[:, 0], 0)
    everything = ~(top_p < 1)
    return Border(floor.masked_fill(everything, -torch.inf), first.masked_fill(everything, 0))
