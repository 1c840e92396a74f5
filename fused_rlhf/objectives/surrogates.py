"""The three tables of policy objectives: surrogates, KL estimators and token weights.

A surrogate or KL estimator maps (N,) vectors to (N,); a token weight reads the length of each token's sequence and one
global count, so that chunks, micro-batches and ranks cannot change the answer. Adding one is one decorated function here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.segments import Sequences

SURROGATES: dict[str, Callable[..., Tensor]] = {}
KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
TOKEN_WEIGHTS: dict[str, Callable[..., Tensor]] = {}

Count = int | float | Tensor


@dataclass(frozen=True)
class Surroundings:
    """What a surrogate may know beyond a token: its fourth argument, where it takes one."""

    sequences: Sequences
    log_correction: Tensor | None  # (S,) sum of the log importance-sampling ratios, for those that correct themselves


def surrogate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Registers `f(logprob, old, advantage, *, options...) -> loss`, (N,) each; its keywords become options.

    One that looks beyond the token takes a `Surroundings` as its fourth argument, and all rows at once.
    """
    SURROGATES[function.__name__] = function
    return function


def kl_estimator(name: str) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Callable[[Tensor, Tensor], Tensor]]:
    """Registers `f(logprob, ref) -> per-token KL estimate`, (N,) each."""

    def register(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        KL_ESTIMATORS[name] = function
        return function

    return register


def token_weight(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Registers `f(lengths, num_sequences, num_tokens, *, options...) -> (N,)`; lengths (N,): of its sequence."""
    TOKEN_WEIGHTS[function.__name__] = function
    return function


def looks_beyond(surrogate: str) -> bool:
    return "batch" in inspect.signature(SURROGATES[surrogate]).parameters


def silent_at_zero(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a sequence whose advantage is 0 has neither loss nor gradient under a surrogate, nor a part in others'.

    By trial, so that it holds for any that is registered.
    """
    generator = torch.Generator().manual_seed(0)
    logprob, old = (-torch.rand(4, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    advantage = torch.tensor([0.0, 1.3, 0.0, -0.7], dtype=torch.float64)

    def tried(rows: list[int]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = logprob[rows].flatten().requires_grad_()
            own = [Surroundings(Sequences.of(torch.arange(len(rows)).repeat_interleave(8), len(rows)), None)]
            beyond = own if looks_beyond(name) else []
            given = old[rows].flatten(), advantage[rows].repeat_interleave(8)
            values = SURROGATES[name](x, *given, *beyond, **options)
            (gradient,) = torch.autograd.grad(values.sum(), x)
        return values.detach().view(-1, 8), gradient.view(-1, 8)

    whole, live = tried([0, 1, 2, 3]), tried([1, 3])
    zero = all(not x[[0, 2]].any() for x in whole)
    return zero and all(torch.allclose(x[[1, 3]], y) for x, y in zip(whole, live, strict=True))


# -------------------------------------------------------------------------------------------------------- surrogates


@surrogate
def ppo_clip(
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """-min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), at most -dual_clip A where A < 0

    (PPO arXiv:1707.06347; delta arXiv:2505.07291; dual clip arXiv:1912.09729)
    """
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    capped = ratio if delta is None else ratio.clamp(max=delta)
    loss = -torch.minimum(capped * advantage, clipped * advantage)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    return loss


@surrogate
def cispo(
    logprob: Tensor, old: Tensor, advantage: Tensor, *, ratio_max: float = 5.0, ratio_min: float | None = None
) -> Tensor:
    """-sg(clip(r, ratio_min, ratio_max)) A log pi   (MiniMax-M1, arXiv:2506.13585)"""
    weight = (logprob - old).detach().exp().clamp(min=ratio_min, max=ratio_max)
    return -weight * advantage * logprob


def _either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """torch.where of two numbers, in the dtype of `like` rather than the default one."""
    return torch.where(condition, torch.full_like(like, yes), torch.full_like(like, no))


@surrogate
def sapo(logprob: Tensor, old: Tensor, advantage: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A   (SAPO, arXiv:2511.20347)"""
    tau = _either(advantage > 0, tau_pos, tau_neg, advantage)
    return -4 / tau * torch.sigmoid(tau * ((logprob - old).exp() - 1)) * advantage


@surrogate
def vespo(
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    batch: Surroundings,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Tensor:
    """-phi(w) A log pi, log phi = lambda + k log w - lambda w, w the sequence's importance weight (no gradient)

    log w = sum_t clip(log pi - log old, +-20), plus the sampler's correction, clipped to [log 1e-8, 20]; k and lambda by
    the sign of A.   (VESPO, arXiv:2602.10693)
    """
    return -vespo_phi(logprob, old, advantage, batch, k_pos, lambda_pos, k_neg, lambda_neg) * advantage * logprob


@torch.no_grad()
def vespo_phi(
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    batch: Surroundings,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> Tensor:
    """(N,) phi of `vespo`."""
    total = batch.sequences.sum((logprob - old).clamp(-20.0, 20.0))
    if batch.log_correction is not None:
        total = total + batch.log_correction
    log_w = batch.sequences.spread(total.clamp(math.log(1e-8), 20.0))
    k = _either(advantage >= 0, k_pos, k_neg, advantage)
    decay = _either(advantage >= 0, lambda_pos, lambda_neg, advantage).clamp(min=1e-4)
    return (decay + k * log_w - decay * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@surrogate
def gmpo(
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    batch: Surroundings,
    *,
    epsilon_low: float = 0.4,
    epsilon_high: float = 0.4,
) -> Tensor:
    """-A exp(mean over the sequence of clip(log pi - log old)), clipped above where A > 0 and below elsewhere

    The bounds are of the log-ratio.   (GMPO, arXiv:2507.20673)
    """
    log_ratio = logprob - old
    clipped = log_ratio.clamp(-epsilon_low, epsilon_high)
    one_sided = torch.where(advantage > 0, torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped))
    return -batch.sequences.spread(batch.sequences.mean(one_sided).exp()) * advantage


@surrogate
def reinforce(logprob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """-A log pi   (REINFORCE; GPG, arXiv:2504.02546)"""
    return -advantage * logprob


def _covariance(logprob: Tensor, advantage: Tensor) -> Tensor:
    lp = logprob.detach()
    return (advantage - advantage.mean()) * (lp - lp.mean())


@surrogate
def clip_cov(
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    batch: Surroundings,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    seed: int = 1,
) -> Tensor:
    """ppo_clip without a random `share` of all tokens, of those unclipped with cov_low < cov < cov_high

    cov = (A - mean A)(log pi - mean log pi). The choice is the same for the same input.   (arXiv:2505.22617)
    """
    loss = ppo_clip(logprob, old, advantage, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    ratio, cov = (logprob - old).detach().exp(), _covariance(logprob, advantage)
    unclipped = ratio * advantage <= ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantage
    eligible = unclipped & (cov > cov_low) & (cov < cov_high)
    lot = torch.rand(len(cov), generator=torch.Generator().manual_seed(int(seed)))
    lot = lot.to(cov.device, non_blocking=True)
    count = max(int(share * len(cov)), 1)
    drawn = lot.masked_fill(~eligible, -1.0).topk(min(count, len(cov))).indices
    keep = torch.ones_like(loss)
    keep[drawn] = (~eligible[drawn]).to(keep.dtype)
    return loss * keep


@surrogate
def kl_cov(
    logprob: Tensor, old: Tensor, advantage: Tensor, batch: Surroundings, *, share: float = 2e-4, kl_coef: float = 1.0
) -> Tensor:
    """-r A, plus kl_coef |log pi - log old| on the `share` of tokens of the highest covariance   (arXiv:2505.22617)"""
    cov = _covariance(logprob, advantage)
    top = cov.topk(min(max(int(share * len(cov)), 1), len(cov))).indices
    penalised = torch.zeros_like(cov).index_fill(0, top, kl_coef)
    return -(logprob - old).exp() * advantage + penalised * (logprob - old).abs()


# ------------------------------------------------------------------------------------------------------ KL estimators


@kl_estimator("k1")
def k1(logprob: Tensor, ref: Tensor) -> Tensor:
    """log pi - log ref   (Schulman, Approximating KL divergence)"""
    return logprob - ref


@kl_estimator("k2")
def k2(logprob: Tensor, ref: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2"""
    return 0.5 * (logprob - ref).square()


@kl_estimator("k3")
def k3(logprob: Tensor, ref: Tensor) -> Tensor:
    """exp(ref - lp) - (ref - lp) - 1, unbiased and never negative"""
    return torch.expm1(ref - logprob) - (ref - logprob)


@kl_estimator("k3+")
def k3_plus(logprob: Tensor, ref: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2, which is that of the KL itself"""
    gradient = k2(logprob, ref)
    return gradient + (k3(logprob, ref) - gradient).detach()


# ------------------------------------------------------------------------------------------------------ token weights


@token_weight
def sequence_mean(lengths: Tensor, num_sequences: Count, num_tokens: Count) -> Tensor:
    """Mean over each sequence's tokens, then over sequences   (GRPO, arXiv:2402.03300)"""
    return 1.0 / (lengths * num_sequences)


@token_weight
def token_mean(lengths: Tensor, num_sequences: Count, num_tokens: Count) -> Tensor:
    """Mean over all active tokens of the global batch   (DAPO, arXiv:2503.14476)"""
    return torch.ones_like(lengths) / num_tokens


@token_weight
def sequence_sum(lengths: Tensor, num_sequences: Count, num_tokens: Count) -> Tensor:
    """Sum over each sequence's tokens, mean over sequences   (LUSPO, arXiv:2602.05261)"""
    return torch.ones_like(lengths) / num_sequences


@token_weight
def fixed_length(
    lengths: Tensor, num_sequences: Count, num_tokens: Count, *, max_completion_length: int | None = None
) -> Tensor:
    """Sum over tokens divided by num_sequences x max_completion_length   (Dr. GRPO, arXiv:2503.20783)"""
    if max_completion_length is None:
        raise ValueError("max_completion_length must be given for the token weight 'fixed_length'")
    return torch.ones_like(lengths) / (num_sequences * max_completion_length)
