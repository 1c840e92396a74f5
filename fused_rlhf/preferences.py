"""Preference objectives: a table of losses over the summed log-probs of whole completions.

    loss = mean over pairs of  sum_k weight_k loss_k(pair),     lp = sum_t w_t logprob_t over the completion

w_t is 1, or ld_alpha beyond the length of the shorter completion of the pair (LD-DPO, arXiv:2409.06411). With the
log-ratio lr = lp - ref, u is lr itself or its image under another f-divergence (f-DPO, arXiv:2309.16240):

    reverse_kl u = lr          js_divergence    u = log 2 + logsigmoid(lr)
    forward_kl u = 1 - e^-lr   alpha_divergence u = (e^((a - 1) lr) - 1) / (a - 1)

and d = u_chosen - u_rejected. A preset is a constructor: `DPO()` is `PreferenceLoss(("sigmoid",))`. Adding a loss is one
decorated function here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_rlhf.kernels.interface import BoundPreference, TokenGrads
from fused_rlhf.objectives import Count
from fused_rlhf.registry import check_number, differentiated, keywords, options_of, registered
from fused_rlhf.segments import Sequences, precise

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected completions of P pairs; (P,) each. Of unpaired ones, all S, and the chosen marked."""

    logprob: Tensor  # summed, with the weights of ld_alpha
    ref: Tensor  # the same of the reference; 0 without one
    score: Tensor  # u
    plain: Tensor  # summed without weights
    length: Tensor  # tokens, at least 1

    @property
    def log_ratio(self) -> Tensor:
        return self.logprob - self.ref

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
PRESETS: dict[str, Callable[..., PreferenceLoss]] = {}


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


