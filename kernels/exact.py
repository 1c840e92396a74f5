"""What a row's log-sum-exp is off by, measured on the row itself.

Tensor cores add in fp32 but cut off what does not fit instead of rounding it: a sum of 4096 products is 4e-6 too small,
relatively, and more where large channels come early in H. A log-prob at logits of +-25 is off by 2e-4, in cuBLAS as well.
No constant can mend that, but the likeliest tokens of a row can tell: with z the logits as multiplied, z' those of exact
fp32 sums and w = exp z,

    lse' = lse + c          c = sum_k w_k (z'_k - z_k) / sum_k w_k          logprob = z'_y - lse'

over the best token of each of the row's highest tiles. With d_k = z'_k - z_k and 1 the best of all, c is computed as
d_1 + sum_k w_k (d_k - d_1) / sum_k w_k, so that the log-prob of token 1 keeps every digit of log S however small it is.
The entropy needs none of this: what shifts all logits cancels in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_rlhf.kernels.primitives import scores_of


@triton.jit
def exact_scores(
    x_ptr, w_ptr, lora_ptr, bias_ptr, tokens, wanted, unit, H, R, stride_wv, stride_lora, logit_scale, parameter,
    CURVE: tl.constexpr, COMPUTE: tl.constexpr, ADAPTER: tl.constexpr, T_PARTS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """[K] scores of a row's tokens [K] from sums in fp32, each with the same bits wherever it stands; `wanted` [K] bool.

    x_ptr: the row, H hidden states and then T_PARTS parts of an adapter's R activations; the operands of w (V, H) are
    rounded to COMPUTE, those of lora (V, R) to ADAPTER, or lora_ptr is None.
    """
    K: tl.constexpr = tokens.shape[0]
    acc = tl.zeros((K, BLOCK_H), tl.float32)
    for start in range(0, H, BLOCK_H):
        offs = (start + tl.arange(0, BLOCK_H))[None, :]
        x = tl.load(x_ptr + offs, mask=offs < H, other=0.0).to(tl.float32)
        mask = wanted[:, None] & (offs < H)
        acc += x * tl.load(w_ptr + tokens[:, None] * stride_wv + offs, mask=mask, other=0.0).to(COMPUTE).to(tl.float32)
    if lora_ptr is not None:
        for start in range(0, R, BLOCK_H):
            offs = (start + tl.arange(0, BLOCK_H))[None, :]
            mask = wanted[:, None] & (offs < R)
            b = tl.load(lora_ptr + tokens[:, None] * stride_lora + offs, mask=mask, other=0.0)
            for part in tl.static_range(T_PARTS):
                t = tl.load(x_ptr + H + part * R + offs, mask=offs < R, other=0.0).to(tl.float32)
                acc += t * b.to(ADAPTER).to(tl.float32)
    product = tl.sum(acc, 1)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + tokens, mask=wanted, other=0.0).to(tl.float32)
    return scores_of(product, unit, logit_scale, parameter, CURVE)


@triton.jit
def best_tokens(maxima_ptr, columns_ptr, tiles, EXACT: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of a row's EXACT highest tiles, the higher first and of equals the first: the best token [K] and its score [K], which
    is -inf from where there are no more."""
    ks = tl.arange(0, K)
    tokens = tl.zeros((K,), tl.int64)
    scores = tl.full((K,), float("-inf"), tl.float32)
    last = float("inf")
    tile = -1
    for k in range(0, EXACT):
        best = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        at = tl.zeros((BLOCK_T,), tl.int32) + tiles
        for start in range(0, tiles, BLOCK_T):
            offs = start + tl.arange(0, BLOCK_T)
            m = tl.load(maxima_ptr + offs, mask=offs < tiles, other=float("-inf"))
            better = ((m < last) | ((m == last) & (offs > tile))) & (m > best)
            best = tl.where(better, m, best)
            at = tl.where(better, offs, at)
        last = tl.max(best, 0)
        tile = tl.min(tl.where(best == last, at, tiles), 0)
        column = tl.load(columns_ptr + tile, mask=tile < tiles, other=0.0).to(tl.int64)
        tokens = tl.where(ks == k, column, tokens)
        scores = tl.where(ks == k, last, scores)
    return tokens, scores
