"""Metrics of policy and preference objectives: masked means of the N active tokens, 0-d, without a host sync.

What every surrogate has is in `policy_metrics`; what is one surrogate's own is registered with `metrics_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.objectives import reductions
from fused_rlhf.objectives.policy import BoundPolicyLoss
from fused_rlhf.objectives.preference import BoundPreferenceLoss
from fused_rlhf.objectives.preference_losses import PREFERENCES, alpha_reward
from fused_rlhf.objectives.reductions import Metric, Metrics
from fused_rlhf.objectives.surrogates import k2, vespo_phi
from fused_rlhf.segments import Sequences, precise


@dataclass(frozen=True)
class Reduce:
    """Masked means over N tokens, or over S sequences where a sequence has one value. 0-d, no host sync."""

    sequences: Sequences
    per_sequence: bool

    def tokens(self, values: Tensor) -> Metric:
        return reductions.mean(_mean(values), values.numel())

    def first(self, values: Tensor, empty: float = 0.0) -> Tensor:
        """(S,) the value at each sequence's first token."""
        if values.numel() == 0:
            return values.new_full((self.sequences.count,), empty)
        at = self.sequences.offsets[:-1].clamp(max=values.numel() - 1)
        return values[at].masked_fill(self.sequences.empty, empty)

    def over_sequences(self, values: Tensor, empty: float = 0.0) -> Metric:
        return reductions.mean(_mean(self.first(values, empty)), self.sequences.count)

    def mean(self, values: Tensor) -> Metric:
        return self.over_sequences(values) if self.per_sequence else self.tokens(values)

    def min(self, values: Tensor) -> Metric:
        """The least of the sequences' means; 0 where there are no tokens."""
        return reductions.least(self._extreme(values, math.inf, torch.amin), values.numel())

    def max(self, values: Tensor) -> Metric:
        return reductions.most(self._extreme(values, -math.inf, torch.amax), values.numel())

    def _extreme(self, values: Tensor, empty: float, extreme: Callable[[Tensor], Tensor]) -> Tensor:
        if values.numel() == 0:
            return values.new_zeros(())
        if self.per_sequence:
            return extreme(self.first(values))
        return extreme(self.sequences.mean(values).masked_fill(self.sequences.empty, empty))


def _mean(values: Tensor) -> Tensor:
    """0 of none."""
    return values.mean() if values.numel() else values.sum()


METRICS: dict[str, Callable[[BoundPolicyLoss, Tensor, Tensor, Tensor, Reduce], dict[str, Metric]]] = {}


def metrics_of(*surrogates: str) -> Callable[[Any], Any]:
    """Registers `f(bound, logprobs, old, ratio, reduce) -> {name: Metric}` for these surrogates."""

    def register(function: Any) -> Any:
        METRICS.update(dict.fromkeys(surrogates, function))
        return function

    return register


@metrics_of("ppo_clip", "clip_cov")
def clip_ratios(
    bound: BoundPolicyLoss, logprobs: Tensor, old: Tensor, ratio: Tensor, reduce: Reduce
) -> dict[str, Metric]:
    delta = bound.options.get("delta")
    ratio = ratio if delta is None else ratio.clamp(max=delta)
    return _clipped(bound, ratio < 1 - bound.options["epsilon_low"], ratio > 1 + bound.options["epsilon_high"], reduce)


@metrics_of("gmpo")
def log_clip_ratios(
    bound: BoundPolicyLoss, logprobs: Tensor, old: Tensor, ratio: Tensor, reduce: Reduce
) -> dict[str, Metric]:
    log_ratio = logprobs - old
    return _clipped(bound, log_ratio < -bound.options["epsilon_low"], log_ratio > bound.options["epsilon_high"], reduce)


def _clipped(bound: BoundPolicyLoss, below: Tensor, above: Tensor, reduce: Reduce) -> dict[str, Metric]:
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
) -> dict[str, Metric]:
    clipped = (ratio > bound.options["ratio_max"]) & (bound.advantages > 0)
    return {"cispo_clip_ratio": reduce.mean(clipped.to(ratio.dtype))}


@metrics_of("vespo")
def phi_mean(bound: BoundPolicyLoss, logprobs: Tensor, old: Tensor, ratio: Tensor, reduce: Reduce) -> dict[str, Metric]:
    phi = vespo_phi(logprobs, old, bound.advantages, bound.batch, **bound.options)  # type: ignore[arg-type]
    return {"phi_mean": reduce.over_sequences(phi, empty=1.0) if bound.advantages_per_sequence else reduce.tokens(phi)}