def _alpha_reward(logprob: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha, log p at alpha = 0   (AlphaPO, arXiv:2501.03884)"""
    return logprob if alpha == 0 else -torch.expm1(-alpha * logprob) / alpha


@preference(reference=False, averaged=True)
def simpo(pairs: Pairs, *, gamma: float = 0.5, alpha: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (r_c - r_r) - gamma), r the mean log-prob or AlphaPO's reward of it   (SimPO, arXiv:2405.14734)"""
    c, r = (_alpha_reward(side.mean_logprob, alpha) for side in (pairs.chosen, pairs.rejected))
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


# --------------------------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class PreferenceLoss:
    """One preference objective, complete.

    Args:
        losses: names in `PREFERENCES`, all over pairs or all over single completions.
        weights: one for each of them.
        beta: > 0.
        f_divergence: a name in `F_DIVERGENCES`: how log-ratios become the scores of the losses that use d.
        f_alpha: a of the alpha divergence.
        ld_alpha: in [0, 1]: weight of the tokens beyond the shorter completion; None: 1.
        use_weighting: weight each pair by w_c w_r, w = exp(mean_t(logprob - log sum_v p^2)), without gradient
            (WPO, arXiv:2406.11827).
        options: keywords of the losses: label_smoothing, gamma, ...

    Raises:
        ValueError: an unknown name, a number out of range, options that contradict each other.
        TypeError: an option that none of the losses takes.
    """

    losses: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    beta: float = 0.1
    f_divergence: str = "reverse_kl"
    f_alpha: float | None = None
    ld_alpha: float | None = None
    use_weighting: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.losses or isinstance(self.losses, str):
            raise ValueError(f"losses must be a tuple of names in {sorted(PREFERENCES)}, got {self.losses!r}")
        for name in self.losses:
            registered("losses", name, PREFERENCES)
        if len(self.weights) != len(self.losses):
            raise ValueError(f"weights must hold one number for each of {self.losses}, got {self.weights}")
        for weight in self.weights:
            check_number("weights", weight)
        if len({PREFERENCES[name].paired for name in self.losses}) > 1:
            raise ValueError(f"losses must be all over pairs or all over single completions, got {self.losses}")
        check_number("beta", self.beta, above=0)
        registered("f_divergence", self.f_divergence, dict.fromkeys(F_DIVERGENCES))
        if (self.f_alpha is not None) != (self.f_divergence == "alpha_divergence"):
            raise ValueError(
                f"f_alpha must be given with f_divergence='alpha_divergence' and with no other, got {self.f_alpha} "
                f"with {self.f_divergence!r}"
            )
        if self.f_alpha is not None:
            check_number("f_alpha", self.f_alpha)
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must lie in [0, 1], got {self.ld_alpha}")
        if not self.paired:
            plain = ("f_divergence", "reverse_kl"), ("ld_alpha", None), ("use_weighting", False)
            for name, default in plain:
                if getattr(self, name) != default:
                    raise ValueError(f"{name} must be {default!r} for {self.losses}, which know no pairs")
        allowed = set().union(*(keywords(PREFERENCES[name].function) for name in self.losses))
        for name, value in self.options.items():
            if name not in allowed:
                raise TypeError(f"{name} is no option of {self.losses}: {sorted(allowed)}")
            check_number(name, value)
        self._check_label_smoothing()

    def _check_label_smoothing(self) -> None:
        for name in self.losses:
            e = options_of(PREFERENCES[name].function, self.options).get("label_smoothing", 0.0)
            low = name == "exo_pair"
            if not (0 < e < 0.5 if low else 0 <= e < 0.5):
                raise ValueError(f"label_smoothing must lie in {'(' if low else '['}0, 0.5) for {name}, got {e}")

    @property
    def paired(self) -> bool:
        return PREFERENCES[self.losses[0]].paired

    @property
    def needs_reference(self) -> bool:
        return any(PREFERENCES[name].reference for name in self.losses)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Statistics of the op that the loss needs beside the log-probs."""
        return ("sum_sq",) if self.use_weighting else ()

    def bind(
        self,
        *,
        sequences: Sequences,
        ref_logprobs: Tensor | None,
        ref_sums: Tensor | None,
        labels: Tensor | None,
        kl: Tensor | None,
        num_pairs: Count,
        num_tokens: Count,
        dtype: torch.dtype,
    ) -> BoundPreferenceLoss:
        """The objective over N real tokens of S sequences with all but the log-probs known.

        ref_logprobs (N,) or ref_sums (S,), or neither; labels (S,) bool and kl 0-d for unpaired losses; num_pairs:
        of examples, where unpaired; num_tokens: of the chosen completions. The counts are global.
        """
        weights = None if self.ld_alpha is None else self._token_weights(sequences, dtype)
        if ref_logprobs is not None:
            ref_sums = sequences.sum(precise(ref_logprobs) if weights is None else precise(ref_logprobs) * weights)
        return BoundPreferenceLoss(
            losses=self.losses,
            weights=self.weights,
            beta=self.beta,
            options=dict(self.options),
            offsets=sequences.offsets,
            ref_sums=ref_sums,
            token_weights=weights,
            pair_weight=1.0 / num_pairs,
            plain=self.paired and self.f_divergence == "reverse_kl" and not self.use_weighting,
            objective=self,
            sequences=sequences,
            labels=labels,
            kl=kl,
            num_pairs=num_pairs,
            num_tokens=num_tokens,
        )

    def _token_weights(self, sequences: Sequences, dtype: torch.dtype) -> Tensor:
        """(N,) 1 up to the length of the pair's shorter completion, ld_alpha beyond."""
        lengths = sequences.lengths
        shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
        position = torch.arange(sequences.index.numel(), device=lengths.device) - sequences.spread(
            sequences.offsets[:-1]
        )
        tail = torch.full_like(position, float(self.ld_alpha or 0.0), dtype=dtype)
        return torch.where(position < sequences.spread(shorter), torch.ones_like(tail), tail)


@dataclass(kw_only=True)
class BoundPreferenceLoss(BoundPreference):
    """A `kernels.interface.BoundObjective`."""

    objective: PreferenceLoss
    sequences: Sequences
    labels: Tensor | None
    kl: Tensor | None
    num_pairs: Count
    num_tokens: Count
    tokenwise: bool = False
    needs_entropy: bool = False
    log_sum_sq: Tensor | None = None  # (N,), set once the op has it: only WPO's weights read it

    def sides(self, logprobs: Tensor) -> tuple[Side, Side]:
        """Chosen and rejected, (P,) each."""
        weighted = logprobs if self.token_weights is None else logprobs * self.token_weights
        total = self.sequences.sum(weighted)
        plain = total if self.token_weights is None else self.sequences.sum(logprobs)
        ref = torch.zeros_like(total) if self.ref_sums is None else self.ref_sums
        score = divergence(total - ref, self.objective.f_divergence, self.objective.f_alpha)
        lengths = self.sequences.lengths.clamp(min=1).to(total.dtype)
        chosen, rejected = zip(*(values.chunk(2) for values in (total, ref, score, plain, lengths)))
        return Side(*chosen), Side(*rejected)

    def per_sequence(self, logprobs: Tensor) -> Tensor:
        """(P,) losses of the pairs, or (S,) of the completions; summed and compared in fp64."""
        logprobs = precise(logprobs)
        if not self.objective.paired:
            assert self.ref_sums is not None
            assert self.labels is not None
            kl = self.ref_sums.new_zeros(()) if self.kl is None else self.kl
            known: Any = Examples(self.sequences.sum(logprobs) - self.ref_sums, self.labels, self.beta, kl)
        else:
            chosen, rejected = self.sides(logprobs)
            known = Pairs(chosen, rejected, self.beta, -chosen.plain * self.num_pairs / self.num_tokens)
        total = logprobs.new_zeros(())
        for name, weight in zip(self.losses, self.weights):
            function = PREFERENCES[name].function
            total = total + weight * function(known, **options_of(function, self.options))
        if self.objective.use_weighting:
            total = total * self._weighting(logprobs)
        return total

    @torch.no_grad()
    def _weighting(self, logprobs: Tensor) -> Tensor:
        assert self.log_sum_sq is not None
        chosen, rejected = self.sequences.mean(logprobs - self.log_sum_sq).exp().chunk(2)
        return chosen * rejected

    def __call__(self, rows: slice, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
        """-> loss (P,), of the pairs (so that one without tokens counts too), and its derivatives (N,)."""

        def of_pairs(lp: Tensor, _: Tensor | None) -> Tensor:
            return (self.pair_weight * self.per_sequence(lp)).to(lp.dtype)

        return differentiated(of_pairs, logprobs, None, by_entropy=False)


def divergence(log_ratio: Tensor, name: str, alpha: float | None) -> Tensor:
    """u of the module's docstring; the exponent of the alpha divergence is at most 80 (arXiv:2309.16240)."""
    if name == "forward_kl":
        return -torch.expm1(-log_ratio)
    if name == "js_divergence":
        return math.log(2) + logsigmoid(log_ratio)
    if name == "alpha_divergence" and alpha is not None and abs(alpha - 1) >= 1e-6:
        return torch.expm1(((alpha - 1) * log_ratio).clamp(max=80.0)) / (alpha - 1)
    return log_ratio  # reverse KL, and the limit of the alpha divergence at 1


def preset(name: str, *losses: str, source: str, **defaults: Any) -> Callable[..., PreferenceLoss]:
    """A constructor of `PreferenceLoss`; keywords are its fields or options of the losses.

    `sft_weight` adds the chosen completions' NLL, where the preset does not hold it already.
    """
    own = {f.name for f in fields(PreferenceLoss)} - {"losses", "weights", "options"}

    def construct(
        loss_type: str | Sequence[str] = losses, loss_weights: Sequence[float] | None = None, **given: Any
    ) -> PreferenceLoss:
        given = defaults | given
        names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
        weights = (1.0,) * len(names) if loss_weights is None else tuple(loss_weights)
        sft_weight = given.pop("sft_weight", 0.0)
        if sft_weight:
            names, weights = (*names, "sft"), (*weights, sft_weight)
        settings = {key: value for key, value in given.items() if key in own}
        options = {key: value for key, value in given.items() if key not in own}
        return PreferenceLoss(names, weights, **settings, options=options)

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"""{name}: {" + ".join(losses)} ({source}); defaults of its own: {defaults or "none"}.

    loss_type: another name in `PREFERENCES`, or several; loss_weights: one for each. sft_weight: of the NLL of the
    chosen completions, added to the loss (RPO, CPO, ORPO). Other keywords: the fields of `PreferenceLoss` and the
    options of the losses.
    """
    PRESETS[name.lower()] = construct
    return construct


DPO = preset("DPO", "sigmoid", source="arXiv:2305.18290")
IPO = preset("IPO", "ipo", source="arXiv:2310.12036")
KTO = preset("KTO", "kto", source="arXiv:2402.01306")
CPO = preset("CPO", "cpo", source="arXiv:2401.08417", sft_weight=1.0)
SimPO = preset("SimPO", "simpo", source="arXiv:2405.14734", beta=2.0, gamma=1.0)
ORPO = preset("ORPO", "orpo", source="arXiv:2403.07691", sft_weight=1.0)


@torch.no_grad()
def preference_metrics(
    bound: BoundPreferenceLoss,
    logprobs: Tensor,
    entropy: Tensor | None = None,
    mean_logit: Tensor | None = None,
    is_top1: Tensor | None = None,
) -> dict[str, Tensor]:
    """Means over pairs and active tokens, 0-d, no host sync; zero when there are none.

    rewards/{chosen, rejected}: beta times the log-ratio (beta times the log-prob without a reference), unweighted;
    rewards/{margins, accuracies} of pairs; logps/{chosen, rejected}: both of mean log-probs where the (first) loss is,
    as simpo and orpo, and the rewards under alpha AlphaPO's; nll: over the chosen tokens. Where the statistics
    are given: entropy over all tokens, logits/{chosen, rejected} (mean logit), mean_token_accuracy of chosen tokens.
    """
    sequences, paired = bound.sequences, bound.objective.paired
    weighted = logprobs if bound.token_weights is None else logprobs * bound.token_weights
    total = sequences.sum(precise(weighted))
    if PREFERENCES[bound.losses[0]].averaged:
        total = total / sequences.lengths.clamp(min=1)
    against = total if bound.ref_sums is None else total - bound.ref_sums
    reward = bound.beta * _alpha_reward(against, bound.options.get("alpha") or 0.0)
    if bound.labels is None:
        half = sequences.count // 2
        chosen = torch.arange(sequences.count, device=total.device) < half
    else:
        chosen = bound.labels

    def mean(values: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep, values, torch.zeros_like(values)).sum() / keep.sum().clamp(min=1)

    metrics = {}
    for side, keep in (("chosen", chosen), ("rejected", ~chosen)):
        metrics[f"rewards/{side}"] = mean(reward, keep)
        metrics[f"logps/{side}"] = mean(total, keep)
        if mean_logit is not None:
            metrics[f"logits/{side}"] = mean(mean_logit, sequences.spread(keep))
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if paired:
        c, r = reward.chunk(2)
        metrics["rewards/accuracies"] = (c > r).to(reward.dtype).sum() / max(c.numel(), 1)
    metrics["nll"] = -mean(logprobs, sequences.spread(chosen))
    if entropy is not None:
        metrics["entropy"] = entropy.sum() / max(entropy.numel(), 1)
    if is_top1 is not None:
        metrics["mean_token_accuracy"] = mean(is_top1.to(logprobs.dtype), sequences.spread(chosen))
    if not paired:
        metrics["kl"] = reward.new_zeros(()) if bound.kl is None else bound.kl
    return {name: value.to(logprobs.dtype) for name, value in metrics.items()}
