"""Policy objectives: a surrogate, a KL estimate and a token weight of `surrogates`, put together.

    loss = sum_t w_t (m_t surrogate(logprob_t, old_t, A_t) + beta kl(logprob_t, ref_t)) - entropy_coef mean_t H_t

m is 1 unless asked otherwise: the off-policy mask, times the entropy mask, times the importance-sampling ratio. The level
says whose ratio is compared:

    token            log r_t = logprob_t - old_t
    sequence         log r_t = the mean of that over the sequence            (GSPO, arXiv:2507.18071)
    sequence_sum     log r_t = the sum of it over the sequence               (RLOO, arXiv:2402.14740)
    sequence_token   the sequence's value, the token's own gradient          (GSPO-token)

A preset is a constructor: `GRPO(beta=0.04)` is `PolicyLoss("ppo_clip", "sequence_mean", kl="k3", beta=0.04)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.kernels.interface import BoundPolicy, Stats, TokenGrads
from fused_rlhf.objectives import signatures
from fused_rlhf.objectives.registry import (
    check_number,
    check_options,
    differentiated,
    formula,
    keywords,
    options_of,
    registered,
    snake_case,
)
from fused_rlhf.objectives.surrogates import (
    KL_ESTIMATORS,
    SURROGATES,
    TOKEN_WEIGHTS,
    Count,
    Surroundings,
    looks_beyond,
    silent_at_zero,
)
from fused_rlhf.segments import Sequences

LEVELS = ("token", "sequence", "sequence_sum", "sequence_token")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
BOUNDS = ("epsilon_low", "epsilon_high")

PRESETS: dict[str, Callable[..., PolicyLoss]] = {}


@dataclass(frozen=True)
class PolicyLoss:
    """One policy objective, complete: which surrogate, weighted how, with what masks, KL and entropy terms.

    Args:
        surrogate: a name in `SURROGATES`.
        token_weight: a name in `TOKEN_WEIGHTS`.
        kl: a name in `KL_ESTIMATORS`; used when beta is not 0.
        beta: weight of the KL to the reference, >= 0.
        entropy_coef: weight of the entropy bonus (mean over active tokens), subtracted from the loss.
        level: a name in `LEVELS`: whose ratio is compared.
        use_bias_correction_kl: multiply the KL by the ratio, with its gradient (DeepSeek-V3.2, arXiv:2512.02556).
        off_policy_mask_threshold: drop a token of negative advantage when its sequence's mean of
            log sampler - log pi exceeds this (DeepSeek-V3.2). The sampler's log-probs default to the old ones.
        top_entropy_quantile: in (0, 1]: the share of active tokens, of highest entropy, that keep their surrogate
            (arXiv:2506.01939). The threshold is taken over this call's tokens on all ranks.
        importance_sampling: None, or how the surrogate is weighted by exp(log old - log sampler), per token or summed
            over the sequence: truncated to [importance_sampling_min, importance_sampling_max], or masked, zero
            outside (TIS, IcePop). A NaN difference counts as ratio 1.
        importance_sampling_min, importance_sampling_max: its bounds; None leaves that side open.
        options: keywords of the surrogate and the token weight.

    Raises:
        ValueError: an unknown name, a number out of range, options that contradict each other.
        TypeError: an option that neither the surrogate nor the token weight takes.
    """

    surrogate: str = "ppo_clip"
    token_weight: str = "sequence_mean"
    kl: str = "k3"
    beta: float = 0.0
    entropy_coef: float = 0.0
    level: str = "token"
    use_bias_correction_kl: bool = False
    off_policy_mask_threshold: float | None = None
    top_entropy_quantile: float = 1.0
    importance_sampling: str | None = None
    importance_sampling_min: float | None = None
    importance_sampling_max: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        registered("surrogate", self.surrogate, SURROGATES)
        registered("token_weight", self.token_weight, TOKEN_WEIGHTS)
        registered("kl", self.kl, KL_ESTIMATORS)
        registered("level", self.level, dict.fromkeys(LEVELS))
        check_number("beta", self.beta, at_least=0)
        check_number("entropy_coef", self.entropy_coef)
        if self.use_bias_correction_kl and self.beta == 0:
            raise ValueError("use_bias_correction_kl must be False when beta is 0: there is no KL to correct")
        if self.off_policy_mask_threshold is not None:
            check_number("off_policy_mask_threshold", self.off_policy_mask_threshold)
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(f"top_entropy_quantile must lie in (0, 1], got {self.top_entropy_quantile}")
        self._check_importance_sampling()
        if looks_beyond(self.surrogate) and self.level != "token":
            raise ValueError(
                f"level must be 'token' for {self.surrogate}, which sets its own ratio; got {self.level!r}"
            )
        if self.surrogate == "gmpo" and self.top_entropy_quantile < 1:
            raise ValueError("top_entropy_quantile must be 1 for gmpo, whose ratio is that of all tokens")
        allowed = keywords(SURROGATES[self.surrogate]) | keywords(TOKEN_WEIGHTS[self.token_weight])
        check_options(f"{self.surrogate} with {self.token_weight}", self.options, allowed)
        for name, value in self.options.items():
            if value is not None:
                check_number(name, value, above=0)
        low, high = (options_of(SURROGATES[self.surrogate], self.options).get(k) for k in ("epsilon_low", "dual_clip"))
        if self.surrogate != "gmpo" and low is not None and low >= 1:
            raise ValueError(f"epsilon_low must be below 1, got {low}")
        if high is not None and high <= 1:
            raise ValueError(f"dual_clip must be above 1, got {high}")

    def _check_importance_sampling(self) -> None:
        bounds = (self.importance_sampling_min, self.importance_sampling_max)
        if self.importance_sampling is None:
            if bounds != (None, None):
                raise ValueError(
                    f"importance_sampling must be one of {list(CORRECTIONS)} where it has bounds, got None"
                )
            return
        registered("importance_sampling", self.importance_sampling, dict.fromkeys(CORRECTIONS))
        for name, value in zip(("importance_sampling_min", "importance_sampling_max"), bounds):
            if value is not None:
                check_number(name, value, at_least=0)
        if bounds == (None, None):
            raise ValueError(
                f"importance_sampling_min or importance_sampling_max must be given with importance_sampling="
                f"{self.importance_sampling!r}, got neither"
            )
        if self.surrogate == "vespo" and not self.importance_sampling.startswith("token"):
            raise ValueError(
                f"importance_sampling must be 'token_truncate' or 'token_mask' for vespo, got "
                f"{self.importance_sampling!r}"
            )

    @property
    def silent_at_zero(self) -> bool:
        """Whether a sequence whose advantage is 0 has no part in the loss but in its divisors, KL and entropy terms."""
        options = options_of(SURROGATES[self.surrogate], self.options)
        return self.top_entropy_quantile == 1 and silent_at_zero(self.surrogate, options)

    @property
    def tokenwise(self) -> bool:
        """Whether a token's loss depends on that token alone, so that `one_pass` serves it."""
        whole = self.level != "token" or self.off_policy_mask_threshold is not None or self.top_entropy_quantile < 1
        return not whole and not looks_beyond(self.surrogate)

    def bind(
        self,
        *,
        advantages: Tensor,
        sequences: Sequences,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None,
        num_sequences: Count,
        num_tokens: Count,
        sampling_logprobs: Tensor | None = None,
        per_sequence: bool = True,
    ) -> BoundPolicyLoss:
        """The objective over N real tokens with all but the log-probs known. Vectors are (N,), the counts global.

        per_sequence: the advantages are one per sequence, so that at sequence level metrics are means over sequences.
        """
        if self.beta != 0 and ref_logprobs is None:
            raise ValueError(f"ref_logprobs must be given when beta is not 0, got None with beta={self.beta}")
        importance = self._importance(old_logprobs, sampling_logprobs, sequences)
        log_correction = None
        if importance is not None and self.surrogate == "vespo":
            log_correction = sequences.sum(importance.log().clamp(math.log(1e-8), 20.0))
            importance = None
        weight = TOKEN_WEIGHTS[self.token_weight]
        lengths = sequences.spread(sequences.lengths).to(advantages.dtype)
        token_weights = weight(lengths, num_sequences, num_tokens, **options_of(weight, self.options))
        if importance is not None and self.beta == 0:  # a constant of each token
            token_weights, importance = token_weights * importance, None
        masked = self.off_policy_mask_threshold is not None or self.top_entropy_quantile < 1
        return BoundPolicyLoss(
            surrogate=self.surrogate,
            kl=self.kl if self.beta != 0 else "",
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            advantages=advantages,
            token_weights=token_weights,
            entropy_weight=self.entropy_coef / num_tokens if self.entropy_coef else 0.0,
            beta=self.beta,
            options=options_of(SURROGATES[self.surrogate], self.options),
            level=self.level,
            offsets=sequences.offsets,
            plain=not masked and importance is None and not self.use_bias_correction_kl,
            tokenwise=self.tokenwise,
            objective=self,
            batch=Surroundings(sequences, log_correction),
            sampling_logprobs=sampling_logprobs,
            importance=importance,
            advantages_per_sequence=per_sequence,
        )

    def _importance(self, old: Tensor | None, sampling: Tensor | None, sequences: Sequences) -> Tensor | None:
        """(N,) what the surrogate is multiplied by to correct for the sampler."""
        if self.importance_sampling is None:
            if sampling is not None and self.off_policy_mask_threshold is None:
                raise ValueError(
                    "sampling_logprobs must be None unless the objective has importance_sampling or an "
                    "off_policy_mask_threshold; they would change nothing"
                )
            return None
        if sampling is None or old is None:
            missing = "sampling_logprobs" if sampling is None else "old_logprobs"
            raise ValueError(f"{missing} must be given for importance_sampling={self.importance_sampling!r}, got None")
        difference = (old - sampling).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
        if self.importance_sampling.startswith("sequence"):
            difference = sequences.spread(sequences.sum(difference))
        ratio = difference.exp()
        low, high = self.importance_sampling_min, self.importance_sampling_max
        if self.importance_sampling.endswith("truncate"):
            return ratio.clamp(min=low, max=high)
        outside = (ratio < (0.0 if low is None else low)) | (ratio > (math.inf if high is None else high))
        return ratio.masked_fill(outside, 0.0)


