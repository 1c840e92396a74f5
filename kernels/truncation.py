"""Which tokens a cut keeps, and the statistics of what it keeps: kernels over whole rows of logits.

In the order of the larger logit first, of equals the later column first, every rule keeps a prefix:

    top_k   all tokens whose logit is at least the k-th largest: of equals all or none
    top_p   the tokens before which less than top_p of the mass lies
    min_p   the tokens with exp(z - max) >= min_p

so that a set is told by its border. The products come from cuBLAS, a block of rows at a time over the whole vocabulary.
A program of `border_kernel` takes a row and passes over it

    once                 to put the logits in the place of the products, and for their maximum
    11 times at most     for the k-th largest: the largest number below which V - k logits lie
    1 + 11 + 1 times     for top_p: the mass of what is left, the largest number below which at most 1 - top_p of that lies,
                         and what lies below it and at it; once more where only some of the logits at it are kept
    once                 for the sums over what is kept, and the logits on either side of the border

The search is in the order of the bits of a number, by WAYS thresholds a pass, so that it ends at a logit itself. A sum has
its terms in one order whatever its threshold, and hence grows with it; it is of the small ones, which keep their digits
where top_p is near 1. `names_kernel` then lists the columns kept.

Of a row that keeps a few tokens the logits are gathered, exactly. Of the others

    logprob = logprob of the whole vocabulary - log share          lse = lse of the whole vocabulary + log share

where the share is that of the kept mass: what tensor cores cut off (`exact.py`) cancels in it.

N tokens, V vocabulary. Logits are natural ones, computed as the backward does, that they compare alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_rlhf.kernels.interface import NARROW, Border, Cut, Projection, Stats
from fused_rlhf.kernels.linear_logprobs import RowBlock
from fused_rlhf.kernels.primitives import LN2, LOG2E, curve_of, outside, scores_of, unit_of, with_bias

STEP = 1024  # columns of a row that a program takes at a time
WAYS = 8  # thresholds of a pass of a search


@triton.jit
def order_of(z):
    """int32 in the order of fp32 numbers; a NaN has none."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def number_of(order):
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def load_part(row_ptr, start, V, STEP: tl.constexpr):
    """[STEP] columns of one row, and their logits, -inf past V."""
    column = start + tl.arange(0, STEP)
    return column, tl.load(row_ptr + column, mask=column < V, other=float("-inf"))


@triton.jit
def mass_of(z, top):
    return tl.exp2((z - top) * LOG2E)


@triton.jit
def mass_from(row_ptr, V, top, lowest, STEP: tl.constexpr):
    """sum exp(z - top) over z >= lowest"""
    total = tl.zeros((STEP,), tl.float32)
    for start in range(0, V, STEP):
        _, z = load_part(row_ptr, start, V, STEP)
        total += tl.where(z >= lowest, mass_of(z, top), 0.0)
    return tl.sum(total, 0)


@triton.jit
def cut_point(row_ptr, V, top, lowest, rest, OF_MASS: tl.constexpr, WAYS: tl.constexpr, STEP: tl.constexpr):
    """The largest number t, from `lowest`, which is taken to do, to the largest logit `top`, for which the logits z < t are
    at most `rest`, or with OF_MASS those of them that are at least `lowest` have at most that mass."""
    low = order_of(lowest).to(tl.int64)
    high = order_of(top).to(tl.int64) + 1
    while high - low > 1:
        width = (high - low + WAYS - 1) // WAYS
        threshold = tl.minimum(low + (tl.arange(0, WAYS) + 1) * width, high)
        number = number_of(threshold.to(tl.int32))[:, None]
        sums = tl.zeros((WAYS, STEP), tl.float32)  # a count is exact below 2^24
        for start in range(0, V, STEP):
            column, z = load_part(row_ptr, start, V, STEP)
            if OF_MASS:
                term = tl.where(z >= lowest, mass_of(z, top), 0.0)
            else:
                term = (column < V).to(tl.float32)
            sums += tl.where(z[None, :] < number, term[None, :], 0.0)
        few = (tl.sum(sums, 1) <= rest) & (threshold < high)
        found = tl.sum(few.to(tl.int64), 0)
        high = tl.minimum(low + (found + 1) * width, high)
        low += found * width
    return number_of(low.to(tl.int32))


