"""Policy objectives as three small tables: surrogates, KL estimators and token weights.

    loss = sum_t w_t (surrogate(logprob_t, old_t, A_t) + beta kl(logprob_t, ref_t)) - entropy_coef mean_t H_t

A surrogate or KL estimator maps (N,) fp32 vectors to (N,); a token weight reads the length of each token's sequence and
one global count, so that chunks, micro-batches and ranks cannot change the answer. At sequence level, log pi - log old
is first replaced by its mean over the sequence, so that a sequence has one ratio (GSPO, arXiv:2507.18071). A preset is
a constructor: `GRPO(beta=0.04)` is `PolicyLoss("ppo_clip", "sequence_mean", kl="k3", beta=0.04)`. Adding an objective
is one decorated function here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.kernels.interface import TokenGrads

LEVELS = ("token", "sequence")

SURROGATES: dict[str, Callable[..., Tensor]] = {}
KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
TOKEN_WEIGHTS: dict[str, Callable[..., Tensor]] = {}
PRESETS: dict[str, Callable[..., PolicyLoss]] = {}

Count = int | float | Tensor


def surrogate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Registers `f(logprob, old, advantage, *, options...) -> loss`, (N,) each; its keywords become options."""
    SURROGATES[function.__name__] = function
    return function


def kl_estimator(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Registers `f(logprob, ref) -> per-token KL estimate`, (N,) each."""
    KL_ESTIMATORS[function.__name__] = function
    return function


def token_weight(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Registers `f(lengths, num_sequences, num_tokens, *, options...) -> (N,)`; lengths (N,): of its sequence."""
    TOKEN_WEIGHTS[function.__name__] = function
    return function


@surrogate
def ppo_clip(
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
) -> Tensor:
    """-min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)   (arXiv:1707.06347; delta 2505.07291)"""
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    capped = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(capped * advantage, clipped * advantage)


@kl_estimator
def k1(logprob: Tensor, ref: Tensor) -> Tensor:
    """log pi - log ref   (Schulman, Approximating KL divergence)"""
    return logprob - ref


@kl_estimator
def k2(logprob: Tensor, ref: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2"""
    return 0.5 * (logprob - ref).square()


@kl_estimator
def k3(logprob: Tensor, ref: Tensor) -> Tensor:
    """exp(ref - lp) - (ref - lp) - 1, unbiased and never negative"""
    return torch.expm1(ref - logprob) - (ref - logprob)


@token_weight
def sequence_mean(lengths: Tensor, num_sequences: Count, num_tokens: Count) -> Tensor:
    """Mean over each sequence's tokens, then over sequences   (GRPO, arXiv:2402.03300)"""
    return 1.0 / (lengths * num_sequences)


@token_weight
def token_mean(lengths: Tensor, num_sequences: Count, num_tokens: Count) -> Tensor:
    """Mean over all active tokens of the global batch   (DAPO, arXiv:2503.14476)"""
    return torch.ones_like(lengths) / num_tokens


@token_weight
def fixed_length(
    lengths: Tensor, num_sequences: Count, num_tokens: Count, *, max_completion_length: int | None = None
) -> Tensor:
    """Sum over tokens divided by num_sequences x max_completion_length   (Dr. GRPO, arXiv:2503.20783)"""
    if max_completion_length is None:
        raise ValueError("max_completion_length must be given for the token weight 'fixed_length'")
    return torch.ones_like(lengths) / (num_sequences * max_completion_length)


def _keywords(function: Callable[..., Any]) -> set[str]:
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def _registered(argument: str, name: str, table: dict[str, Any]) -> None:
    if name not in table:
        raise ValueError(f"{argument} must be one of {sorted(table)}, got {name!r}")


@dataclass(frozen=True)
class PolicyLoss:
    """One policy objective, complete: which surrogate, weighted how, with what KL and entropy terms.

    Args:
        surrogate: a name in `SURROGATES`.
        token_weight: a name in `TOKEN_WEIGHTS`.
        kl: a name in `KL_ESTIMATORS`; used when beta is not 0.
        beta: weight of the KL to the reference, >= 0.
        entropy_coef: weight of the entropy bonus (mean over active tokens), subtracted from the loss.
        level: "token" or "sequence": what has a ratio of its own.
        options: keywords of the surrogate and the token weight.

    Raises:
        ValueError: an unknown name, a non-finite or negative number.
        TypeError: an option that neither the surrogate nor the token weight takes.
    """

    surrogate: str = "ppo_clip"
    token_weight: str = "sequence_mean"
    kl: str = "k3"
    beta: float = 0.0
    entropy_coef: float = 0.0
    level: str = "token"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _registered("surrogate", self.surrogate, SURROGATES)
        _registered("token_weight", self.token_weight, TOKEN_WEIGHTS)
        _registered("kl", self.kl, KL_ESTIMATORS)
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {list(LEVELS)}, got {self.level!r}")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"beta must be finite and >= 0, got {self.beta}")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be finite, got {self.entropy_coef}")
        allowed = _keywords(SURROGATES[self.surrogate]) | _keywords(TOKEN_WEIGHTS[self.token_weight])
        for name, value in self.options.items():
            if name not in allowed:
                raise TypeError(f"{name} is no option of {self.surrogate} with {self.token_weight}: {sorted(allowed)}")
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}")

    def _options_of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The keywords of `function`: given, or its own defaults."""
        parameters = inspect.signature(function).parameters
        return {name: self.options.get(name, parameters[name].default) for name in _keywords(function)}

    def bind(
        self,
        *,
        advantages: Tensor,
        lengths: Tensor,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None,
        num_sequences: Count,
        num_tokens: Count,
        offsets: Tensor | None = None,
    ) -> BoundPolicyLoss:
        """The objective over N real tokens with all but the log-probs known.

        Vectors are (N,), offsets (S + 1,) int64: where each of the S sequences starts, needed at sequence level; the
        counts are global.
        """
        if self.level == "sequence" and offsets is None:
            raise ValueError("offsets must be given at sequence level, got None")
        if self.beta != 0 and ref_logprobs is None:
            raise ValueError(f"ref_logprobs must be given when beta is not 0, got None with beta={self.beta}")
        weight = TOKEN_WEIGHTS[self.token_weight]
        return BoundPolicyLoss(
            surrogate=self.surrogate,
            kl=self.kl if self.beta != 0 else "",
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            advantages=advantages,
            token_weights=weight(lengths, num_sequences, num_tokens, **self._options_of(weight)),
            entropy_weight=self.entropy_coef / num_tokens if self.entropy_coef else 0.0,
            beta=self.beta,
            options=self._options_of(SURROGATES[self.surrogate]),
            offsets=offsets if self.level == "sequence" else None,
        )


@dataclass
class BoundPolicyLoss:
    """A `kernels.interface.BoundObjective`."""

    surrogate: str
    kl: str
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    advantages: Tensor
    token_weights: Tensor
    entropy_weight: Tensor | float
    beta: float
    options: dict[str, Any]
    offsets: Tensor | None

    def compared(self, rows: slice, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """What the surrogate compares, (n,) each: log-probs and old ones, or the sequences' mean difference and 0."""
        old = logprobs.detach() if self.old_logprobs is None else self.old_logprobs[rows]
        if self.offsets is None:
            return logprobs, old
        lengths = self.offsets.diff()
        sums = torch.segment_reduce(logprobs - old, "sum", lengths=lengths, unsafe=True)
        sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        mean = (sums / lengths.clamp(min=1))[sequence]
        return mean, torch.zeros_like(mean)

    @property
    def needs_entropy(self) -> bool:
        return isinstance(self.entropy_weight, Tensor) or self.entropy_weight != 0.0

    def per_token(self, rows: slice, logprobs: Tensor, entropy: Tensor | None) -> Tensor:
        """(n,) contributions to the loss, differentiable in logprobs and entropy."""
        loss = SURROGATES[self.surrogate](*self.compared(rows, logprobs), self.advantages[rows], **self.options)
        if self.kl:
            assert self.ref_logprobs is not None
            loss = loss + self.beta * KL_ESTIMATORS[self.kl](logprobs, self.ref_logprobs[rows])
        loss = self.token_weights[rows] * loss
        if self.needs_entropy:
            assert entropy is not None
            loss = loss - self.entropy_weight * entropy
        return loss

    def __call__(self, rows: slice, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
        with torch.enable_grad():
            lp = logprobs.detach().requires_grad_()
            h = entropy.detach().requires_grad_() if entropy is not None and self.needs_entropy else None
            loss = self.per_token(rows, lp, h)
            found = torch.autograd.grad(loss.sum(), [lp] if h is None else [lp, h])
        return loss.detach(), TokenGrads(found[0], None if h is None else found[1])


def preset(
    name: str, surrogate: str, token_weight: str, level: str = "token", **defaults: Any
) -> Callable[..., PolicyLoss]:
    """A constructor of `PolicyLoss`; keywords are its fields or options of the surrogate and the weight."""

    def construct(
        *, kl: str = "k3", beta: float = 0.0, entropy_coef: float = 0.0, level: str = level, **options: Any
    ) -> PolicyLoss:
        return PolicyLoss(surrogate, token_weight, kl, beta, entropy_coef, level, {**defaults, **options})

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: {surrogate}, {token_weight}, {level} level; {defaults or 'the defaults of both'}."
    PRESETS[name.lower()] = construct
    return construct


GRPO = preset("GRPO", "ppo_clip", "sequence_mean")
DAPO = preset("DAPO", "ppo_clip", "token_mean", epsilon_low=0.2, epsilon_high=0.28)
DrGRPO = preset("DrGRPO", "ppo_clip", "fixed_length")
GSPO = preset("GSPO", "ppo_clip", "sequence_mean", level="sequence", epsilon_low=3e-4, epsilon_high=4e-4)


@torch.no_grad()
def policy_metrics(bound: BoundPolicyLoss, logprobs: Tensor, entropy: Tensor | None) -> dict[str, Tensor]:
    """Means over the N active tokens, as 0-d tensors (no host sync); zero when there are none.

    ratio: exp(logprob - old), or of its mean over the sequence at sequence level. clip_ratio/low_mean: share of tokens
    with A < 0 below 1 - epsilon_low; high_mean: with A > 0 above 1 + epsilon_high; region_mean: either. kl: of the
    objective's estimator. entropy: when it was computed.
    """
    count = max(logprobs.numel(), 1)
    new, old = bound.compared(slice(0, logprobs.numel()), logprobs)
    ratio = (new - old).exp()
    metrics = {"ratio": ratio.sum() / count}
    if bound.surrogate == "ppo_clip":
        low = (ratio < 1 - bound.options["epsilon_low"]) & (bound.advantages < 0)
        high = (ratio > 1 + bound.options["epsilon_high"]) & (bound.advantages > 0)
        for key, clipped in (("low", low), ("high", high), ("region", low | high)):
            metrics[f"clip_ratio/{key}_mean"] = clipped.to(ratio.dtype).sum() / count
    if bound.ref_logprobs is not None:
        metrics["kl"] = KL_ESTIMATORS[bound.kl or "k3"](logprobs, bound.ref_logprobs).sum() / count
    if entropy is not None:
        metrics["entropy"] = entropy.sum() / count
    return metrics
