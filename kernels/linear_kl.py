"""Exact divergences of two LM heads over the whole vocabulary: kernels over the fp32 products of both.

With p the policy's probabilities, q the reference's, m = beta q + (1 - beta) p and d = log p - log q:

    forward   KL(q || p) = sum q (e^d - 1 - d)
    reverse   KL(p || q) = sum p (e^-d - 1 + d)
    jsd       beta KL(q || m) + (1 - beta) KL(p || m) = sum beta q (e^u - 1 - u) + (1 - beta) p (e^v - 1 - v)

with u = log m - log q and v = log m - log p: what these sums have beside the definition's own terms adds up to 0. No term
of theirs is negative, and e^x - 1 - x has a series, so that nothing cancels where p is close to q. Back, with upstream g
and s = d (reverse) or (beta - 1) v (jsd):

    forward   dz = g (p - q) = g p (1 - e^-d)          reverse, jsd   dz = g p (s - sum p s)

The products of both heads come from cuBLAS. Forward: a block of rows over the whole vocabulary, of which
`divergence_kernel` reads a row twice, for the two log-sum-exps and for the terms. d is (z - r) - (lse - ref_lse), the last
bracket from maxima and sums apart, so that it keeps its digits. Back: the products once more, a block of rows and columns
at a time, which `divergence_dlogits_kernel` turns into dz times the slope of the transform, in the compute dtype; the two
products that follow are left to cuBLAS.

N tokens, V vocabulary; z are the policy's logits and r the reference's, in natural units (a score's unit is 1 / temperature
here, without log2 e), since d enters the formulas as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_rlhf.kernels.interface import Comparison, Kind, Sums
from fused_rlhf.kernels.linear_logprobs import store_tile
from fused_rlhf.kernels.primitives import LOG2E, curve_of, expm1, load_raw, log1p, scores_of, with_bias

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32: below every logit, and still a number
ROW_STEP = 2048  # columns of a row that a program takes at a time
TILE = (8, 256)  # rows and columns of a tile of dz


@triton.jit
def times(weight, log):
    """0 log 0 is 0."""
    return tl.where(weight == 0, 0.0, weight * log)


@triton.jit
def excess(x):
    """e^x - 1 - x for |x| < 1, whose digits the difference would lose."""
    tail = 1 / 5040 + x * (1 / 40320 + x * (1 / 362880 + x * (1 / 3628800 + x * (1 / 39916800))))
    return x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * tail)))))


@triton.jit
def kl_terms(a, b, gap):
    """a (e^gap - 1 - gap), gap = log b - log a; a e^gap is b, where that would overflow or has nothing to cancel."""
    return tl.where(tl.abs(gap) < 1, a * excess(gap), (b - a) - times(a, gap))


@triton.jit
def difference(p, q, d):
    """p - q, to its own size where they are close."""
    return tl.where(tl.abs(d) < 1, -p * expm1(-d), p - q)


@triton.jit
def mixture(d, beta):
    """log m - log p and log m - log q."""
    share = tl.where(d > 0, beta, 1 - beta)  # in m, of the less likely of p and q
    smaller = log1p(share * expm1(-tl.abs(d)))  # log m less the log of the more likely
    return smaller + tl.maximum(-d, 0.0), smaller + tl.maximum(d, 0.0)


@triton.jit
def forward_terms(p, q, d, beta):
    return kl_terms(q, p, d)


@triton.jit
def reverse_terms(p, q, d, beta):
    return kl_terms(p, q, -d)


@triton.jit
def reverse_push(d, beta):
    return d


@triton.jit
def jsd_terms(p, q, d, beta):
    over_p, over_q = mixture(d, beta)
    m = beta * q + (1 - beta) * p
    return beta * kl_terms(q, m, over_q) + (1 - beta) * kl_terms(p, m, over_p)


@triton.jit
def jsd_push(d, beta):
    over_p, _ = mixture(d, beta)
    return (beta - 1) * over_p


class Twin(NamedTuple):
    """What the kernels need of a kind."""

    terms: Any  # (p, q, d, beta) -> the terms of the sum
    push: Any = None  # (d, beta) -> s; None: dz = p - q


TWINS: dict[Kind, Twin] = {
    "forward": Twin(forward_terms),
    "reverse": Twin(reverse_terms, reverse_push),
    "jsd": Twin(jsd_terms, jsd_push),
}


@triton.jit
def row_logits(
    row_ptr, bias_ptr, start, V, inv_temperature, logit_scale, parameter, CURVE: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """[1, STEP] logits of one row, from its products; -inf past V."""
    offs = start + tl.arange(0, STEP)
    product = tl.load(row_ptr + offs[None, :], mask=(offs < V)[None, :], other=0.0)
    z = scores_of(with_bias(product, bias_ptr, offs, V), inv_temperature[:, None], logit_scale, parameter, CURVE)
    return tl.where((offs < V)[None, :], z, float("-inf"))


@triton.jit
def row_sum(
    row_ptr, bias_ptr, V, inv_temperature, logit_scale, parameter, CURVE: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """The maximum of one row's logits and sum exp(z - maximum), [1] each."""
    m = tl.full((1, STEP), LOWEST, tl.float32)
    s = tl.zeros((1, STEP), tl.float32)
    for start in range(0, V, STEP):
        z = row_logits(row_ptr, bias_ptr, start, V, inv_temperature, logit_scale, parameter, CURVE, STEP)
        e = tl.exp2(-tl.abs(z - m) * LOG2E)
        s = tl.where(z > m, s * e + 1, s + e)
        m = tl.maximum(m, z)
    top = tl.max(m, 1)
    return top, tl.sum(s * tl.exp2((m - top[:, None]) * LOG2E), 1)


