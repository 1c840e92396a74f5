"""Twins of the objectives, to go on to the loss without leaving the device.

A surrogate maps (logprob, log_ratio, advantage, a, b, c, d) to (loss, dloss / dlogprob, dloss / dlog_ratio), a KL
estimator (logprob, ref) to (kl, dkl / dlogprob); a to d are the surrogate's options in the order of its `Twin`. In one
pass the finish kernel calls them, a program per token. Otherwise `policy_kernel` does, a program per sequence, with
log r = logprob - old at token level and else one log r for the n tokens of a sequence, their mean of it (its sum at
"sequence_sum"), so that

    dloss / dlogprob[t] = w[t] (dsurrogate/dlogprob + beta dkl[t]) + 1/n sum_s w[s] dsurrogate[s]/dlog r

(without 1/n; at "sequence_token" with w[t] dsurrogate[t]/dlog r for the last term).

A preference maps (u_chosen, u_rejected, n_chosen, n_rejected, beta, a) to (loss, dloss / du_chosen, dloss / du_rejected),
where u = sum_t w[t] logprob[t] - ref sums a completion of n tokens, n at least 1; `pair_kernel` takes a program per pair.

Formulas and sources are those of `fused_rlhf.objectives` and `fused_rlhf.preferences`, to which the tests hold these
equal in value and in gradient: at ties it is the mean of both sides, and a NaN stays one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_rlhf.kernels.interface import BoundObjective, BoundPolicy, BoundPreference
from fused_rlhf.kernels.primitives import LOG2E, expm1, log_sigmoid

ALL = tl.constexpr(tl.PropagateNan.ALL)


@dataclass(frozen=True)
class Twin:
    function: Any
    options: dict[str, float] = field(default_factory=dict)  # in the order of a, b ...: what each means when None


@triton.jit
def ppo_clip(logprob, log_ratio, advantage, epsilon_low, epsilon_high, delta, dual_clip):
    ratio = tl.exp2(log_ratio * LOG2E)
    low = 1 - epsilon_low
    high = 1 + epsilon_high
    capped = tl.minimum(ratio, delta, propagate_nan=ALL) * advantage
    clipped = tl.clamp(ratio, low, high, propagate_nan=ALL) * advantage
    in_cap = (ratio <= delta).to(tl.float32)
    in_clip = ((ratio >= low) & (ratio <= high)).to(tl.float32)
    active = tl.where(capped < clipped, in_cap, tl.where(clipped < capped, in_clip, 0.5 * (in_cap + in_clip)))
    loss = -tl.minimum(capped, clipped, propagate_nan=ALL)
    most = tl.where(advantage < 0, -dual_clip * advantage, float("inf"))
    active *= tl.where(loss < most, 1.0, tl.where(loss > most, 0.0, 0.5))
    return tl.minimum(loss, most, propagate_nan=ALL), 0.0, -active * ratio * advantage


@triton.jit
def cispo(logprob, log_ratio, advantage, ratio_max, ratio_min, c, d):
    weight = tl.clamp(tl.exp2(log_ratio * LOG2E), ratio_min, ratio_max, propagate_nan=ALL)
    return -weight * advantage * logprob, -weight * advantage, 0.0


@triton.jit
def sapo(logprob, log_ratio, advantage, tau_pos, tau_neg, c, d):
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    scale = tl.where(advantage > 0, 4 / tau_pos, 4 / tau_neg) * advantage
    ratio = tl.exp2(log_ratio * LOG2E)
    gate = tl.sigmoid(tau * (ratio - 1))
    return -scale * gate, 0.0, -4 * gate * tl.sigmoid(tau * (1 - ratio)) * ratio * advantage


@triton.jit
def reinforce(logprob, log_ratio, advantage, a, b, c, d):
    return -advantage * logprob, -advantage, 0.0


@triton.jit
def k1(logprob, ref):
    return logprob - ref, 1.0 + 0 * logprob


@triton.jit
def k2(logprob, ref):
    distance = logprob - ref
    return 0.5 * distance * distance, distance


@triton.jit
def k3(logprob, ref):
    distance = ref - logprob
    growth = expm1(distance)
    return growth - distance, -growth


@triton.jit
def k3_plus(logprob, ref):
    value, _ = k3(logprob, ref)
    return value, logprob - ref


@triton.jit
def sigmoid(chosen, rejected, n_chosen, n_rejected, beta, label_smoothing):
    logit = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * log_sigmoid(logit) - label_smoothing * log_sigmoid(-logit)
    slope = beta * (label_smoothing * tl.sigmoid(logit) - (1 - label_smoothing) * tl.sigmoid(-logit))
    return loss, slope, -slope


@triton.jit
def hinge(chosen, rejected, n_chosen, n_rejected, beta, a):
    short = 1 - beta * (chosen - rejected)
    slope = tl.where(short <= 0, 0.0, -beta)
    return tl.maximum(short, 0.0, propagate_nan=ALL), slope, -slope


@triton.jit
def ipo(chosen, rejected, n_chosen, n_rejected, beta, a):
    off = chosen / n_chosen - rejected / n_rejected - 1 / (2 * beta)
    return off * off, 2 * off / n_chosen, -2 * off / n_rejected


SURROGATES: dict[str, Twin] = {
    "ppo_clip": Twin(ppo_clip, dict.fromkeys(("epsilon_low", "epsilon_high", "delta", "dual_clip"), math.inf)),
    "cispo": Twin(cispo, {"ratio_max": math.inf, "ratio_min": 0.0}),
    "sapo": Twin(sapo, {"tau_pos": 1.0, "tau_neg": 1.0}),
    "reinforce": Twin(reinforce),
}
KL_ESTIMATORS: dict[str, Any] = {"k1": k1, "k2": k2, "k3": k3, "k3+": k3_plus}
PREFERENCES: dict[str, Twin] = {
    "sigmoid": Twin(sigmoid, {"label_smoothing": 0.0}),
    "hinge": Twin(hinge),
    "ipo": Twin(ipo),
}


def has_twin(objective: BoundObjective) -> bool:
    """Whether the kernels can compute this objective; otherwise it is called on the log-probs."""
    if isinstance(objective, BoundPreference):
        return objective.plain and all(name in PREFERENCES for name in objective.losses)
    if isinstance(objective, BoundPolicy):
        known = objective.surrogate in SURROGATES and objective.kl in ("", *KL_ESTIMATORS)
        return objective.plain and known and not objective.needs_entropy
    return False


def options_of(twin: Twin, given: Mapping[str, float | None], count: int = 4) -> list[float]:
    """The options in the twin's order, `count` of them."""
    values = [when_none if (value := given.get(name)) is None else value for name, when_none in twin.options.items()]
    return [float(value) for value in (values + [0.0] * count)[:count]]