@dataclass(kw_only=True)
class BoundPolicyLoss(BoundPolicy):
    """A `kernels.interface.BoundObjective`."""

    tokenwise: bool
    objective: PolicyLoss
    batch: Surroundings
    sampling_logprobs: Tensor | None
    importance: Tensor | None  # (N,), where it is not part of token_weights
    advantages_per_sequence: bool

    @property
    def per_sequence(self) -> bool:
        """Whether a sequence has one ratio and one advantage, so that a share of clipped ones is of sequences."""
        return self.advantages_per_sequence and self.level in ("sequence", "sequence_sum")

    @property
    def needs_entropy(self) -> bool:
        return self.objective.entropy_coef != 0 or self.objective.top_entropy_quantile < 1

    @property
    def has_entropy_term(self) -> bool:
        return self.objective.entropy_coef != 0

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("entropy",) if self.needs_entropy else ()

    @property
    def needs_full(self) -> bool:
        return bool(self.kl)

    def given(self, stats: Stats) -> BoundPolicyLoss:
        return self  # all that it reads of the statistics comes with each call

    def compared(self, rows: slice, logprobs: Tensor) -> Tensor:
        """The old log-probs that make logprob - old the log-ratio of the objective's level, (n,)."""
        old = logprobs.detach() if self.old_logprobs is None else self.old_logprobs[rows]
        if self.level == "token":
            return old
        reduce = self.batch.sequences.sum if self.level == "sequence_sum" else self.batch.sequences.mean
        log_ratio = self.batch.sequences.spread(reduce(logprobs - old))
        if self.level == "sequence_token":
            return (logprobs - log_ratio).detach()
        return logprobs - log_ratio

    def core(self, rows: slice, logprobs: Tensor, old: Tensor) -> Tensor:
        """(n,) values of the surrogate."""
        function = SURROGATES[self.surrogate]
        beyond = (self.batch,) if looks_beyond(self.surrogate) else ()
        return function(logprobs, old, self.advantages[rows], *beyond, **self.options)

    def kl_term(self, rows: slice, logprobs: Tensor, old: Tensor, full: Tensor | None = None) -> Tensor:
        """full: (n,) log-probs of the whole vocabulary, where `logprobs` are those of kept sets."""
        assert self.ref_logprobs is not None
        kl = KL_ESTIMATORS[self.kl or "k3"](logprobs if full is None else full, self.ref_logprobs[rows])
        return kl * (logprobs - old).exp() if self.objective.use_bias_correction_kl else kl

    def contributions(self, logprobs: Tensor, entropy: Tensor | None, full: Tensor | None) -> Tensor:
        return self.per_token(slice(0, logprobs.numel()), logprobs, entropy, full)

    def per_token(self, rows: slice, logprobs: Tensor, entropy: Tensor | None, full: Tensor | None = None) -> Tensor:
        """(n,) contributions to the loss, differentiable in the vectors; `full` as in `kl_term`."""
        old = self.compared(rows, logprobs)
        loss = self.core(rows, logprobs, old)
        bonus = self.entropy_weight
        if self.objective.off_policy_mask_threshold is not None:
            loss = loss * self._on_policy(logprobs)
        if self.objective.top_entropy_quantile < 1:
            assert entropy is not None
            keep = high_entropy(entropy.detach(), self.objective.top_entropy_quantile).to(loss.dtype)
            loss = loss * keep
            # Its mean is over the tokens kept: their share of this call's tokens is taken for that of all.
            bonus = bonus * keep / keep.mean().clamp(min=1e-12)
        if self.importance is not None:
            loss = loss * self.importance[rows]
        if self.kl:
            loss = loss + self.beta * self.kl_term(rows, logprobs, old, full)
        loss = self.token_weights[rows] * loss
        if self.objective.entropy_coef != 0:
            assert entropy is not None
            loss = loss - bonus * entropy
        return loss

    @torch.no_grad()
    def _on_policy(self, logprobs: Tensor) -> Tensor:
        """(N,) 1 for the tokens that the off-policy mask keeps."""
        threshold = self.objective.off_policy_mask_threshold
        assert threshold is not None
        sampler = self.sampling_logprobs if self.sampling_logprobs is not None else self.old_logprobs
        drift = torch.zeros_like(logprobs) if sampler is None else (sampler - logprobs).nan_to_num(nan=0.0)
        near = self.batch.sequences.mean(drift) <= threshold
        return ((self.advantages >= 0) | self.batch.sequences.spread(near)).to(logprobs.dtype)

    def __call__(self, rows: slice, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
        return differentiated(partial(self.per_token, rows), logprobs, entropy, self.objective.entropy_coef != 0)


@torch.no_grad()
def high_entropy(entropy: Tensor, share: float) -> Tensor:
    """(N,) bool: the tokens whose entropy reaches the (1 - share) quantile over the tokens of all ranks."""
    everyone = _of_all_ranks(entropy)
    if everyone.numel() == 0:
        return torch.zeros_like(entropy, dtype=torch.bool)
    return entropy >= quantile(everyone, 1 - share)


def _of_all_ranks(values: Tensor) -> Tensor:
    """(N,) of each rank -> all of them, one after the other; every rank must call, with however few."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    world = torch.distributed.get_world_size()
    count = torch.full((1,), values.numel(), device=values.device)
    counts = [torch.zeros_like(count) for _ in range(world)]
    torch.distributed.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    padded = torch.nn.functional.pad(values, (0, max(sizes) - values.numel()))
    parts = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def quantile(values: Tensor, q: float) -> Tensor:
    """torch.quantile, which refuses more than 2^24 values."""
    ordered = values.sort().values
    position = q * (ordered.numel() - 1)
    low = math.floor(position)
    high = min(low + 1, ordered.numel() - 1)
    return torch.lerp(ordered[low], ordered[high], position - low)


def preset(
    name: str, surrogate: str, token_weight: str, level: str = "token", source: str = "", **defaults: Any
) -> Callable[..., PolicyLoss]:
    """A constructor of `PolicyLoss`; keywords are its fields or options of the surrogate and the weight.

    `epsilon` is short for equal `epsilon_low` and `epsilon_high` where the surrogate has those.
    """
    functions = SURROGATES[surrogate], TOKEN_WEIGHTS[token_weight]
    terms = signatures.fields_of(PolicyLoss, {"level": level})
    options = signatures.options_of(functions, defaults)
    own, its = {term.name for term in terms}, {option.name for option in options}
    short = its.issuperset(BOUNDS) and "epsilon" not in its

    def construct(**given: Any) -> PolicyLoss:
        check_options(f"{surrogate} with {token_weight}", given, own | its | ({"epsilon"} if short else set()))
        given = _both_sides(given) if short else given
        settings = {key: value for key, value in given.items() if key in own}
        chosen = defaults | {key: value for key, value in given.items() if key in its}
        return PolicyLoss(surrogate, token_weight, **({"level": level} | settings), options=chosen)

    both = [signatures.keyword("epsilon", "float | None", None)] if short else []
    words = ["    epsilon: short for equal epsilon_low and epsilon_high."] if short else []
    words += [f"    {', '.join(option.name for option in options)}: of the formulas above."] if options else []
    doc = f"""{name}: the surrogate {surrogate} at {level} level, weighted by {token_weight}{f"   ({source})" if source else ""}

    {surrogate}: {formula(functions[0])}
    {token_weight}: {formula(functions[1])}

Args:
{chr(10).join([*words, signatures.arguments_of(PolicyLoss)])}

Raises:
    TypeError: an option that it does not have. ValueError: as `PolicyLoss`.
"""
    signatures.dress(construct, name, doc, [*both, *options, *terms], PolicyLoss, __name__)
    PRESETS[snake_case(name)] = construct
    return construct


def _both_sides(given: dict[str, Any]) -> dict[str, Any]:
    """With `epsilon` spelt out."""
    rest = {name: value for name, value in given.items() if name != "epsilon"}
    epsilon = given.get("epsilon")
    if epsilon is None:
        return rest
    check_number("epsilon", epsilon, above=0)
    if beside := [name for name in BOUNDS if name in given]:
        raise ValueError(f"epsilon must be None beside {' and '.join(beside)}, for it means both bounds; got {epsilon}")
    return rest | dict.fromkeys(BOUNDS, epsilon)


GRPO: signatures.Clipped = preset("GRPO", "ppo_clip", "sequence_mean", source="arXiv:2402.03300")
BNPO: signatures.Clipped = preset("BNPO", "ppo_clip", "token_mean", source="token mean over the call's own tokens")
DrGRPO: signatures.ClippedOverLength = preset("DrGRPO", "ppo_clip", "fixed_length", source="arXiv:2503.20783")
DAPO: signatures.Clipped = preset(
    "DAPO", "ppo_clip", "token_mean", source="arXiv:2503.14476", epsilon_low=0.2, epsilon_high=0.28
)
LUSPO: signatures.Clipped = preset("LUSPO", "ppo_clip", "sequence_sum", level="sequence", source="arXiv:2602.05261")
GSPO: signatures.Clipped = preset(
    "GSPO",
    "ppo_clip",
    "sequence_mean",
    level="sequence",
    source="arXiv:2507.18071",
    epsilon_low=3e-4,
    epsilon_high=4e-4,
)
GSPOToken: signatures.Clipped = preset(
    "GSPOToken",
    "ppo_clip",
    "sequence_mean",
    level="sequence_token",
    source="arXiv:2507.18071",
    epsilon_low=3e-4,
    epsilon_high=4e-4,
)
CISPO: signatures.Cispo = preset("CISPO", "cispo", "token_mean", source="arXiv:2506.13585")
SAPO: signatures.Sapo = preset("SAPO", "sapo", "sequence_mean", source="arXiv:2511.20347")
VESPO: signatures.Vespo = preset("VESPO", "vespo", "token_mean", source="arXiv:2602.10693")
GMPO: signatures.Gmpo = preset("GMPO", "gmpo", "sequence_mean", source="arXiv:2507.20673")
PPO: signatures.Clipped = preset("PPO", "ppo_clip", "token_mean", source="arXiv:1707.06347")
REINFORCE: signatures.Plain = preset("REINFORCE", "reinforce", "token_mean", source="arXiv:2504.02546")
ReinforcePP: signatures.Clipped = preset(
    "ReinforcePP", "ppo_clip", "token_mean", source="REINFORCE++, arXiv:2501.03262"
)
RLOO: signatures.Clipped = preset("RLOO", "ppo_clip", "sequence_mean", level="sequence_sum", source="arXiv:2402.14740")
ClipCov: signatures.ClippedByCovariance = preset("ClipCov", "clip_cov", "token_mean", source="arXiv:2505.22617")
KLCov: signatures.KLByCovariance = preset("KLCov", "kl_cov", "token_mean", source="arXiv:2505.22617")
