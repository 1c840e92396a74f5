"""What can be chosen about a GRPO run."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import fused_rlhf as fr
from fused_rlhf.trainers.config import differs, require, require_at_least, require_default, require_one_of
from fused_rlhf.trainers.rollout_config import RolloutConfig

BOUNDS = ("importance_sampling_min", "importance_sampling_max")

OF_LOSS = (
    *("objective", "level", "epsilon_low", "epsilon_high", "delta", "objective_options", "beta", "kl"),
    *("use_bias_correction_kl", "entropy_coef", "top_entropy_quantile", "off_policy_mask_threshold"),
    *("importance_sampling", *BOUNDS),
)

COMPARING = ("clip_cov", "kl_cov")  # they choose among all tokens of a call


@dataclass(frozen=True)
class Config(RolloutConfig):
    """Options of a GRPO run. Raises ValueError or TypeError for values out of range or at odds with each other."""

    # Output
    output: str = "runs/grpo"
    """Folder for metrics, curves, samples, checkpoints and the model."""
    # Advantages
    baseline: Literal["mean", "leave_one_out", "length_weighted"] = "mean"
    """What a reward is compared with: the group's mean; that of its others (RLOO); weighted by lengths (OPO)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation the advantages are divided by; with the baseline 'mean' only."""
    combine_rewards: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several rewards: normalise their sum, or sum what each is when normalised alone (GDPO); with the baseline 'mean'
    only."""

    # Optimisation
    steps: int = 200
    """GRPO steps: rollouts, each followed by its updates."""
    # Rollouts
    num_generations: int = 8
    """Completions of each prompt: the group."""
    resample_dead: int = 0
    """Further rollouts of a step, at most, whose groups take the place of those without an advantage (DAPO's dynamic
    sampling); 0: none."""
    # Objective
    mask_truncated: bool = False
    """Leave completions that reached max_new_tokens without an EOS out of the loss."""

    objective: str = "grpo"
    """How ratios are clipped, and how tokens weigh, a preset of fused_rlhf.objectives: grpo, bnpo, dr_grpo, dapo, luspo, gspo,
    gspo_token, cispo, sapo, vespo, gmpo, ppo, reinforce, reinforce_pp, rloo, clip_cov, kl_cov."""
    level: Literal["default", "token", "sequence", "sequence_sum", "sequence_token"] = "default"
    """Whose ratio is compared; default: as the objective has it."""
    epsilon_low: float | None = None
    """The ratio is clipped below 1 - epsilon_low. Default: the objective's own."""
    epsilon_high: float | None = None
    """The ratio is clipped above 1 + epsilon_high. Default: the objective's own."""
    delta: float | None = None
    """Two-sided clipping: the ratio counts as delta at most."""
    objective_options: dict[str, float] = field(default_factory=dict)
    """Other numbers of the objective (ratio_max of cispo, tau_pos of sapo, dual_clip ...)."""
    beta: float = 0.0
    """Weight of the KL to the model the GRPO steps begin with; 0 keeps no copy of it."""
    kl: str = "k3"
    """How the KL is estimated from the log-probs of the tokens sampled: k1, k2, k3, k3+."""
    use_bias_correction_kl: bool = False
    """Multiply the KL by the ratio."""
    top_entropy_quantile: float = 1.0
    """Share of the tokens, of highest entropy, that keep their part of the objective."""
    off_policy_mask_threshold: float | None = None
    """Leave out tokens of negative advantage whose sequence's mean of log old - log current exceeds this; old: what a
    sampler reports, if there is one."""
    # A sampler that is not the model itself
    importance_sampling: Literal[
        "auto", "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "auto"
    """Correct for a sampler that is not the model itself, with the log-probs that it reports. auto: where it reports some,
    sequence_mask (token_mask for vespo) with a ratio of at most 3."""
    importance_sampling_min: float | None = None
    """Lower bound of the correction's ratio."""
    importance_sampling_max: float | None = None
    """Upper bound of the correction's ratio."""
    # Objective
    router_aux_loss_coef: float = 0.0
    """Weight of a mixture of experts' auxiliary loss."""

    # Optimisation
    num_iterations: int = 1
    """Passes over each rollout."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW. The small model wants about 3e-4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "num_iterations")
        require_at_least(self, 0, "router_aux_loss_coef", "resample_dead")
        alone = self.micro_batch_tokens == 0 or not self.compares_tokens
        words = "0: top_entropy_quantile and *_cov compare all of a mini-batch's tokens"
        require(alone, "micro_batch_tokens", self.micro_batch_tokens, words)
        require(self.num_generations >= 2, "num_generations", self.num_generations, "at least 2, to compare")
        rows = self.prompts_per_step * self.num_generations
        whole = f"a divisor of prompts_per_step x num_generations = {rows}"
        require(rows % self.num_minibatches == 0, "num_minibatches", self.num_minibatches, whole)
        if differs(self, "objective", "kl"):
            self.check_names()
        other = f"with the baseline {self.baseline!r}"
        require_default(self, self.baseline == "mean", other, "scale_rewards", "combine_rewards")
        require_default(self, self.importance_sampling != "none", "without importance_sampling", *BOUNDS)
        require_default(self, self.beta > 0, "without beta", "kl", "ref_model")
        if differs(self, *OF_LOSS):  # the defaults are right, and torch is slow to import
            self.loss()

    def check_names(self) -> None:
        require_one_of(self, "objective", fr.objectives.PRESETS)
        require_one_of(self, "kl", fr.objectives.KL_ESTIMATORS)

    @property
    def compares_tokens(self) -> bool:
        """Whether a token's part in the loss depends on all of the call's."""
        return self.top_entropy_quantile < 1 or self.objective in COMPARING

    @functools.cached_property  # tried on the objective, and asked several times a step
    def skips_dead(self) -> bool:
        """Whether a sequence whose advantage is 0 has no part in the loss but in its divisors."""
        silent = self.beta == 0 and self.entropy_coef == 0 and self.router_aux_loss_coef == 0
        if not silent or self.compares_tokens or self.objective == "bnpo":  # a mean over each micro-batch's tokens
            return False
        return self.loss().silent_at_zero

    @property
    def corrects(self) -> bool:
        """Whether the objective weighs a token by how likely its sampler made it."""
        return self.importance_sampling not in ("auto", "none")

    @property
    def reads_sampler(self) -> bool:
        """Whether the objective uses the log-probs that a sampler reports."""
        return self.corrects or self.off_policy_mask_threshold is not None

    @property
    def off_policy(self) -> bool:
        """Whether updates use a rollout after the model has changed, or weigh it against another sampler."""
        return self.num_iterations * self.num_minibatches > 1 or self.corrects

    def with_sampler(self, reports: bool) -> Config:
        """The same with "auto" decided: whether a sampler reports log-probs."""
        if self.importance_sampling != "auto":
            return self
        if not reports:
            return replace(self, importance_sampling="none", importance_sampling_min=None, importance_sampling_max=None)
        how: Literal["token_mask", "sequence_mask"] = "token_mask" if self.objective == "vespo" else "sequence_mask"
        given = self.importance_sampling_min, self.importance_sampling_max
        return replace(
            self, importance_sampling=how, importance_sampling_max=3.0 if given == (None, None) else given[1]
        )

    def loss(self) -> fr.PolicyLoss:
        given: dict[str, Any] = dict(self.objective_options)
        for name in ("epsilon_low", "epsilon_high", "delta", "off_policy_mask_threshold"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        if self.objective == "dr_grpo":
            given["max_completion_length"] = self.max_new_tokens
        if self.level != "default":
            given["level"] = self.level
        if self.corrects:
            given |= {name: getattr(self, name) for name in ("importance_sampling", *BOUNDS)}
        return fr.objectives.PRESETS[self.objective](
            kl=self.kl,
            beta=self.beta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            entropy_coef=self.entropy_coef,
            top_entropy_quantile=self.top_entropy_quantile,
            **given,
        )
