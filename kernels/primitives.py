"""Device functions shared by the kernels: tile order, tile products, the logit transform, column slices.

N tokens, H hidden, V vocabulary. A tile is `[BLOCK_N, BLOCK_V]` of the matrix of logits. The kernels keep a logit z as its
score, z log2 e, so that exp z is one exp2 and nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_rlhf.kernels.transforms import Transform

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_origin(tile, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """First row and first column of a tile; GROUP tiles of rows share the columns that lie in L2."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    group = tile // (GROUP * tiles_v)
    rows_in_group = tl.minimum(tiles_n - group * GROUP, GROUP)
    within = tile - group * GROUP * tiles_v
    tile_n = group * GROUP + within % rows_in_group
    tile_v = within // rows_in_group
    return tile_n * BLOCK_N, tile_v * BLOCK_V


@triton.jit
def load_x(
    x, n_start, h_start, N, H, stride_xn, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """[BLOCK_N, BLOCK_H] of (N, H), zero past H; `x` is a descriptor of such blocks with TMA, else a pointer."""
    if TMA:
        return x.load([n_start, h_start])
    else:
        # Clamped instead of masked: a repeated row costs nothing and its products are never stored.
        rows = tl.minimum(n_start + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        offs_h = h_start + tl.arange(0, BLOCK_H)
        return tl.load(x + rows[:, None] * stride_xn + offs_h[None, :], mask=(offs_h < H)[None, :], other=0.0)


@triton.jit
def load_w(
    w, v_start, h_start, V, H, stride_wv, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """[BLOCK_H, BLOCK_V] of (V, H) transposed; likewise."""
    if TMA:
        return w.load([v_start, h_start]).T
    else:
        cols = tl.minimum(v_start + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        offs_h = h_start + tl.arange(0, BLOCK_H)
        return tl.load(w + cols[None, :] * stride_wv + offs_h[:, None], mask=(offs_h < H)[:, None], other=0.0)


@triton.jit
def tanh(x):
    # Near 0 the quotient cancels; the series there is exact to 2e-9 relative.
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    quotient = 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)
    return tl.where(tl.abs(x) < 0.25, series, quotient)


@triton.jit
def expm1(x):
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(tl.abs(x) < 0.125, series, tl.exp2(x * LOG2E) - 1)


@triton.jit
def log1p(t):
    # log(1 + t) = t log(u) / (u - 1) with u the rounded 1 + t: the two roundings cancel (Goldberg, 1991).
    u = 1 + t
    return tl.where(u == 1, t, t * tl.log(u) / (u - 1))


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p(tl.exp2(-tl.abs(x) * LOG2E))


@triton.jit
def load_raw(raw_ptr, n_start, v_start, N, V, stride_raw, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """A tile of products that cuBLAS left in (N, V) fp32."""
    offs_n = n_start + tl.arange(0, BLOCK_N)
    offs_v = v_start + tl.arange(0, BLOCK_V)
    ptrs = raw_ptr + offs_n[:, None].to(tl.int64) * stride_raw + offs_v[None, :]
    return tl.load(ptrs, mask=(offs_n < N)[:, None] & (offs_v < V)[None, :], other=0.0)


@triton.jit
def open_tile(
    product, raw_ptr, inv_temperature_ptr, n_start, v_start, N, V, stride_raw,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A finished tile: its products, from cuBLAS with raw_ptr; its rows, whether each is one, and 1 / temperature."""
    if raw_ptr is not None:
        product = load_raw(raw_ptr, n_start, v_start, N, V, stride_raw, BLOCK_N, BLOCK_V)
    offs_n = n_start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    return product, offs_n, mask_n, tl.load(inv_temperature_ptr + offs_n, mask=mask_n, other=1.0)


@triton.jit
def softcap(product, gain, cap):
    return cap * tanh(product * (gain / cap))


@triton.jit
def softcap_slope(score, unit, cap):
    """1 - tanh(u / cap)^2, from the scores cap tanh(u / cap) unit."""
    t = score / (cap * unit)
    return 1 - t * t


class Curve(NamedTuple):
    """The twin of a curve of `transforms.CURVES`."""

    apply: Any  # (product, logit_scale, parameter) -> curve(logit_scale product)
    slope: Any  # (score, unit, parameter) -> d curve / du, where score = unit curve(u)


CURVES: dict[str, Curve] = {"softcap": Curve(softcap, softcap_slope)}


def curve_of(transform: Transform) -> Curve:
    """None twice where there is none.

    Raises:
        NotImplementedError: a curve that has no twin.
    """
    if not transform.curve:
        return Curve(None, None)
    if transform.curve not in CURVES:
        raise NotImplementedError(
            f'backend="triton": the curve {transform.curve!r} has no twin in kernels/primitives.py; use backend="chunked"'
        )
    return CURVES[transform.curve]


@triton.jit
def unit_of(inv_temperature):
    """A row's score of a logit of 1 before the temperature."""
    return inv_temperature * LOG2E


@triton.jit
def scores_of(product, unit, logit_scale, parameter, CURVE: tl.constexpr):
    """Products h W^T + b -> scores; all but logit_scale and parameter must broadcast, CURVE may be None."""
    if CURVE is not None:
        return CURVE(product, logit_scale, parameter) * unit
    else:
        return product * (logit_scale * unit)


@triton.jit
def with_bias(product, bias_ptr, offs_v, V):
    """The products of these columns, (rows, BLOCK) fp32, with their bias; bias_ptr may be None."""
    if bias_ptr is not None:
        product += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    return product


@triton.jit
def outside(z, column, floor, first):
    """Whether logits lie beyond the `Border` of their rows."""
    return (z < floor) | ((z == floor) & (column < first))


@triton.jit
def halves(tile):
    """Left and right columns of a tile, without moving a register."""
    R: tl.constexpr = tile.shape[0]
    C: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (R, 2, C // 2)), (0, 2, 1)))


@triton.jit
def column_slices(tile, SLICES: tl.constexpr):
    """A tile as a tuple of SLICES (1, 2, 4 or 8) tiles of adjacent columns, without moving a register."""
    if SLICES == 1:
        return (tile,)
    else:
        left, right = halves(tile)
        return column_slices(left, SLICES // 2) + column_slices(right, SLICES // 2)
