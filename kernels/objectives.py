"""Twins of the token-level objectives, for the finish kernel to go on to the loss without leaving the device.

A surrogate maps scalars (logprob, old, advantage, a, b, c) to (loss, dloss / dlogprob); a, b, c are its options in the
order of its `Twin`. A KL estimator maps (logprob, ref) to (kl, dkl / dlogprob). The formulas and their sources are those of
`fused_rlhf.objectives`, to which the tests hold these equal in value and in gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    return logprob - ref, 1.0


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
