"""Log-probabilities of an LM head without its logits, and their gradient.

    z = curve(scale (h W^T + b)) / temperature, or without a curve scale (h W^T + b) / temperature
    logprob[n] = z[n, y[n]] - lse[n]          lse[n] = log sum_v exp z[n, v]          entropy = lse - sum_v p z

Forward: `stats_kernel` reduces every [BLOCK_N, BLOCK_V] tile of z, while in registers, to a maximum m, where it is, and
the sums

    S = sum e          e = exp(z - m)

and the number of each statistic that is asked for (`statistics.py`), in slots of one scratch tensor, of scores in the place of
logits (`primitives.py`). `finish_kernel` merges them over the vocabulary in a fixed order, and computes
the target's logit and those of a few likely tokens once more, exactly, to correct what tensor cores cut off (`exact.py`).
Tiles do not depend on N, so a row's values do not depend on its neighbours.

Backward, with upstream gradients g of logprob, h of entropy, l of lse, q of sum_sq and m of mean_logit, and p from the
normaliser, which is the log-sum-exp of the logits as they are multiplied, so that p sums to 1:

    dz = g onehot(y) + p (c - h (z - lse) + 2 q p) + m / V       c = l - g - h entropy - 2 q sum_sq
    dW = dz^T x       dx = dz W

`dlogits_kernel` recomputes a tile of z and writes dz, times the slope of the transform, in the compute dtype; the two
products are left to cuBLAS. Beyond the border of a truncated row p is 0.

In one pass the forward also stores E = exp(z - c), where c[n] is the target's logit to within rounding: a row's
largest logit is at least c, so nothing that matters underflows, and the exponent range of bf16 and fp32 covers
z - c < 59. Where a tile lies higher, E is relative to that tile's own maximum, and `repair_kernel` brings the row to
one reference. Then

    dz = factor (E - onehot / p_y) with one factor per row,      so dx = factor (E W)      and dW = E^T (factor x):

the products need no pass over E in between. The target's element is computed in fp32 from logprob, since p_y - 1 loses
every digit in bf16 when p_y is near 1.

N tokens, H hidden, V vocabulary; a vocabulary block is a range of columns handled by one launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_rlhf.kernels import statistics
from fused_rlhf.kernels.exact import best_tokens, exact_scores
from fused_rlhf.kernels.interface import Border, BoundPolicy, Projection, Stats
from fused_rlhf.kernels.objectives import KL_ESTIMATORS, SURROGATES, options_of
from fused_rlhf.kernels.primitives import (
    LN2,
    LOG2E,
    column_slices,
    curve_of,
    expm1,
    load_w,
    load_x,
    open_tile,
    outside,
    scores_of,
    tile_origin,
    unit_of,
    with_bias,
)
from fused_rlhf.kernels.statistics import STATISTICS, parts_of, slots_of
from fused_rlhf.kernels.tiles import Tile, multiprocessors

# Of scores: 2^86 times a vocabulary of 2^26 is below the largest bf16 and fp32.
MAX_ABOVE_REFERENCE = tl.constexpr(86.0)


@triton.jit
def store_tile(out, tile, n_start, v_start, N, V, stride_out, TMA: tl.constexpr):
    """Stores into (N, V): `out` is a descriptor with TMA, else a pointer."""
    if TMA:
        out.store([n_start, v_start], tile.to(out.dtype))
    else:
        offs_n = n_start + tl.arange(0, tile.shape[0])
        offs_v = v_start + tl.arange(0, tile.shape[1])
        ptrs = out + offs_n[:, None].to(tl.int64) * stride_out + offs_v[None, :]
        tl.store(ptrs, tile.to(out.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_v < V)[None, :])


@triton.jit(do_not_specialize=["N", "capacity"])
def stats_kernel(
    x,  # (N, H), descriptor or pointer
    w,  # (V, H), descriptor or pointer: the rows of this vocabulary block
    raw_ptr,  # (N, V) fp32 products from cuBLAS, or None
    bias_ptr,  # (V,) or None
    inv_temperature_ptr,  # (N,) fp32
    reference_ptr,  # (N,) fp32, with exps
    exps,  # (N, V) E in the compute dtype, descriptor or pointer; or None
    partials_ptr,  # (slots, CAPACITY, TILES) fp32: m, S, m's first column, and a number of each statistic asked for
    N,
    V,
    H,
    block_start,  # first column of this vocabulary block, a multiple of BLOCK_V
    tiles,  # vocabulary tiles of the whole head
    capacity,  # rows of partials
    stride_xn,
    stride_wv,
    stride_raw,
    stride_exps,
    logit_scale,
    parameter,  # of the curve
    COLUMN: tl.constexpr,  # a slot; this one is always there
    ENTROPY: tl.constexpr,  # this and the next three: the slot of a statistic, 0 where it is not asked for
    SUM_SQ: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    MARGIN: tl.constexpr,
    CURVE: tl.constexpr,  # this and SLOPE: device functions, or None
    SLOPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SLICE: tl.constexpr = BLOCK_V // SLICES
    plane = capacity.to(tl.int64) * tiles
    all_tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(V, BLOCK_V)
    mine = tl.cdiv(all_tiles - tl.program_id(0), tl.num_programs(0))
    # One loop over the steps of all tiles of this program, so that loads run ahead from tile to tile.
    steps = 1
    if raw_ptr is None:
        steps = tl.cdiv(H, BLOCK_H)
    step = -1
    tile = tl.program_id(0) - tl.num_programs(0)
    n_start = 0
    v_start = 0
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for _ in range(0, mine * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            n_start, v_start = tile_origin(tile, N, V, BLOCK_N, BLOCK_V, GROUP)
        if raw_ptr is None:
            x_tile = load_x(x, n_start, step * BLOCK_H, N, H, stride_xn, BLOCK_N, BLOCK_H, TMA)
            w_tile = load_w(w, v_start, step * BLOCK_H, V, H, stride_wv, BLOCK_V, BLOCK_H, TMA)
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        if step == steps - 1:
            product, offs_n, mask_n, inv_temperature = open_tile(
                acc, raw_ptr, inv_temperature_ptr, n_start, v_start, N, V, stride_raw, BLOCK_N, BLOCK_V
            )
            acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            offs_v = v_start + tl.arange(0, BLOCK_V)
            unit = unit_of(inv_temperature)[:, None]
            score = scores_of(with_bias(product, bias_ptr, offs_v, V), unit, logit_scale, parameter, CURVE)
            if v_start + BLOCK_V > V:
                score = tl.where((offs_v < V)[None, :], score, float("-inf"))

            m = tl.max(score, 1)
            shift = tl.where(m == float("-inf"), 0.0, m)
            if exps is not None:
                rise = m - tl.load(reference_ptr + offs_n, mask=mask_n, other=0.0)
                rise = tl.where(rise > MAX_ABOVE_REFERENCE, 1.0, tl.exp2(rise))
            first = tl.full((BLOCK_N,), BLOCK_V, tl.int32)  # within the tile; a NaN is nowhere
            s = tl.zeros((BLOCK_N,), tl.float32)
            t = tl.zeros((BLOCK_N,), tl.float32)
            q = tl.zeros((BLOCK_N,), tl.float32)
            total = tl.zeros((BLOCK_N,), tl.float32)
            parts = column_slices(score, SLICES)
            ptrs = partials_ptr + offs_n.to(tl.int64) * tiles + (block_start + v_start) // BLOCK_V
            # The next two by themselves: their registers are free again before the exponentials need theirs.
            if MARGIN:
                top = parts[0]
                below = tl.full((BLOCK_N, SLICE), float("-inf"), tl.float32)
                for i in tl.static_range(1, SLICES):
                    below = tl.maximum(below, tl.minimum(top, parts[i]))
                    top = tl.maximum(top, parts[i])
                is_max = top == m[:, None]
                ties = tl.sum(tl.where(is_max, 1.0, 0.0), 1)
                second = tl.max(tl.maximum(below, tl.where(is_max, float("-inf"), top)), 1)
                tl.store(ptrs + MARGIN * plane, tl.where(ties > 1, m, second), mask=mask_n)
                tl.debug_barrier()
            for i in tl.static_range(SLICES):
                column = (i * SLICE + tl.arange(0, SLICE))[None, :]
                first = tl.minimum(first, tl.min(tl.where(parts[i] == m[:, None], column, BLOCK_V), 1))
            column = tl.where(first < BLOCK_V, (block_start + v_start + first).to(tl.float32), float("inf"))
            tl.store(ptrs + COLUMN * plane, column, mask=mask_n)
            for i in tl.static_range(SLICES):
                part = parts[i]
                depth = part - shift[:, None]
                e = tl.exp2(depth)
                s += tl.sum(e, 1)
                if ENTROPY:
                    t += tl.sum(tl.where(e > 0, e * depth, 0.0), 1)  # 0 x -inf for a column of a padded vocabulary
                if SUM_SQ:
                    q += tl.sum(e * e, 1)
                slice_v = v_start + i * SLICE + tl.arange(0, SLICE)
                if MEAN_LOGIT:
                    total += tl.sum(tl.where((slice_v < V)[None, :], part, 0.0), 1)
                if exps is not None:
                    kept = e * rise[:, None]
                    if SLOPE is not None:
                        kept *= SLOPE(part, unit, parameter)
                    store_tile(exps, kept, n_start, v_start + i * SLICE, N, V, stride_exps, TMA)

            tl.store(ptrs, m, mask=mask_n)
            tl.store(ptrs + plane, s, mask=mask_n)
            if ENTROPY:
                tl.store(ptrs + ENTROPY * plane, t, mask=mask_n)
            if SUM_SQ:
                tl.store(ptrs + SUM_SQ * plane, q, mask=mask_n)
            if MEAN_LOGIT:
                tl.store(ptrs + MEAN_LOGIT * plane, total, mask=mask_n)


@triton.jit(do_not_specialize=["capacity"])
def finish_kernel(
    x_ptr,  # (N, H), with an adapter (N, H + copies R)
    w_ptr,  # (V, H) in a dtype of its own
    lora_ptr,  # (V, R) or None
    bias_ptr,  # (V,) or None
    inv_temperature_ptr,
    partials_ptr,
    targets_ptr,
    logprobs_ptr,
    lse_ptr,
    normaliser_ptr,
    entropy_ptr,  # this and the next six: (N,), or None where it is not asked for
    sum_sq_ptr,
    mean_logit_ptr,
    max_logit_ptr,
    argmax_ptr,
    is_top1_ptr,
    margin_ptr,
    row_max_ptr,  # (N,) or None
    old_ptr,  # from here on with a SURROGATE; None: old = logprob
    ref_ptr,
    advantages_ptr,
    token_weights_ptr,
    loss_ptr,
    slope_ptr,  # dloss / dlogprob
    tiles,
    capacity,
    V,
    H,
    R,
    stride_xn,
    stride_wv,
    stride_lora,
    logit_scale,
    parameter,
    beta,
    option_a,
    option_b,
    option_c,
    option_d,
    COLUMN: tl.constexpr,  # slots, as in `stats_kernel`
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    MARGIN: tl.constexpr,
    CURVE: tl.constexpr,
    COMPUTE: tl.constexpr,  # dtypes, as in `exact_scores`
    ADAPTER: tl.constexpr,
    T_PARTS: tl.constexpr,
    EXACT: tl.constexpr,  # of how many tiles the best token is computed exactly
    K: tl.constexpr,  # a power of 2 beyond it
    SURROGATE: tl.constexpr,  # a function of kernels/objectives.py, or None
    KL: tl.constexpr,  # likewise
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One row: merges its partials, corrects them, and with a SURROGATE goes on to the token's loss and slope."""
    n = tl.program_id(0)
    plane = capacity.to(tl.int64) * tiles
    row_ptr = partials_ptr + n.to(tl.int64) * tiles
    y = tl.load(targets_ptr + n)

    m = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        offs = start + tl.arange(0, BLOCK_T)
        m = tl.maximum(m, tl.load(row_ptr + offs, mask=offs < tiles, other=float("-inf")))
    top = tl.max(m, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)

    s = tl.zeros((BLOCK_T,), tl.float32)
    t = tl.zeros((BLOCK_T,), tl.float32)
    q = tl.zeros((BLOCK_T,), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    first = tl.full((BLOCK_T,), float("inf"), tl.float32)
    second = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    ties = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(0, tiles, BLOCK_T):
        offs = start + tl.arange(0, BLOCK_T)
        mask = offs < tiles
        m = tl.load(row_ptr + offs, mask=mask, other=float("-inf"))
        depth = m - shift
        scale = tl.exp2(depth)
        s_tile = tl.load(row_ptr + plane + offs, mask=mask, other=0.0)
        s += scale * s_tile
        if ENTROPY:
            t_tile = tl.load(row_ptr + ENTROPY * plane + offs, mask=mask, other=0.0)
            t += tl.where(scale > 0, scale * (t_tile + depth * s_tile), 0.0)
        if SUM_SQ:
            q += scale * scale * tl.load(row_ptr + SUM_SQ * plane + offs, mask=mask, other=0.0)
        if MEAN_LOGIT:
            total += tl.load(row_ptr + MEAN_LOGIT * plane + offs, mask=mask, other=0.0)
        if is_top1_ptr is not None or argmax_ptr is not None:
            column = tl.load(row_ptr + COLUMN * plane + offs, mask=mask, other=float("inf"))
            first = tl.minimum(first, tl.where(m == top, column, float("inf")))
        if MARGIN:
            second_tile = tl.load(row_ptr + MARGIN * plane + offs, mask=mask, other=float("-inf"))
            ties += (m == top).to(tl.int32)
            second = tl.maximum(second, tl.where(m == top, second_tile, m))
    total_s = tl.sum(s, 0)
    log_s = tl.log(total_s)

    # See `exact.py`. The target stands behind the others, so that its sum has the bits it has as one of them.
    ks = tl.arange(0, K)
    tokens, highest = best_tokens(row_ptr, row_ptr + COLUMN * plane, tiles, EXACT, K, BLOCK_T)
    unit = unit_of(tl.load(inv_temperature_ptr + n))
    scores = exact_scores(
        x_ptr + n.to(tl.int64) * stride_xn, w_ptr, lora_ptr, bias_ptr, tl.where(ks == EXACT, y, tokens), ks <= EXACT, unit,
        H, R, stride_wv, stride_lora, logit_scale, parameter, CURVE, COMPUTE, ADAPTER, T_PARTS, BLOCK_H,
    )  # fmt: skip
    target = tl.sum(tl.where(ks == EXACT, scores, 0.0), 0)
    counts = highest > float("-inf")
    off = tl.where(counts, scores - highest, 0.0)
    base = tl.sum(tl.where(ks == 0, off, 0.0), 0)
    weights = tl.where(counts, tl.exp2(highest - shift), 0.0)
    total_weight = tl.sum(weights, 0)
    lift = tl.where(total_weight > 0, tl.sum(weights * (off - base), 0) / total_weight, 0.0)

    logprob = (((target - shift) - base) - lift) * LN2 - log_s
    tl.store(logprobs_ptr + n, logprob)
    tl.store(lse_ptr + n, ((shift + base) + lift) * LN2 + log_s)
    tl.store(normaliser_ptr + n, shift + tl.log2(total_s))
    if max_logit_ptr is not None:
        tl.store(max_logit_ptr + n, tl.where(total_s == total_s, (top + base) * LN2, total_s))  # a NaN stays one
    if ENTROPY:
        tl.store(entropy_ptr + n, log_s - tl.sum(t, 0) * LN2 / total_s)
    if SUM_SQ:
        tl.store(sum_sq_ptr + n, tl.sum(q, 0) / (total_s * total_s))
    if MEAN_LOGIT:
        tl.store(mean_logit_ptr + n, tl.sum(total, 0) * LN2 / V)
    if argmax_ptr is not None:
        column = tl.min(first, 0)
        tl.store(argmax_ptr + n, tl.where(column < V, column, 0.0).to(tl.int64))  # a row of NaN has none
    if is_top1_ptr is not None:
        tl.store(is_top1_ptr + n, tl.min(first, 0) == y.to(tl.float32))
    if MARGIN:
        runner_up = tl.where(tl.sum(ties, 0) > 1, top, tl.max(second, 0))
        tl.store(margin_ptr + n, tl.where(total_s == total_s, (top - runner_up) * LN2, total_s))
    if row_max_ptr is not None:
        tl.store(row_max_ptr + n, top)
    if SURROGATE is not None:
        old = logprob
        if old_ptr is not None:
            old = tl.load(old_ptr + n)
        advantage = tl.load(advantages_ptr + n)
        loss, slope, by_ratio = SURROGATE(logprob, logprob - old, advantage, option_a, option_b, option_c, option_d)
        slope += by_ratio
        if KL is not None:
            kl, by_kl = KL(logprob, tl.load(ref_ptr + n))
            loss += beta * kl
            slope += beta * by_kl
        weight = tl.load(token_weights_ptr + n)
        tl.store(loss_ptr + n, weight * loss)
        tl.store(slope_ptr + n, weight * slope)


@triton.jit
def reference_kernel(
    x_ptr, w_ptr, bias_ptr, inv_temperature_ptr, targets_ptr, reference_ptr, H, stride_xn, stride_wv,
    logit_scale, parameter, CURVE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One row's score of the target; finite."""
    n = tl.program_id(0)
    token = tl.load(targets_ptr + n + tl.arange(0, 1))
    score = exact_scores(
        x_ptr + n.to(tl.int64) * stride_xn, w_ptr, None, bias_ptr, token, token >= 0,
        unit_of(tl.load(inv_temperature_ptr + n)), H, 0, stride_wv, 0, logit_scale, parameter,
        CURVE, COMPUTE, COMPUTE, 0, BLOCK_H,
    )  # fmt: skip
    tl.store(reference_ptr + n + tl.arange(0, 1), tl.maximum(score, -1e30))


@triton.jit
def repair_kernel(
    exps_ptr,  # (N, V) E
    partials_ptr,
    reference_ptr,
    row_max_ptr,  # of a shard: the normaliser, which no logit of any shard is above
    logprobs_ptr,
    normaliser_ptr,
    slope_ptr,
    inv_temperature_ptr,
    targets_ptr,  # of a shard some lie beyond it
    factor_ptr,  # (N,) fp32 out: dz (N, V) = factor E
    V,
    tiles,
    stride_exps,
    logit_scale,
    parameter,
    SLOPE: tl.constexpr,
    TILE_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of E: to one reference where its tiles have several, and p - 1 in place of p at the target."""
    n = tl.program_id(0)
    row = exps_ptr + n.to(tl.int64) * stride_exps
    reference = tl.load(reference_ptr + n)
    top = tl.load(row_max_ptr + n)
    normaliser = tl.load(normaliser_ptr + n)
    inv_temperature = tl.load(inv_temperature_ptr + n)
    target = reference
    if top - reference > MAX_ABOVE_REFERENCE:
        for start in range(0, V, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < V
            m = tl.load(partials_ptr + n.to(tl.int64) * tiles + offs // TILE_V, mask=mask, other=0.0)
            stored = tl.where(m - reference > MAX_ABOVE_REFERENCE, m, reference)
            e = tl.load(row + offs, mask=mask, other=0.0).to(tl.float32)
            tl.store(row + offs, (e * tl.exp2(stored - top)).to(exps_ptr.dtype.element_ty), mask=mask)
        reference = top
        tl.debug_barrier()  # the target's element is stored once more below

    logprob = tl.load(logprobs_ptr + n)
    at_target = expm1(logprob) * tl.exp2(normaliser - reference)
    if SLOPE is not None:
        at_target *= SLOPE(target, unit_of(inv_temperature), parameter)
    y = tl.load(targets_ptr + n)
    tl.store(row + y, at_target.to(exps_ptr.dtype.element_ty), mask=(y >= 0) & (y < V))
    slope = tl.load(slope_ptr + n)
    tl.store(factor_ptr + n, -slope * tl.exp2(reference - normaliser) * logit_scale * inv_temperature)


@triton.jit(do_not_specialize=["N"])
def dlogits_kernel(
    x,  # (N, H), descriptor or pointer
    w,  # (V, H), descriptor or pointer: the rows of this vocabulary block
    raw_ptr,  # (N, V) fp32 products from cuBLAS, or None
    bias_ptr,  # (V,) or None
    inv_temperature_ptr,
    targets_ptr,
    normaliser_ptr,
    logprobs_ptr,
    g_ptr,  # (N,) fp32: g scale / temperature; so with the next two
    constant_ptr,  # (N,) fp32: c
    h_ptr,  # (N,) fp32, or None
    square_ptr,  # (N,) fp32: 2 q, or None
    flat_ptr,  # (N,) fp32: m / V, or None
    floor_ptr,  # (N,) fp32, or None: this and the next are a `Border`
    first_ptr,  # (N,) int64
    dlogits,  # (N, V) out in the compute dtype, descriptor or pointer
    dbias_ptr,  # (tiles of rows, V) fp32 column sums, or None
    N,
    V,
    H,
    block_start,
    stride_xn,
    stride_wv,
    stride_raw,
    stride_out,
    logit_scale,
    parameter,
    CURVE: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SLICE: tl.constexpr = BLOCK_V // SLICES
    all_tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(V, BLOCK_V)
    mine = tl.cdiv(all_tiles - tl.program_id(0), tl.num_programs(0))
    # One loop over the steps of all tiles of this program, so that loads run ahead from tile to tile.
    steps = 1
    if raw_ptr is None:
        steps = tl.cdiv(H, BLOCK_H)
    step = -1
    tile = tl.program_id(0) - tl.num_programs(0)
    n_start = 0
    v_start = 0
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for _ in range(0, mine * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            n_start, v_start = tile_origin(tile, N, V, BLOCK_N, BLOCK_V, GROUP)
        if raw_ptr is None:
            x_tile = load_x(x, n_start, step * BLOCK_H, N, H, stride_xn, BLOCK_N, BLOCK_H, TMA)
            w_tile = load_w(w, v_start, step * BLOCK_H, V, H, stride_wv, BLOCK_V, BLOCK_H, TMA)
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        if step == steps - 1:
            product, offs_n, mask_n, inv_temperature = open_tile(
                acc, raw_ptr, inv_temperature_ptr, n_start, v_start, N, V, stride_raw, BLOCK_N, BLOCK_V
            )
            acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            unit = unit_of(inv_temperature)[:, None]
            target = (tl.load(targets_ptr + offs_n, mask=mask_n, other=-1) - block_start).to(tl.int32) - v_start
            normaliser = tl.load(normaliser_ptr + offs_n, mask=mask_n, other=float("inf"))  # p = 0 past the end
            logprob = tl.load(logprobs_ptr + offs_n, mask=mask_n, other=0.0)
            g = tl.load(g_ptr + offs_n, mask=mask_n, other=0.0)
            constant = tl.load(constant_ptr + offs_n, mask=mask_n, other=0.0)
            if h_ptr is not None:
                h = tl.load(h_ptr + offs_n, mask=mask_n, other=0.0)
            if square_ptr is not None:
                square = tl.load(square_ptr + offs_n, mask=mask_n, other=0.0)
            if floor_ptr is not None:
                floor = tl.load(floor_ptr + offs_n, mask=mask_n, other=0.0)
                first = (tl.load(first_ptr + offs_n, mask=mask_n, other=0) - block_start).to(tl.int32) - v_start
            any_here = tl.max(((target >= 0) & (target < BLOCK_V)).to(tl.int32), 0) > 0
            # From the forward's own log-prob, so that 1 - p keeps its digits where p is near 1.
            at_target = tl.exp2(logprob * LOG2E)
            coefficient = constant
            if square_ptr is not None:
                coefficient += square * at_target
            if h_ptr is not None:
                at_target *= tl.where(at_target > 0, coefficient - h * logprob, 1.0)
            else:
                at_target *= coefficient
            at_target += g
            if flat_ptr is not None:
                at_target += tl.load(flat_ptr + offs_n, mask=mask_n, other=0.0)
            parts = column_slices(product, SLICES)
            for i in tl.static_range(SLICES):
                slice_v = v_start + i * SLICE + tl.arange(0, SLICE)
                mask_v = slice_v < V
                score = scores_of(with_bias(parts[i], bias_ptr, slice_v, V), unit, logit_scale, parameter, CURVE)
                depth = score - normaliser[:, None]
                p = tl.exp2(depth)
                if floor_ptr is not None:
                    column = (i * SLICE + tl.arange(0, SLICE))[None, :]
                    p = tl.where(outside(score * LN2, column, floor[:, None], first[:, None]), 0.0, p)
                if h_ptr is not None:
                    slope = constant[:, None] - h[:, None] * (depth * LN2)
                    if square_ptr is not None:
                        slope += square[:, None] * p
                    dz = tl.where(p > 0, p * slope, p)  # 0 x -inf for a column of a padded vocabulary; NaN stays
                elif square_ptr is not None:
                    dz = p * (constant[:, None] + square[:, None] * p)
                else:
                    dz = p * constant[:, None]
                if flat_ptr is not None:  # read again for each slice: registers are short
                    dz += tl.load(flat_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
                if any_here:
                    here = (i * SLICE + tl.arange(0, SLICE))[None, :] == target[:, None]
                    dz = tl.where(here, at_target[:, None], dz)
                if SLOPE is not None:
                    dz *= SLOPE(score, unit, parameter)
                store_tile(dlogits, dz, n_start, v_start + i * SLICE, N, V, stride_out, TMA)
                if dbias_ptr is not None:
                    sums = tl.sum(tl.where(mask_n[:, None], dz, 0.0), 0)
                    tl.store(dbias_ptr + (n_start // BLOCK_N).to(tl.int64) * V + slice_v, sums, mask=mask_v)


@triton.jit
def add_split_kernel(hi_ptr, lo_ptr, addend_ptr, size, BLOCK: tl.constexpr):
    """hi + lo += addend, where hi is the sum rounded to its dtype and lo what that rounding left: twice the digits."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    hi = tl.load(hi_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    lo = tl.load(lo_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    total = hi + (lo + tl.load(addend_ptr + offs, mask=mask, other=0.0))
    rounded = total.to(hi_ptr.dtype.element_ty)
    tl.store(hi_ptr + offs, rounded, mask=mask)
    tl.store(lo_ptr + offs, (total - rounded.to(tl.float32)).to(lo_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class RowBlock:
    """The tokens of one launch."""

    x: Tensor  # (n, H) in the compute dtype
    targets: Tensor  # (n,) int64
    inv_temperature: Tensor  # (n,) fp32


@dataclass(frozen=True)
class ColumnBlock:
    """Columns [start, start + V) of the vocabulary, start a multiple of every tile's width."""

    start: int
    w: Tensor  # (V, H) in the compute dtype
    bias: Tensor | None  # (V,)

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.w.shape[0])


def matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (+)= a @ b, accumulated in fp32; `out` in the operands' dtype or fp32."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif a.is_cuda:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        product = a.to(out.dtype) @ b.to(out.dtype)
        out.add_(product) if accumulate else out.copy_(product)


def descriptors_fit(*operands: Tensor) -> bool:
    """Whether tensor descriptors can address these: 16-byte aligned rows."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in operands)


def _operands(tile: Tile, rows: RowBlock, w: Tensor, out: Tensor | None) -> tuple:
    if not tile.tma:
        return rows.x, w, out
    x = TensorDescriptor.from_tensor(rows.x, [tile.block_n, tile.block_h])
    blocks = TensorDescriptor.from_tensor(w, [tile.block_v, tile.block_h])
    return (
        x,
        blocks,
        None if out is None else TensorDescriptor.from_tensor(out, [tile.block_n, tile.block_v // tile.slices]),
    )


def _pieces(tile: Tile, rows: RowBlock, block: ColumnBlock) -> Iterator[tuple[Tensor | None, slice]]:
    """The block in pieces, with the products of each where they come from cuBLAS."""
    width = block.w.shape[0]
    if not tile.raw_columns:
        yield None, slice(0, width)
        return
    scratch = rows.x.new_empty((rows.x.shape[0], min(width, tile.raw_columns)), dtype=torch.float32)
    for start in range(0, width, tile.raw_columns):
        piece = slice(start, min(start + tile.raw_columns, width))
        raw = scratch[:, : piece.stop - piece.start]
        matmul(rows.x, block.w[piece].T, raw)
        yield raw, piece


def _grid(tile: Tile, rows: int, columns: int, device: torch.device) -> tuple[int]:
    count = triton.cdiv(rows, tile.block_n) * triton.cdiv(columns, tile.block_v)
    return (min(count, tile.programs_per_sm * multiprocessors(device)) if tile.programs_per_sm else count,)


def _multiply_as(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@dataclass(frozen=True)
class Partials:
    """Scratch of the forward for up to `capacity` rows."""

    values: Tensor  # (slots, capacity, tiles of the vocabulary)
    outputs: tuple[str, ...]
    exact: int  # of how many tiles the best token is computed exactly

    @property
    def slots(self) -> dict[str, int]:
        """By the kernels' names: where the number of each statistic is, 0 where it is not asked for."""
        return {_SLOTS[name]: number for name, number in _slots_of(self.outputs).items()}

    @classmethod
    def empty(cls, tile: Tile, capacity: int, V: int, outputs: tuple[str, ...], device: torch.device) -> Partials:
        slots = 2 + sum(number > 0 for number in _slots_of(outputs).values())
        values = torch.empty((slots, capacity, triton.cdiv(V, tile.block_v)), dtype=torch.float32, device=device)
        return cls(values, outputs, tile.exact)

    def merged(self, stats: Stats, top: Tensor, here: Tensor, vocabulary: int) -> statistics.Partials:
        """The tiles of n rows, merged and in nats: what `finish_kernel` made of them, before it divided by the sums.

        top: (n,) scores; here: (n,) bool, whose targets are columns of this head. S stays relative to the largest logit as it
        was multiplied, and the maximum takes what corrects the log-sum-exp.
        """
        n = len(top)
        highest, sums = self.values[0, :n], self.values[1, :n]
        shift = top.masked_fill(top == -torch.inf, 0.0)[:, None]
        total = (sums * torch.exp2(highest - shift)).sum(1)
        log_total = total.log()
        maximum = torch.where(top == -torch.inf, top, stats.lse - log_total)
        of = {
            "entropy": lambda h: total * (log_total - h),
            "sum_sq": lambda q: q * total.square(),
            "mean_logit": lambda z: z * vocabulary,
            "max_logit": lambda largest: largest,
            "argmax": lambda column: column,
            "margin": lambda gap: maximum - gap,
        }
        parts = {name: of[name](stats.extra[name]) for name in parts_of(self.outputs)}
        target = torch.where(here, maximum + (stats.logprobs + log_total), 0.0)
        return statistics.Partials(maximum, total, target, parts)


# The first column of the maximum is always there, and so is the maximum itself, which has no slot of its own.
_SLOTS = {name: "COLUMN" if name == "argmax" else name.upper() for name in parts_of(STATISTICS) if name != "max_logit"}


def _slots_of(outputs: tuple[str, ...]) -> dict[str, int]:
    found = slots_of(name for name in (*outputs, "argmax") if name != "max_logit")
    return {name: found.get(name, 0) for name in _SLOTS}


def launch_stats(
    tile: Tile,
    rows: RowBlock,
    block: ColumnBlock,
    head: Projection,
    partials: Partials,
    exps: Tensor | None = None,
    reference: Tensor | None = None,
) -> None:
    """Reduces the block's logits into `partials`; with exps (n, its columns) and reference (n,), also stores E."""
    (n, H), curve = rows.x.shape, curve_of(head.transform)
    for raw, piece in _pieces(tile, rows, block):
        w = block.w[piece]
        kept = None if exps is None else exps[:, piece]
        x_arg, w_arg, out_arg = _operands(tile, rows, w, kept)
        stats_kernel[_grid(tile, n, w.shape[0], w.device)](
            x_arg, w_arg, raw, None if block.bias is None else block.bias[piece], rows.inv_temperature, reference,
            out_arg, partials.values,
            n, w.shape[0], H, block.start + piece.start, partials.values.shape[2], partials.values.shape[1],
            rows.x.stride(0), w.stride(0), 0 if raw is None else raw.stride(0), 0 if kept is None else kept.stride(0),
            head.transform.logit_scale, head.transform.parameter, **partials.slots, CURVE=curve.apply, SLOPE=curve.slope,
            PRECISION=_multiply_as(w.dtype), **tile.constants, **tile.options,
        )  # fmt: skip


def launch_finish(
    rows: RowBlock, head: Projection, partials: Partials, row_max: Tensor | None = None,
    objective: BoundPolicy | None = None, at: slice = slice(None),
) -> tuple[Stats, Tensor | None, Tensor | None]:  # fmt: skip
    """Merges `partials` -> (Stats, loss, dloss / dlogprob), (n,) each; the last two with an objective that has a twin.

    `at`: where these rows lie in the objective's vectors.
    """
    n = rows.x.shape[0]
    fp32 = {"dtype": torch.float32, "device": rows.x.device}
    logprobs, lse, normaliser = (torch.empty(n, **fp32) for _ in range(3))  # type: ignore[call-overload]
    extra = {
        name: torch.empty(n, dtype=record.dtype or torch.float32, device=rows.x.device)
        for name, record in STATISTICS.items()
        if name in partials.outputs and name != "lse"
    }
    results = {f"{name}_ptr": extra.get(name) for name in STATISTICS if name != "lse"}
    loss = slope = surrogate = kl = None
    vectors: list[Tensor | None] = [None] * 4
    options = [0.0] * 4
    if objective is not None:
        loss, slope = torch.empty(n, **fp32), torch.empty(n, **fp32)  # type: ignore[call-overload]
        twin = SURROGATES[objective.surrogate]
        surrogate, options = twin.function, options_of(twin, objective.options)
        kl = KL_ESTIMATORS[objective.kl] if objective.kl else None
        whole = (
            objective.old_logprobs,
            objective.ref_logprobs if kl else None,
            objective.advantages,
            objective.token_weights,
        )
        vectors = [None if v is None else v[at] for v in whole]
    lora, count = head.lora_b, triton.next_power_of_2(partials.exact + 1)
    finish_kernel[(n,)](
        rows.x, head.weight, lora, head.bias, rows.inv_temperature, partials.values, rows.targets,
        logprobs, lse, normaliser, **results, row_max_ptr=row_max,
        old_ptr=vectors[0], ref_ptr=vectors[1], advantages_ptr=vectors[2], token_weights_ptr=vectors[3],
        loss_ptr=loss, slope_ptr=slope, tiles=partials.values.shape[2], capacity=partials.values.shape[1],
        V=head.vocabulary, H=head.weight.shape[1], R=0 if lora is None else lora.shape[1],
        stride_xn=rows.x.stride(0), stride_wv=head.weight.stride(0), stride_lora=0 if lora is None else lora.stride(0),
        logit_scale=head.transform.logit_scale, parameter=head.transform.parameter,
        beta=0.0 if objective is None else float(objective.beta), option_a=options[0], option_b=options[1],
        option_c=options[2], option_d=options[3], **partials.slots, CURVE=curve_of(head.transform).apply,
        COMPUTE=TRITON_DTYPES[rows.x.dtype], ADAPTER=TRITON_DTYPES[head.adapter_dtype], T_PARTS=head.t_parts,
        EXACT=partials.exact, K=count, SURROGATE=surrogate, KL=kl, BLOCK_T=1024, BLOCK_H=4096 // count, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip
    return Stats(logprobs, lse, extra, normaliser=normaliser), loss, slope


def launch_reference(rows: RowBlock, head: Projection) -> Tensor:
    """The target's score of each row."""
    n, H = rows.x.shape
    reference = torch.empty_like(rows.inv_temperature)
    reference_kernel[(n,)](
        rows.x, head.weight, head.bias, rows.inv_temperature, rows.targets, reference, H, rows.x.stride(0),
        head.weight.stride(0), head.transform.logit_scale, head.transform.parameter,
        CURVE=curve_of(head.transform).apply, COMPUTE=TRITON_DTYPES[rows.x.dtype], BLOCK_H=1024,
    )  # fmt: skip
    return reference


TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def launch_repair(
    tile: Tile, rows: RowBlock, head: Projection, partials: Partials, exps: Tensor, reference: Tensor, row_max: Tensor,
    stats: Stats, slope: Tensor,
) -> Tensor:  # fmt: skip
    """Makes E (n, V) ready for the products and returns the factor (n,) with dz = factor E."""
    factor = torch.empty_like(slope)
    repair_kernel[(rows.x.shape[0],)](
        exps, partials.values, reference, row_max, stats.logprobs, stats.normaliser, slope, rows.inv_temperature,
        rows.targets, factor, head.vocabulary, partials.values.shape[2], exps.stride(0), head.transform.logit_scale,
        head.transform.parameter, SLOPE=curve_of(head.transform).slope, TILE_V=tile.block_v, BLOCK=1024,
        enable_fp_fusion=False,
    )  # fmt: skip
    return factor


@dataclass(frozen=True)
class RowGrads:
    """Upstream gradients of one launch's rows times logit_scale / temperature, (n,) fp32."""

    g: Tensor  # of logprobs
    constant: Tensor  # c: what p is multiplied by in every column
    normaliser: Tensor
    logprobs: Tensor
    h: Tensor | None = None  # of entropy
    square: Tensor | None = None  # twice that of sum_sq
    flat: Tensor | None = None  # of mean_logit, over V
    border: Border | None = None

    def pick(self, rows: slice | Tensor) -> RowGrads:
        def some(value: Any) -> Any:
            return value.pick(rows) if isinstance(value, Border) else None if value is None else value[rows]

        return RowGrads(**{f.name: some(getattr(self, f.name)) for f in fields(self)})


def launch_dlogits(
    tile: Tile, rows: RowBlock, block: ColumnBlock, head: Projection, grads: RowGrads, out: Tensor, need_bias: bool
) -> Tensor | None:
    """Writes dloss/du (n, the block's columns) into `out` in the compute dtype; returns its column sums if needed."""
    (n, H), curve, sums = rows.x.shape, curve_of(head.transform), []
    for raw, piece in _pieces(tile, rows, block):
        w, kept = block.w[piece], out[:, piece]
        dbias = None
        if need_bias:
            dbias = torch.empty((triton.cdiv(n, tile.block_n), w.shape[0]), dtype=torch.float32, device=w.device)
        x_arg, w_arg, out_arg = _operands(tile, rows, w, kept)
        dlogits_kernel[_grid(tile, n, w.shape[0], w.device)](
            x_arg, w_arg, raw, None if block.bias is None else block.bias[piece], rows.inv_temperature, rows.targets,
            grads.normaliser, grads.logprobs, grads.g, grads.constant, grads.h, grads.square, grads.flat,
            *((None, None) if grads.border is None else grads.border), out_arg, dbias,
            n, w.shape[0], H, block.start + piece.start, rows.x.stride(0), w.stride(0),
            0 if raw is None else raw.stride(0), kept.stride(0), head.transform.logit_scale, head.transform.parameter,
            CURVE=curve.apply, SLOPE=curve.slope, PRECISION=_multiply_as(w.dtype), **tile.constants, **tile.options,
        )  # fmt: skip
        if dbias is not None:
            sums.append(dbias.sum(0))
    return torch.cat(sums) if sums else None


def add_split(hi: Tensor, lo: Tensor, addend: Tensor) -> None:
    """hi + lo += addend (fp32), all contiguous and of one shape; see `add_split_kernel`."""
    add_split_kernel[(triton.cdiv(hi.numel(), 4096),)](hi, lo, addend, hi.numel(), BLOCK=4096, num_warps=8)
