"""The table of preference losses: functions of the summed log-probs of whole completions.

Adding one is one decorated function here; its symbols are those of `preference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected completions of P pairs; (P,) each. Of unpaired ones, all S, and the chosen marked."""

    logprob: Tensor  # summed, with the weights of ld_alpha
    compared: (
        Tensor  # the same, over the whole vocabulary where a sampler's kept sets are told: what meets the reference
    )
    ref: Tensor  # the same of the reference; 0 without one
    score: Tensor  # u
    plain: Tensor  # summed without weights
    length: Tensor  # tokens, at least 1

    @property
    def log_ratio(self) -> Tensor:
        return self.compared - self.ref

    @property
    def mean_logprob(self) -> Tensor:
        return self.logprob / self.length


@dataclass(frozen=True)
class Pairs:
    """What a loss over pairs knows, in fp64."""

    chosen: Side
    rejected: Side
    beta: float
    nll: Tensor  # (P,) whose mean over pairs is the mean over all chosen tokens of -logprob

    @property
    def margin(self) -> Tensor:
        """d"""
        return self.chosen.score - self.rejected.score


@dataclass(frozen=True)
class Examples:
    """What a loss over single completions knows, (S,) each."""

    log_ratio: Tensor
    labels: Tensor  # bool: desirable
    beta: float
    kl: Tensor  # 0-d, >= 0, no gradient


@dataclass(frozen=True)
class Loss:
    function: Callable[..., Tensor]
    reference: bool  # whether it compares with a reference
    paired: bool
    averaged: bool = False  # whether a completion's reward is of its mean log-prob, not of the sum


PREFERENCES: dict[str, Loss] = {}


