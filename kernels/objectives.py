"""Twins of the objectives, to go on to the loss without leaving the device.

At token level the finish kernel calls them; at sequence level `sequence_kernel` does, a program per sequence, with the
mean of logprob - old as the log-prob and 0 as the old one, so that with r the sequence's ratio and n its tokens

    dloss / dlogprob[t] = 1/n sum_s w[s] dsurrogate(log r, A[s]) / dlog r + w[t] beta dkl[t]

A surrogate maps scalars (logprob, old, advantage, a, b, c) to (loss, dloss / dlogprob); a, b, c are its options in the
order of its `Twin`. A KL estimator maps (logprob, ref) to (kl, dkl / dlogprob). Formulas and sources are those of
`fused_rlhf.objectives`, to which the tests hold these equal in value and in gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_rlhf.kernels.interface import BoundObjective
from fused_rlhf.kernels.primitives import LOG2E, expm1


@dataclass(frozen=True)
class Twin:
    function: Any
    options: tuple[str, ...] = ()
    when_none: float = math.inf  # what an option of None means


@triton.jit
def ppo_clip(logprob, old, advantage, epsilon_low, epsilon_high, delta):
    ratio = tl.exp2((logprob - old) * LOG2E)
    low = 1 - epsilon_low
    high = 1 + epsilon_high
    capped = tl.minimum(ratio, delta) * advantage
    clipped = tl.minimum(tl.maximum(ratio, low), high) * advantage
    in_cap = (ratio <= delta).to(tl.float32)
    in_clip = ((ratio >= low) & (ratio <= high)).to(tl.float32)
    # Where both are equal the minimum's gradient is their mean, as in torch.
    active = tl.where(capped < clipped, in_cap, tl.where(clipped < capped, in_clip, 0.5 * (in_cap + in_clip)))
    # A NaN stays one: the comparisons above would lose it.
    return -tl.where(capped < clipped, capped, clipped) + 0 * ratio, -active * ratio * advantage


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


SURROGATES: dict[str, Twin] = {"ppo_clip": Twin(ppo_clip, ("epsilon_low", "epsilon_high", "delta"))}
KL_ESTIMATORS: dict[str, Any] = {"k1": k1, "k2": k2, "k3": k3}


def has_entropy_term(objective: BoundObjective) -> bool:
    return isinstance(objective.entropy_weight, Tensor) or objective.entropy_weight != 0.0


def has_twin(objective: BoundObjective) -> bool:
    """Whether the finish kernel can compute this objective; otherwise it is called on the log-probs."""
    known = objective.surrogate in SURROGATES and objective.kl in ("", *KL_ESTIMATORS)
    return known and not has_entropy_term(objective)


def options_of(objective: BoundObjective) -> tuple[float, float, float]:
    """The surrogate's options in its twin's order, padded to three."""
    twin = SURROGATES[objective.surrogate]
    given = [objective.options[name] for name in twin.options]
    values = [twin.when_none if value is None else float(value) for value in given]
    a, b, c = (values + [0.0] * 3)[:3]
    return a, b, c


@triton.jit
def sequence_kernel(
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
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,  # a KL estimator, or None
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    start = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    count = (end - start).to(tl.float32)

    log_ratio = 0.0
    if old_ptr is not None:
        total = tl.zeros((BLOCK,), tl.float32)
        for at in range(start, end, BLOCK):
            offs = at + tl.arange(0, BLOCK)
            mask = offs < end
            total += tl.load(logprobs_ptr + offs, mask=mask, other=0.0) - tl.load(old_ptr + offs, mask=mask, other=0.0)
        log_ratio = tl.sum(total, 0) / count

    pull = tl.zeros((BLOCK,), tl.float32)
    for at in range(start, end, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        mask = offs < end
        weight = tl.load(token_weights_ptr + offs, mask=mask, other=0.0)
        advantage = tl.load(advantages_ptr + offs, mask=mask, other=0.0)
        ratio_log = tl.zeros((BLOCK,), tl.float32) + log_ratio
        loss, slope = SURROGATE(ratio_log, 0.0, advantage, option_a, option_b, option_c)
        pull += weight * slope
        if KL is not None:
            kl, _ = KL(
                tl.load(logprobs_ptr + offs, mask=mask, other=0.0), tl.load(ref_ptr + offs, mask=mask, other=0.0)
            )
            loss += beta * kl
        tl.store(loss_ptr + offs, weight * loss, mask=mask)

    shared = tl.sum(pull, 0) / count
    for at in range(start, end, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        mask = offs < end
        slope = tl.zeros((BLOCK,), tl.float32) + shared
        if KL is not None:
            weight = tl.load(token_weights_ptr + offs, mask=mask, other=0.0)
            _, by_kl = KL(
                tl.load(logprobs_ptr + offs, mask=mask, other=0.0), tl.load(ref_ptr + offs, mask=mask, other=0.0)
            )
            slope += weight * beta * by_kl
        tl.store(slope_ptr + offs, slope, mask=mask)


def launch_sequences(objective: BoundObjective, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and dloss / dlogprob, (N,) each, of a sequence-level objective that has a twin."""
    assert objective.offsets is not None
    loss, slope = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    sequence_kernel[(len(objective.offsets) - 1,)](
        logprobs,
        objective.old_logprobs,
        objective.ref_logprobs if objective.kl else None,
        objective.advantages,
        objective.token_weights,
        objective.offsets,
        loss,
        slope,
        float(objective.beta),
        *options_of(objective),
        SURROGATE=SURROGATES[objective.surrogate].function,
        KL=KL_ESTIMATORS[objective.kl] if objective.kl else None,
        BLOCK=1024,
        num_warps=4,
    )
    return loss, slope