@triton.jit
def first_of_last(row_ptr, V, value, drop, STEP: tl.constexpr):
    """The column of those with this very logit that has `drop` of them before it."""
    first = 0
    seen = 0
    for start in range(0, V, STEP):
        column, z = load_part(row_ptr, start, V, STEP)
        equal = (z == value).to(tl.int32)
        before = seen + tl.cumsum(equal, 0) - equal
        first += tl.sum(tl.where((equal > 0) & (before == drop), column, 0), 0)
        seen += tl.sum(equal, 0)
    return first


@triton.jit
def mass_border(row_ptr, V, top, lowest, top_p, WAYS: tl.constexpr, STEP: tl.constexpr):
    """Where top_p of the mass of the logits z >= lowest ends: the last logit, and of those equal to it the first column."""
    rest = (1 - top_p) * mass_from(row_ptr, V, top, lowest, STEP)
    value = cut_point(row_ptr, V, top, lowest, rest, True, WAYS, STEP)
    below = tl.zeros((STEP,), tl.float32)
    equal = tl.zeros((STEP,), tl.float32)
    for start in range(0, V, STEP):
        _, z = load_part(row_ptr, start, V, STEP)
        below += tl.where((z < value) & (z >= lowest), mass_of(z, top), 0.0)
        equal += tl.where(z == value, 1.0, 0.0)
    each = mass_of(value, top)
    drop = tl.where(each > 0, tl.floor((rest - tl.sum(below, 0)) / each), 0.0)
    drop = tl.minimum(tl.maximum(drop, 0.0), tl.maximum(tl.sum(equal, 0) - 1, 0.0)).to(tl.int32)
    first = 0
    if drop > 0:
        first = first_of_last(row_ptr, V, value, drop, STEP)
    return value, first