def preference(
    reference: bool = True, averaged: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers `f(pairs, *, options...) -> (P,)`; its keywords become options."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        PREFERENCES[function.__name__] = Loss(function, reference, paired=True, averaged=averaged)
        return function

    return register


def unpaired_preference(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Registers `f(examples, *, options...) -> (S,)`."""
    PREFERENCES[function.__name__] = Loss(function, reference=True, paired=False)
    return function


# -------------------------------------------------------------------------------------------------------------- losses


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


@preference()
def sigmoid(pairs: Pairs, *, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)   (DPO, arXiv:2305.18290; cDPO)"""
    return _smoothed(pairs.beta * pairs.margin, label_smoothing)


@preference()
def hinge(pairs: Pairs) -> Tensor:
    """max(0, 1 - beta d)   (SLiC, arXiv:2305.10425)"""
    return torch.relu(1 - pairs.beta * pairs.margin)


@preference()
def ipo(pairs: Pairs) -> Tensor:
    """(u_c / n_c - u_r / n_r - 1 / (2 beta))^2   (IPO, arXiv:2310.12036)"""
    difference = pairs.chosen.score / pairs.chosen.length - pairs.rejected.score / pairs.rejected.length
    return (difference - 1 / (2 * pairs.beta)).square()


@preference()
def exo_pair(pairs: Pairs, *, label_smoothing: float = 1e-3) -> Tensor:
    """KL of (q, 1 - q), q = sigmoid(beta d), to (1 - e, e), e > 0   (EXO, arXiv:2402.00856)"""
    logits = pairs.beta * pairs.margin
    won = logits.sigmoid() * (logsigmoid(logits) - math.log1p(-label_smoothing))
    return won + (-logits).sigmoid() * (logsigmoid(-logits) - math.log(label_smoothing))


@preference()
def nca_pair(pairs: Pairs) -> Tensor:
    """-log sigmoid(r_c) - log sigmoid(-r_c) / 2 - log sigmoid(-r_r) / 2, r = beta lr   (NCA, arXiv:2402.05369)"""
    c, r = pairs.beta * pairs.chosen.log_ratio, pairs.beta * pairs.rejected.log_ratio
    return -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r)


@preference()
def robust(pairs: Pairs, *, label_smoothing: float = 0.0) -> Tensor:
    """[-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)] / (1 - 2 e), e < 1/2   (arXiv:2403.00409)"""
    logits = pairs.beta * pairs.margin
    clean = -(1 - label_smoothing) * logsigmoid(logits)
    return (clean + label_smoothing * logsigmoid(-logits)) / (1 - 2 * label_smoothing)


@preference()
def bco_pair(pairs: Pairs) -> Tensor:
    """-log sigmoid(beta lr_c) - log sigmoid(-beta lr_r)   (BCO, arXiv:2404.04656)"""
    return -logsigmoid(pairs.beta * pairs.chosen.log_ratio) - logsigmoid(-pairs.beta * pairs.rejected.log_ratio)


@preference()
def sppo_hard(pairs: Pairs) -> Tensor:
    """(lr_c - 1 / (2 beta))^2 + (lr_r + 1 / (2 beta))^2   (SPPO, arXiv:2405.00675)"""
    half = 0.5 / pairs.beta
    return (pairs.chosen.log_ratio - half).square() + (pairs.rejected.log_ratio + half).square()


@preference()
def aot(pairs: Pairs, *, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (sort(lp_c - lp_r) - sort(ref_c - ref_r))), sorted over the call's pairs   (AOT, arXiv:2406.05882)"""
    policy = (pairs.chosen.logprob - pairs.rejected.logprob).sort().values
    ref = (pairs.chosen.ref - pairs.rejected.ref).sort().values
    return _smoothed(pairs.beta * (policy - ref), label_smoothing)


@preference()
def aot_unpaired(pairs: Pairs, *, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (sort(lr_c) - sort(lr_r))), sorted over the call's pairs   (AOT, arXiv:2406.05882)"""
    x = pairs.chosen.log_ratio.sort().values - pairs.rejected.log_ratio.sort().values
    return _smoothed(pairs.beta * x, label_smoothing)


@preference()
def apo_zero(pairs: Pairs) -> Tensor:
    """1 - sigmoid(beta lr_c) + sigmoid(beta lr_r)   (APO, arXiv:2408.06266)"""
    return 1 - (pairs.beta * pairs.chosen.log_ratio).sigmoid() + (pairs.beta * pairs.rejected.log_ratio).sigmoid()


@preference()
def apo_down(pairs: Pairs) -> Tensor:
    """sigmoid(beta lr_c) + 1 - sigmoid(beta (lr_c - lr_r))   (APO, arXiv:2408.06266)"""
    c, r = pairs.chosen.log_ratio, pairs.rejected.log_ratio
    return (pairs.beta * c).sigmoid() + 1 - (pairs.beta * (c - r)).sigmoid()


@preference()
def discopop(pairs: Pairs, *, discopop_tau: float = 0.05) -> Tensor:
    """(1 - m) (-log sigmoid(L)) + m e^-L, L = beta d, m = sigmoid(L / tau)   (DiscoPOP, arXiv:2406.08414)"""
    logits = pairs.beta * pairs.margin
    mix = (logits / discopop_tau).sigmoid()
    return -logsigmoid(logits) * (1 - mix) + (-logits).exp() * mix


@preference(reference=False)
def sft(pairs: Pairs) -> Tensor:
    """Minus the mean log-prob over all chosen tokens"""
    return pairs.nll


@preference()
def sigmoid_norm(pairs: Pairs) -> Tensor:
    """-log sigmoid(beta (u_c / n_c - u_r / n_r))"""
    difference = pairs.chosen.score / pairs.chosen.length - pairs.rejected.score / pairs.rejected.length
    return -logsigmoid(pairs.beta * difference)


@preference(reference=False)
def cpo(pairs: Pairs, *, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (lp_c - lp_r))   (CPO, arXiv:2401.08417)"""
    return _smoothed(pairs.beta * (pairs.chosen.logprob - pairs.rejected.logprob), label_smoothing)


def alpha_reward(logprob: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha, log p at alpha = 0   (AlphaPO, arXiv:2501.03884)"""
    return logprob if alpha == 0 else -torch.expm1(-alpha * logprob) / alpha


@preference(reference=False, averaged=True)
def simpo(pairs: Pairs, *, gamma: float = 0.5, alpha: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (r_c - r_r) - gamma), r the mean log-prob or AlphaPO's reward of it   (SimPO, arXiv:2405.14734)"""
    c, r = (alpha_reward(side.mean_logprob, alpha) for side in (pairs.chosen, pairs.rejected))
    return _smoothed(pairs.beta * (c - r) - gamma, label_smoothing)


@preference(reference=False, averaged=True)
def orpo(pairs: Pairs) -> Tensor:
    """-beta log sigmoid(log odds_c - log odds_r), odds = p / (1 - p), log p the mean log-prob   (ORPO, arXiv:2403.07691)

    Its NLL term is `sft`.
    """
    c, r = pairs.chosen.mean_logprob, pairs.rejected.mean_logprob
    return -pairs.beta * logsigmoid((c - r) - (log1mexp(c) - log1mexp(r)))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x), x < 0, without cancellation on either side of -log 2."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


@unpaired_preference
def kto(examples: Examples, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """w_d (1 - sigmoid(beta (lr - z))) where desirable, else w_u (1 - sigmoid(beta (z - lr))), z the batch's KL

    (KTO, arXiv:2402.01306)
    """
    shifted = examples.beta * (examples.log_ratio - examples.kl)
    good, bad = desirable_weight * (1 - shifted.sigmoid()), undesirable_weight * (1 - (-shifted).sigmoid())
    return torch.where(examples.labels, good, bad)


@unpaired_preference
def apo_zero_unpaired(examples: Examples, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """w_d (1 - sigmoid(beta lr)) where desirable, else w_u sigmoid(beta lr)   (APO, arXiv:2408.06266)"""
    p = (examples.beta * examples.log_ratio).sigmoid()
    return torch.where(examples.labels, desirable_weight * (1 - p), undesirable_weight * p)