@torch.no_grad()
def policy_metrics(
    bound: BoundPolicyLoss,
    logprobs: Tensor,
    entropy: Tensor | None,
    full: Tensor | None = None,
    added: Tensor | None = None,
) -> Metrics:
    """Means over the N active tokens, as 0-d tensors (no host sync); zero when there are none.

    ratio_mean, ratio_var: of the objective's ratio. approx_kl: (logprob - old)^2 / 2. clip_ratio/low_mean: share with
    A < 0 below 1 - epsilon_low; high_mean: with A > 0 above 1 + epsilon_high; region_mean: either; low_min, high_max:
    the extremes of the sequences' means. At sequence level, with one advantage a sequence, these are means over all
    sequences. kl: of the objective's estimator. entropy: when it was computed.

    Where the log-probs are those of a sampler's kept sets: untruncated/ratio_mean, with `full`, the log-probs of the whole
    vocabulary, in their place, and untruncated/ratio_difference, what the truncation makes up for: the mean of token by
    token exp(logprob - old) less that. targets_added: how many targets were not in the sets that were found.
    """
    rows = slice(0, logprobs.numel())
    old = bound.compared(rows, logprobs)
    ratio = (logprobs - old).exp()
    reduce = Reduce(bound.batch.sequences, bound.per_sequence)
    mean = reduce.tokens(ratio)
    variance = reduce.tokens((ratio - mean.value).square())
    before = logprobs if bound.old_logprobs is None else bound.old_logprobs
    metrics = {
        "ratio_mean": mean,
        "ratio_var": reductions.spread(variance.value, mean.value, variance.weight),
        "approx_kl": reduce.tokens(k2(logprobs, before)),
    }
    if bound.surrogate in METRICS:
        metrics |= METRICS[bound.surrogate](bound, logprobs, old, ratio, reduce)
    if bound.ref_logprobs is not None:
        metrics["kl"] = reduce.tokens(bound.kl_term(rows, logprobs, old, full))
    if entropy is not None:
        metrics["entropy"] = reduce.tokens(entropy)
    if full is not None:
        untruncated = (full - before).exp()
        metrics["untruncated/ratio_mean"] = reduce.tokens(untruncated)
        metrics["untruncated/ratio_difference"] = reduce.tokens((logprobs - before).exp() - untruncated)
    if added is not None:
        metrics["targets_added"] = reductions.total(added.sum().to(logprobs.dtype))
    return Metrics(metrics)


@torch.no_grad()
def preference_metrics(
    bound: BoundPreferenceLoss,
    logprobs: Tensor,
    entropy: Tensor | None = None,
    mean_logit: Tensor | None = None,
    is_top1: Tensor | None = None,
    full: Tensor | None = None,
    added: Tensor | None = None,
) -> Metrics:
    """Means over pairs and active tokens, 0-d, no host sync; zero when there are none.

    rewards/{chosen, rejected}: beta times the log-ratio (beta times the log-prob without a reference), unweighted;
    rewards/{margins, accuracies} of pairs; logps/{chosen, rejected}: both of mean log-probs where the (first) loss is,
    as simpo and orpo, and the rewards under alpha AlphaPO's; nll: over the chosen tokens. Where the statistics
    are given: entropy over all tokens, logits/{chosen, rejected} (mean logit), mean_token_accuracy of chosen tokens.
    Where the log-probs are those of a sampler's kept sets, `full` are those of the whole vocabulary, which are compared
    with a reference; targets_added as in `policy_metrics`. Combined over calls, the margin of unpaired completions is a
    mean by the number of chosen ones.
    """
    sequences, paired = bound.sequences, bound.objective.paired
    total = bound.total(precise(logprobs))
    if PREFERENCES[bound.losses[0]].averaged:
        total = total / sequences.divisors
    against = total
    if bound.ref_sums is not None:
        against = (total if full is None else bound.total(precise(full))) - bound.ref_sums
    reward = bound.beta * alpha_reward(against, bound.options.get("alpha") or 0.0)
    if bound.labels is None:
        half = sequences.count // 2
        chosen = torch.arange(sequences.count, device=total.device) < half
    else:
        chosen = bound.labels

    def mean(values: Tensor, keep: Tensor) -> Metric:
        return reductions.ratio(torch.where(keep, values, torch.zeros_like(values)).sum(), keep.sum())

    metrics: dict[str, Metric] = {}
    for side, keep in (("chosen", chosen), ("rejected", ~chosen)):
        metrics[f"rewards/{side}"] = mean(reward, keep)
        metrics[f"logps/{side}"] = mean(total, keep)
        if mean_logit is not None:
            metrics[f"logits/{side}"] = mean(mean_logit, sequences.spread(keep))
    of_chosen = metrics["rewards/chosen"]
    margin = of_chosen.value - metrics["rewards/rejected"].value
    metrics["rewards/margins"] = reductions.mean(margin, of_chosen.weight)
    if paired:
        c, r = reward.chunk(2)
        metrics["rewards/accuracies"] = reductions.ratio((c > r).to(reward.dtype).sum(), c.numel())
    metrics["nll"] = mean(-logprobs, sequences.spread(chosen))
    if entropy is not None:
        metrics["entropy"] = reductions.ratio(entropy.sum(), entropy.numel())
    if is_top1 is not None:
        metrics["mean_token_accuracy"] = mean(is_top1.to(logprobs.dtype), sequences.spread(chosen))
    if not paired:
        kl = reward.new_zeros(()) if bound.kl is None else bound.kl
        metrics["kl"] = reductions.mean(kl, sequences.count)
    if added is not None:
        metrics["targets_added"] = reductions.total(added.sum().to(reward.dtype))
    return Metrics({name: m._replace(value=m.value.to(logprobs.dtype)) for name, m in metrics.items()})