@triton.jit
def border_kernel(
    z_ptr,  # (N, V) fp32 products, which become logits
    bias_ptr,  # (V,) or None
    inv_temperature_ptr,  # (N,) fp32
    targets_ptr,  # (N,) int64
    top_k_ptr,  # (N,) int64, or None, as are the next two
    top_p_ptr,  # (N,) fp32
    log_min_p_ptr,  # (N,) fp32
    sizes_ptr,  # (N,) int64, out, as are all that follow: tokens kept, the target among them
    added_ptr,  # bool
    floor_ptr,  # fp32
    first_ptr,  # int64
    log_share_ptr,  # fp32, as are the next three
    normaliser_ptr,
    entropy_ptr,
    sum_sq_ptr,
    V,
    stride,
    logit_scale,
    parameter,
    MIN_P_FIRST: tl.constexpr,
    CURVE: tl.constexpr,
    WAYS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One row: where its set ends, and the sums over what it keeps."""
    n = tl.program_id(0)
    row_ptr = z_ptr + n.to(tl.int64) * stride
    unit = unit_of(tl.load(inv_temperature_ptr + n))
    highest = tl.full((1, STEP), float("-inf"), tl.float32)
    for start in range(0, V, STEP):
        column = start + tl.arange(0, STEP)
        inside = (column < V)[None, :]
        product = tl.load(row_ptr + column[None, :], mask=inside, other=0.0)
        z = scores_of(with_bias(product, bias_ptr, column, V), unit, logit_scale, parameter, CURVE) * LN2
        tl.store(row_ptr + column[None, :], z, mask=inside)
        highest = tl.maximum(highest, tl.where(inside, z, float("-inf")))
    top = tl.max(tl.max(highest, 1), 0)  # of a row that has nothing but -inf and NaN: -inf
    shift = tl.where(top == float("-inf"), 0.0, top)
    tl.debug_barrier()  # other threads read the logits

    of_count = tl.full((), float("-inf"), tl.float32)
    if top_k_ptr is not None:
        k = tl.load(top_k_ptr + n)
        if (k > 0) & (k < V):
            of_count = cut_point(row_ptr, V, shift, of_count, (V - k).to(tl.float32), False, WAYS, STEP)
    of_peak = tl.full((), float("-inf"), tl.float32)
    if log_min_p_ptr is not None:
        of_peak = top + tl.load(log_min_p_ptr + n)
    floor = tl.maximum(of_count, of_peak)
    first = 0
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + n)
        if top_p < 1:
            entering = floor if MIN_P_FIRST else of_count
            of_mass, first_of_mass = mass_border(row_ptr, V, shift, entering, top_p, WAYS, STEP)
            if of_mass >= floor:
                floor = of_mass
                first = first_of_mass

    y = tl.load(targets_ptr + n)
    count = tl.zeros((STEP,), tl.int32)
    s = tl.zeros((STEP,), tl.float32)
    t = tl.zeros((STEP,), tl.float32)
    q = tl.zeros((STEP,), tl.float32)
    total = tl.zeros((STEP,), tl.float32)
    last = tl.full((STEP,), float("inf"), tl.float32)
    next_one = tl.full((STEP,), float("-inf"), tl.float32)
    for start in range(0, V, STEP):
        column, z = load_part(row_ptr, start, V, STEP)
        beyond = outside(z, column, floor, first)
        last = tl.minimum(last, tl.where(beyond | (z == float("-inf")), float("inf"), z))
        next_one = tl.maximum(next_one, tl.where(beyond, z, float("-inf")))
        kept = ((z != float("-inf")) & ~beyond) | (column == y)
        depth = z - shift
        e = tl.exp2(depth * LOG2E)
        total += e
        e = tl.where(kept, e, 0.0)
        count += kept.to(tl.int32)
        s += e
        t += tl.where(e > 0, e * depth, e)  # 0 x -inf; a NaN stays one
        q += e * e
    total_s = tl.sum(s, 0)
    log_s = tl.log(total_s)
    at_target = tl.load(row_ptr + y)

    # Between two logits, so that their rounding may differ when they are computed again; of equals the column decides.
    lowest = tl.min(last, 0)
    dropped = tl.max(next_one, 0)
    between = 0.5 * lowest + 0.5 * dropped
    ties = (dropped == lowest) | (between <= dropped)
    tl.store(added_ptr + n, outside(at_target, y, floor, first) | (at_target == float("-inf")))
    tl.store(sizes_ptr + n, tl.sum(count, 0))
    tl.store(floor_ptr + n, tl.where(dropped == float("-inf"), dropped, tl.where(ties, lowest, between)))
    tl.store(first_ptr + n, tl.where(dropped == lowest, first, 0))
    tl.store(log_share_ptr + n, tl.log(tl.div_rn(total_s, tl.sum(total, 0))))  # of all 0, which `/` may miss
    tl.store(normaliser_ptr + n, shift * LOG2E + tl.log2(total_s))
    tl.store(entropy_ptr + n, log_s - tl.sum(t, 0) / total_s)
    tl.store(sum_sq_ptr + n, tl.sum(q, 0) / (total_s * total_s))


@triton.jit
def names_kernel(
    z_ptr,  # (N, V) logits
    targets_ptr,
    floor_ptr,
    first_ptr,
    ends_ptr,  # (N,) int64: where the names of each row end
    sizes_ptr,  # (N,) how many they are
    ids_ptr,  # int64 out
    V,
    stride,
    STEP: tl.constexpr,
):
    """One row: its tokens in ascending order, if it has any to name."""
    n = tl.program_id(0)
    row_ptr = z_ptr + n.to(tl.int64) * stride
    y = tl.load(targets_ptr + n)
    floor = tl.load(floor_ptr + n)
    first = tl.load(first_ptr + n)
    end = tl.load(ends_ptr + n)
    at = end - tl.load(sizes_ptr + n)
    start = 0
    while (at < end) & (start < V):
        column, z = load_part(row_ptr, start, V, STEP)
        kept = (((z != float("-inf")) & ~outside(z, column, floor, first)) | (column == y)).to(tl.int32)
        place = at + tl.cumsum(kept, 0) - kept
        tl.store(ids_ptr + place, column.to(tl.int64), mask=(kept > 0) & (place < end))
        at += tl.sum(kept, 0)
        start += STEP


@dataclass(frozen=True)
class Sets:
    """Of n rows, (n,) each; what is fp32 is of use for rows that keep more than NARROW tokens."""

    sizes: Tensor  # int64: tokens kept, the target among them
    added: Tensor  # bool: the target was not in the set
    floor: Tensor  # fp32
    first: Tensor  # int64
    log_share: Tensor  # fp32, as are the next three: of the kept mass in all of it
    normaliser: Tensor
    entropy: Tensor
    sum_sq: Tensor

    @staticmethod
    def empty(count: int, device: torch.device) -> Sets:
        dtypes = {"sizes": torch.int64, "added": torch.bool, "first": torch.int64}
        return Sets(
            **{f.name: torch.empty(count, dtype=dtypes.get(f.name, torch.float32), device=device) for f in fields(Sets)}
        )

    @staticmethod
    def joined(parts: Sequence[Sets]) -> Sets:
        return Sets(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Sets)))

    @property
    def narrow(self) -> Tensor:
        """(n,) bool: whose tokens are named."""
        return self.sizes <= NARROW

    def border(self, rows: Tensor) -> Border:
        return Border(self.floor[rows], self.first[rows])

    def within(self, whole: Stats, rows: Tensor, outputs: tuple[str, ...]) -> Stats:
        """Of some rows, whose statistics over the whole vocabulary are known."""
        share = self.log_share[rows]
        extra = {name: getattr(self, name)[rows] for name in outputs}
        return Stats(whole.logprobs - share, whole.lse + share, extra, normaliser=self.normaliser[rows])


def launch_borders(rows: RowBlock, head: Projection, cut: Cut, z: Tensor) -> Sets:
    """The sets of n rows from their fp32 products z (n, V), which become logits."""
    n, V = z.shape
    found = Sets.empty(n, z.device)
    log_min_p = None if cut.min_p is None else cut.min_p.log()
    border_kernel[(n,)](
        z, head.bias, rows.inv_temperature, rows.targets, cut.top_k, cut.top_p, log_min_p, found.sizes, found.added,
        found.floor, found.first, found.log_share, found.normaliser, found.entropy, found.sum_sq, V, z.stride(0),
        head.transform.logit_scale, head.transform.parameter, MIN_P_FIRST=cut.min_p_first,
        CURVE=curve_of(head.transform).apply, WAYS=WAYS, STEP=STEP, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return found


def launch_names(rows: RowBlock, sets: Sets, z: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that the narrow ones of n rows keep, from their logits z (n, V): rows and ids (e,), in order.

    Waits for the device once, for how many they are.
    """
    n, V = z.shape
    sizes = torch.where(sets.narrow, sets.sizes, 0)
    ends = sizes.cumsum(0)
    count = int(ends[-1])
    ids = torch.empty(count, dtype=torch.int64, device=z.device)
    if count:
        names_kernel[(n,)](
            z,
            rows.targets,
            sets.floor,
            sets.first,
            ends,
            sizes,
            ids,
            V,
            z.stride(0),
            STEP=STEP,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return torch.repeat_interleave(torch.arange(n, device=z.device), sizes, output_size=count), ids