@triton.jit
def totals_kernel(
    z_ptr, bias_ptr, inv_temperature_ptr, out_ptr, V, stride, stride_out, logit_scale, parameter,
    CURVE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One row's `row_sum` into two columns of out."""
    n = tl.program_id(0)
    inv_temperature = tl.load(inv_temperature_ptr + n + tl.arange(0, 1))
    row_ptr = z_ptr + n.to(tl.int64) * stride
    top, total = row_sum(row_ptr, bias_ptr, V, inv_temperature, logit_scale, parameter, CURVE, STEP)
    out = out_ptr + n * stride_out + tl.arange(0, 1)
    tl.store(out, top)
    tl.store(out + 1, total)


def launch_totals(of: Comparison, z: Tensor, r: Tensor, inv_temperature: Tensor) -> Tensor:
    """(n, 4): maximum and sum exp(z - maximum) of both heads' logits, from their products as in `launch_divergence`."""
    (n, V), found = z.shape, torch.empty((len(z), 4), dtype=torch.float32, device=z.device)
    for products, head, out in ((z, of.policy, found[:, :2]), (r, of.ref, found[:, 2:])):
        totals_kernel[(n,)](
            products, head.bias, inv_temperature, out, V, products.stride(0), out.stride(0), head.transform.logit_scale,
            head.transform.parameter, CURVE=curve_of(head.transform).apply, STEP=ROW_STEP, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
    return found


@triton.jit
def divergence_kernel(
    z_ptr,  # (N, V) fp32 products of the policy
    r_ptr,  # (N, V) likewise of the reference
    bias_ptr,  # (V,) or None
    ref_bias_ptr,
    totals_ptr,  # (N, 4) of `launch_totals`, over the shards of all ranks; None: the vocabulary is whole
    inv_temperature_ptr,  # (N,) fp32, as are the next five, written here
    value_ptr,
    lse_ptr,
    ref_lse_ptr,
    shift_ptr,
    mean_ptr,
    V,
    stride,  # of both products
    beta,
    logit_scale,
    parameter,
    ref_logit_scale,
    ref_parameter,
    CURVE: tl.constexpr,
    REF_CURVE: tl.constexpr,
    TERMS: tl.constexpr,  # these two of a `Twin`
    PUSH: tl.constexpr,
    STEP: tl.constexpr,
):
    """One row: the divergence, and what its gradient needs."""
    n = tl.program_id(0)
    z_row = z_ptr + n.to(tl.int64) * stride
    r_row = r_ptr + n.to(tl.int64) * stride
    row = n + tl.arange(0, 1)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    if totals_ptr is None:
        top, total = row_sum(z_row, bias_ptr, V, inv_temperature, logit_scale, parameter, CURVE, STEP)
        ref_top, ref_total = row_sum(
            r_row, ref_bias_ptr, V, inv_temperature, ref_logit_scale, ref_parameter, REF_CURVE, STEP
        )
    else:
        top = tl.load(totals_ptr + 4 * row)
        total = tl.load(totals_ptr + 4 * row + 1)
        ref_top = tl.load(totals_ptr + 4 * row + 2)
        ref_total = tl.load(totals_ptr + 4 * row + 3)
    log_total = tl.log(total)
    ref_log_total = tl.log(ref_total)
    shift = (top - ref_top) + tl.log(tl.div_rn(total, ref_total))  # 0 where they are equal, which `/` may miss

    value = tl.zeros((1, STEP), tl.float32)
    mean = tl.zeros((1, STEP), tl.float32)
    for start in range(0, V, STEP):
        z = row_logits(z_row, bias_ptr, start, V, inv_temperature, logit_scale, parameter, CURVE, STEP)
        r = row_logits(r_row, ref_bias_ptr, start, V, inv_temperature, ref_logit_scale, ref_parameter, REF_CURVE, STEP)
        # Not from the log-sum-exps, whose rounding the sum of p - q would keep.
        p = tl.exp2(((z - top[:, None]) - log_total[:, None]) * LOG2E)
        q = tl.exp2(((r - ref_top[:, None]) - ref_log_total[:, None]) * LOG2E)
        d = (z - r) - shift[:, None]
        value += TERMS(p, q, d, beta)
        if PUSH is not None:
            mean += times(p, PUSH(d, beta))
    tl.store(value_ptr + row, tl.sum(value, 1))
    tl.store(lse_ptr + row, top + log_total)
    tl.store(ref_lse_ptr + row, ref_top + ref_log_total)
    tl.store(shift_ptr + row, shift)
    tl.store(mean_ptr + row, tl.sum(mean, 1))


def launch_divergence(
    of: Comparison,
    z: Tensor,
    r: Tensor,
    inv_temperature: Tensor,
    value: Tensor,
    sums: Sums,
    totals: Tensor | None = None,
) -> None:
    """Writes `value` and `sums` (n,) from both heads' fp32 products z and r (n, V), of one row stride.

    totals: (n, 4) as of `launch_totals`, of a vocabulary of which this is a part; `value` and the mean are then this part's.
    """
    n, V = z.shape
    twin, policy, ref = TWINS[of.kind], of.policy.transform, of.ref.transform
    divergence_kernel[(n,)](
        z, r, of.policy.bias, of.ref.bias, totals, inv_temperature, value, *sums, V, z.stride(0), of.beta,
        policy.logit_scale, policy.parameter, ref.logit_scale, ref.parameter, CURVE=curve_of(policy).apply,
        REF_CURVE=curve_of(ref).apply,
        TERMS=twin.terms, PUSH=twin.push, STEP=ROW_STEP, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def divergence_dlogits_kernel(
    z_ptr,  # (N, V) fp32 products of the policy, for the columns of one block
    r_ptr,  # (N, V) likewise of the reference
    bias_ptr,  # (V,) or None
    ref_bias_ptr,
    inv_temperature_ptr,  # (N,) fp32, as are the next five
    lse_ptr,
    ref_lse_ptr,
    shift_ptr,
    mean_ptr,
    g_ptr,  # upstream times logit_scale / temperature
    out_ptr,  # (N, V) dz in the compute dtype; may be z
    dbias_ptr,  # (tiles of rows, V) fp32 column sums, or None
    N,
    V,
    stride,  # of both products
    stride_out,
    beta,
    logit_scale,
    parameter,
    ref_logit_scale,
    ref_parameter,
    CURVE: tl.constexpr,
    SLOPE: tl.constexpr,
    REF_CURVE: tl.constexpr,
    PUSH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    v_start = tl.program_id(0) * BLOCK_V
    n_start = tl.program_id(1) * BLOCK_N
    offs_v = v_start + tl.arange(0, BLOCK_V)
    offs_n = n_start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    inv_temperature = tl.load(inv_temperature_ptr + offs_n, mask=mask_n, other=1.0)[:, None]
    lse = tl.load(lse_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    ref_lse = tl.load(ref_lse_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    shift = tl.load(shift_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    mean = tl.load(mean_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    g = tl.load(g_ptr + offs_n, mask=mask_n, other=0.0)[:, None]

    z = load_raw(z_ptr, n_start, v_start, N, V, stride, BLOCK_N, BLOCK_V)
    z = scores_of(with_bias(z, bias_ptr, offs_v, V), inv_temperature, logit_scale, parameter, CURVE)
    r = load_raw(r_ptr, n_start, v_start, N, V, stride, BLOCK_N, BLOCK_V)
    r = scores_of(with_bias(r, ref_bias_ptr, offs_v, V), inv_temperature, ref_logit_scale, ref_parameter, REF_CURVE)
    p = tl.exp2((z - lse) * LOG2E)
    d = (z - r) - shift
    if PUSH is not None:
        dz = g * times(p, PUSH(d, beta) - mean)
    else:
        dz = g * difference(p, tl.exp2((r - ref_lse) * LOG2E), d)
    if SLOPE is not None:
        dz *= SLOPE(z, inv_temperature, parameter)
    store_tile(out_ptr, dz, n_start, v_start, N, V, stride_out, False)
    if dbias_ptr is not None:
        sums = tl.sum(tl.where(mask_n[:, None], dz, 0.0), 0)
        tl.store(dbias_ptr + tl.program_id(1).to(tl.int64) * V + offs_v, sums, mask=offs_v < V)


def launch_divergence_dlogits(
    of: Comparison, columns: slice, z: Tensor, r: Tensor, inv_temperature: Tensor, sums: Sums, g: Tensor, out: Tensor,
    need_bias: bool,
) -> Tensor | None:  # fmt: skip
    """Writes dz of these columns into `out` (n, v) from both heads' fp32 products z and r (n, v), of one row stride.

    g: upstream (n,) times logit_scale / temperature. Returns the columns' sums (v,) if needed.
    """
    (n, V), (block_n, block_v) = z.shape, TILE
    policy, ref = of.policy.transform, of.ref.transform
    tiles = triton.cdiv(n, block_n)
    dbias = torch.empty((tiles, V), dtype=torch.float32, device=z.device) if need_bias else None
    curve = curve_of(policy)
    divergence_dlogits_kernel[(triton.cdiv(V, block_v), tiles)](
        z, r, of.policy.bias_of(columns), of.ref.bias_of(columns), inv_temperature, *sums, g, out, dbias, n, V,
        z.stride(0), out.stride(0), of.beta, policy.logit_scale, policy.parameter, ref.logit_scale, ref.parameter,
        CURVE=curve.apply, SLOPE=curve.slope, REF_CURVE=curve_of(ref).apply, PUSH=TWINS[of.kind].push,
        BLOCK_N=block_n, BLOCK_V=block_v, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return None if dbias is None else dbias.sum(0)