@triton.jit
def policy_kernel(
    logprobs_ptr,  # (N,) fp32, as all vectors here
    old_ptr,  # or None: old = logprob
    ref_ptr,
    advantages_ptr,
    token_weights_ptr,
    offsets_ptr,  # (S + 1,) int64
    loss_ptr,
    slope_ptr,  # dloss / dlogprob
    beta,
    option_a,
    option_b,
    option_c,
    option_d,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,  # a KL estimator, or None
    LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SHARED: tl.constexpr = LEVEL == "sequence" or LEVEL == "sequence_sum"
    sequence = tl.program_id(0)
    start = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    count = 1.0
    if LEVEL != "sequence_sum":
        count = tl.maximum(end - start, 1).to(tl.float32)

    if LEVEL != "token":
        total = tl.zeros((BLOCK,), tl.float32)
        for at in range(start, end, BLOCK):
            offs = at + tl.arange(0, BLOCK)
            logprob = tl.load(logprobs_ptr + offs, mask=offs < end, other=0.0)
            old = logprob
            if old_ptr is not None:
                old = tl.load(old_ptr + offs, mask=offs < end, other=0.0)
            total += logprob - old
        of_sequence = tl.sum(total, 0) / count

    pull = tl.zeros((BLOCK,), tl.float32)
    for at in range(start, end, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        mask = offs < end
        logprob = tl.load(logprobs_ptr + offs, mask=mask, other=0.0)
        if LEVEL == "token":
            old = logprob
            if old_ptr is not None:
                old = tl.load(old_ptr + offs, mask=mask, other=0.0)
            log_ratio = logprob - old
        else:
            log_ratio = tl.zeros((BLOCK,), tl.float32) + of_sequence
        weight = tl.load(token_weights_ptr + offs, mask=mask, other=0.0)
        advantage = tl.load(advantages_ptr + offs, mask=mask, other=0.0)
        loss, slope, by_ratio = SURROGATE(logprob, log_ratio, advantage, option_a, option_b, option_c, option_d)
        if KL is not None:
            kl, by_kl = KL(logprob, tl.load(ref_ptr + offs, mask=mask, other=0.0))
            loss += beta * kl
            slope += beta * by_kl
        if SHARED:
            pull += weight * by_ratio
        else:
            slope += by_ratio
        tl.store(loss_ptr + offs, weight * loss, mask=mask)
        tl.store(slope_ptr + offs, weight * slope, mask=mask)

    if SHARED:
        shared = tl.sum(pull, 0) / count
        tl.debug_barrier()  # the slopes stored above are read again
        for at in range(start, end, BLOCK):
            offs = at + tl.arange(0, BLOCK)
            mask = offs < end
            tl.store(slope_ptr + offs, tl.load(slope_ptr + offs, mask=mask, other=0.0) + shared, mask=mask)


def launch_policy(objective: BoundPolicy, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and dloss / dlogprob, (N,) each, of an objective that has a twin."""
    loss, slope = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    twin = SURROGATES[objective.surrogate]
    policy_kernel[(len(objective.offsets) - 1,)](
        logprobs, objective.old_logprobs, objective.ref_logprobs if objective.kl else None, objective.advantages,
        objective.token_weights, objective.offsets, loss, slope, float(objective.beta),
        *options_of(twin, objective.options), SURROGATE=twin.function,
        KL=KL_ESTIMATORS[objective.kl] if objective.kl else None, LEVEL=objective.level, BLOCK=1024, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return loss, slope


@triton.jit
def completion_score(logprobs_ptr, token_weights_ptr, ref_sums_ptr, offsets_ptr, sequence, BLOCK: tl.constexpr):
    """u of a completion, and its tokens. Summed in fp64: over thousands of tokens both sums are large, u is not."""
    start = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(start, end, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        part = tl.load(logprobs_ptr + offs, mask=offs < end, other=0.0).to(tl.float64)
        if token_weights_ptr is not None:
            part *= tl.load(token_weights_ptr + offs, mask=offs < end, other=0.0)
        total += part
    score = tl.sum(total, 0)
    if ref_sums_ptr is not None:
        score -= tl.load(ref_sums_ptr + sequence)
    return score.to(tl.float32), tl.maximum(end - start, 1).to(tl.float32)


@triton.jit
def store_slopes(slope_ptr, token_weights_ptr, offsets_ptr, sequence, slope, BLOCK: tl.constexpr):
    end = tl.load(offsets_ptr + sequence + 1)
    for at in range(tl.load(offsets_ptr + sequence), end, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        of_token = tl.zeros((BLOCK,), tl.float32) + slope
        if token_weights_ptr is not None:
            of_token *= tl.load(token_weights_ptr + offs, mask=offs < end, other=0.0)
        tl.store(slope_ptr + offs, of_token, mask=offs < end)


@triton.jit
def pair_kernel(
    logprobs_ptr,  # (N,) fp32
    token_weights_ptr,  # (N,) fp32, or None: 1
    ref_sums_ptr,  # (2 P,) fp64, or None: 0
    offsets_ptr,  # (2 P + 1,) int64: the chosen completions, then the rejected ones
    loss_ptr,  # (P,)
    slope_ptr,  # (N,) dloss / dlogprob
    weight,
    beta,
    option_a,
    PREFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    other = tl.num_programs(0) + pair
    chosen, n_chosen = completion_score(logprobs_ptr, token_weights_ptr, ref_sums_ptr, offsets_ptr, pair, BLOCK)
    rejected, n_rejected = completion_score(logprobs_ptr, token_weights_ptr, ref_sums_ptr, offsets_ptr, other, BLOCK)
    loss, by_chosen, by_rejected = PREFERENCE(chosen, rejected, n_chosen, n_rejected, beta, option_a)
    tl.store(loss_ptr + pair, weight * loss)
    store_slopes(slope_ptr, token_weights_ptr, offsets_ptr, pair, weight * by_chosen, BLOCK)
    store_slopes(slope_ptr, token_weights_ptr, offsets_ptr, other, weight * by_rejected, BLOCK)


def launch_pairs(objective: BoundPreference, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (P,) and dloss / dlogprob (N,) of an objective that has twins; one launch for each of its losses."""
    pairs = len(objective.offsets) // 2
    total, total_slope = logprobs.new_zeros(pairs), torch.zeros_like(logprobs)
    for name, weight in zip(objective.losses, objective.weights):
        twin = PREFERENCES[name]
        loss, slope = logprobs.new_empty(pairs), torch.empty_like(logprobs)
        pair_kernel[(pairs,)](
            logprobs, objective.token_weights, objective.ref_sums, objective.offsets, loss, slope, float(weight),
            float(objective.beta), *options_of(twin, objective.options, 1), PREFERENCE=twin.function, BLOCK=1024,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        total += loss
        total_slope += slope
    return total * objective.pair_weight, total_slope * objective.pair_weight
