"""Metrics of a policy objective: masked means of the N active tokens, as 0-d tensors, without a host sync.

What every surrogate has is in `policy_metrics`; what is one surrogate's own is registered with `metrics_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.objectives import BoundPolicyLoss, k2, vespo_phi
from fused_rlhf.segments import Sequences


@dataclass(frozen=True)
class Reduce:
    """Masked means over N tokens, or over S sequences where a sequence has one value. 0-d, no host sync."""

    sequences: Sequences
    per_sequence: bool

    def tokens(self, values: Tensor) -> Tensor:
        return values.sum() / max(values.numel(), 1)

    def first(self, values: Tensor, empty: float = 0.0) -> Tensor:
        """(S,) the value at each sequence's first token."""
        if values.numel() == 0:
            return values.new_full((self.sequences.count,), empty)
        at = self.sequences.offsets[:-1].clamp(max=values.numel() - 1)
        return values[at].masked_fill(self.sequences.lengths == 0, empty)

    def over_sequences(self, values: Tensor, empty: float = 0.0) -> Tensor:
        return self.first(values, empty).sum() / max(self.sequences.count, 1)

    def mean(self, values: Tensor) -> Tensor:
        return self.over_sequences(values) if self.per_sequence else self.tokens(values)

    def min(self, values: Tensor) -> Tensor:
        """The least of the sequences' means; 0 where there are no tokens."""
        return self._extreme(values, math.inf).min()

    def max(self, values: Tensor) -> Tensor:
        return self._extreme(values, -math.inf).max()

    def _extreme(self, values: Tensor, empty: float) -> Tensor:
        without = self.sequences.lengths == 0
        means = self.first(values) if self.per_sequence else self.sequences.mean(values).masked_fill(without, empty)
        none = without.all()
        return torch.cat([means, means.new_full((1,), empty)]).masked_fill(none, 0.0)


METRICS: dict[str, Callable[[BoundPolicyLoss, Tensor, Tensor, Tensor, Reduce], dict[str, Tensor]]] = {}


def metrics_of(*surrogates: str) -> Callable[[Any], Any]:
    """Registers `f(bound, logprobs, old, ratio, reduce) -> metrics` for these surrogates."""

    def register(function: Any) -> Any:
        METRICS.update(dict.fromkeys(surrogates, function))
        return function

    return register


@metrics_of("ppo_clip", "clip_cov")
def clip_ratios(
    bound: BoundPolicyLoss, logprobs: Tensor, old: Tensor, ratio: Tensor, reduce: Reduce
) -> dict[str, Tensor]:
    delta = bound.options.get("delta")
    ratio = ratio if delta is None else ratio.clamp(max=delta)
    return _clipped(bound, ratio < 1 - bound.options["epsilon_low"], ratio > 1 + bound.options["epsilon_high"], reduce)


@metrics_of("gmpo")
def log_clip_ratios(
    bound: BoundPolicyLoss, logprobs: Tensor, old: Tensor, ratio: Tensor, reduce: Reduce
) -> dict[str, Tensor]:
    log_ratio = logprobs - old
    return _clipped(bound, log_ratio < -bound.options["epsilon_low"], log_ratio > bound.options["epsilon_high"], reduce)


def _clipped(bound: BoundPolicyLoss, below: Tensor, above: Tensor, reduce: Reduce) -> dict[str, Tensor]:
    low = (below & (bound.advantages < 0)).to(bound.advantages.dtype)
    high = (above & (bound.advantages > 0)).to(bound.advantages.dtype)
    return {
        "clip_ratio/low_mean": reduce.mean(low),
        "clip_ratio/low_min": reduce.min(low),
        "clip_ratio/high_mean": reduce.mean(high),
        "clip_ratio/high_max": reduce.max(high),
        "clip_ratio/region_mean": reduce.mean(low + high),
    }


@metrics_of("cispo")
def cispo_clip_ratio(
    bound: BoundPolicyLoss, logprobs: Tensor, old: Tensor, ratio: Tensor, reduce: Reduce
) -> dict[str, Tensor]:
    clipped = (ratio > bound.options["ratio_max"]) & (bound.advantages > 0)
    return {"cispo_clip_ratio": reduce.mean(clipped.to(ratio.dtype))}


@metrics_of("vespo")
def phi_mean(bound: BoundPolicyLoss, logprobs: Tensor, old: Tensor, ratio: Tensor, reduce: Reduce) -> dict[str, Tensor]:
    phi = vespo_phi(logprobs, old, bound.advantages, bound.batch, **bound.options)  # type: ignore[arg-type]
    return {"phi_mean": reduce.over_sequences(phi, empty=1.0) if bound.advantages_per_sequence else reduce.tokens(phi)}


@torch.no_grad()
def policy_metrics(bound: BoundPolicyLoss, logprobs: Tensor, entropy: Tensor | None) -> dict[str, Tensor]:
    """Means over the N active tokens, as 0-d tensors (no host sync); zero when there are none.

    ratio_mean, ratio_var: of the objective's ratio. approx_kl: (logprob - old)^2 / 2. clip_ratio/low_mean: share with
    A < 0 below 1 - epsilon_low; high_mean: with A > 0 above 1 + epsilon_high; region_mean: either; low_min, high_max:
    the extremes of the sequences' means. At sequence level, with one advantage a sequence, these are means over all
    sequences. kl: of the objective's estimator. entropy: when it was computed.
    """
    rows = slice(0, logprobs.numel())
    old = bound.compared(rows, logprobs)
    ratio = (logprobs - old).exp()
    reduce = Reduce(bound.batch.sequences, bound.per_sequence)
    mean = reduce.tokens(ratio)
    before = logprobs if bound.old_logprobs is None else bound.old_logprobs
    metrics = {
        "ratio_mean": mean,
        "ratio_var": reduce.tokens((ratio - mean).square()),
        "approx_kl": reduce.tokens(k2(logprobs, before)),
    }
    if bound.surrogate in METRICS:
        metrics |= METRICS[bound.surrogate](bound, logprobs, old, ratio, reduce)
    if bound.ref_logprobs is not None:
        metrics["kl"] = reduce.tokens(bound.kl_term(rows, logprobs, old))
    if entropy is not None:
        metrics["entropy"] = reduce.tokens(entropy)
    return metrics
