"""What can be chosen about a GRPO run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fused_rlhf.objectives import CORRECTIONS, KL_ESTIMATORS, LEVELS, PRESETS, PolicyLoss
from fused_rlhf.trainers.config import TrainConfig, require, require_at_least, require_positive

Names = tuple[str, ...]
OBJECTIVES, ESTIMATORS = tuple(PRESETS), tuple(KL_ESTIMATORS)
LEVEL_NAMES, CORRECTION_NAMES = ("default", *LEVELS), ("none", *CORRECTIONS)


@dataclass(frozen=True)
class Config(TrainConfig):
    """Options of a GRPO run. Raises ValueError or TypeError for values out of range or at odds with each other."""

    output: str = "runs/grpo"
    """Folder for metrics, curves, samples, checkpoints and the model."""
    task: Literal["arithmetic", "gsm8k-steps", "gsm8k", "prompts"] = "arithmetic"
    """arithmetic: generated sums and differences. gsm8k-steps: the calculator steps of GSM8K's answers (`48/2=`).
    gsm8k: its whole questions. prompts: your own rows with prompt and answer, and maybe images."""
    data: str | None = None
    """Folder with GSM8K's train.jsonl and test.jsonl; for prompts also a .jsonl or .parquet file or a hub id."""
    max_operand: int = 99
    """Largest operand of an arithmetic prompt or a calculator step; steps beyond it are left out."""

    rewards: Names = ()
    """exact_match, numeric_answer, regex=PATTERN, length=N, model=FOLDER_OR_ID (a sequence classifier with one label) or
    your own module:function; several are added up. Default: the task's own."""
    reward_weights: tuple[float, ...] = ()
    """One weight for each reward. Default: 1 each."""
    reward_timeout: float = 0.0
    """Seconds that one call of a reward may take; 0: as many as it likes."""
    baseline: Literal["mean", "leave_one_out", "length_weighted"] = "mean"
    """What a reward is compared with: the group's mean; that of its others (RLOO); weighted by lengths (OPO)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation the advantages are divided by; with the baseline 'mean' only."""
    combine_rewards: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several rewards: normalise their sum, or sum what each is when normalised alone (GDPO)."""

    warmup_steps: int = 0
    """Supervised steps on the training answers before GRPO, at most."""
    warmup_accuracy: float = 1.0
    """End the warm-up once this share of 256 training prompts is answered right, greedily."""
    warmup_batch_size: int = 256
    """Samples in a supervised step."""
    warmup_learning_rate: float = 1e-3
    """Learning rate of the supervised steps."""

    steps: int = 200
    """GRPO steps: rollouts, each followed by its updates."""
    prompts_per_step: int = 32
    """Prompts in a rollout, over all processes."""
    num_generations: int = 8
    """Completions of each prompt: the group."""
    max_new_tokens: int = 128
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; the log-probabilities are taken at the same."""
    rollout_batch_size: int = 0
    """Completions sampled together by one process; 0: all of its own."""
    mask_truncated: bool = False
    """Leave completions that reached max_new_tokens without an EOS out of the loss."""

    objective: Literal[OBJECTIVES] = "grpo"  # type: ignore[valid-type]
    """A preset of fused_rlhf.objectives: how ratios are clipped, and how tokens weigh."""
    level: Literal[LEVEL_NAMES] = "default"  # type: ignore[valid-type]
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
    kl: Literal[ESTIMATORS] = "k3"  # type: ignore[valid-type]
    """How the KL is estimated from the log-probs of the tokens sampled."""
    use_bias_correction_kl: bool = False
    """Multiply the KL by the ratio."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    top_entropy_quantile: float = 1.0
    """Share of the tokens, of highest entropy, that keep their part of the objective."""
    off_policy_mask_threshold: float | None = None
    """Leave out tokens of negative advantage whose sequence's mean of log old - log current exceeds this."""
    importance_sampling: Literal[CORRECTION_NAMES] = "none"  # type: ignore[valid-type]
    """Correct for a sampler that is not the model itself, with the log-probs that it reports."""
    importance_sampling_min: float | None = None
    """Lower bound of the correction's ratio."""
    importance_sampling_max: float | None = None
    """Upper bound of the correction's ratio."""
    router_aux_loss_coef: float = 0.0
    """Weight of a mixture of experts' auxiliary loss."""

    num_iterations: int = 1
    """Passes over each rollout."""
    num_minibatches: int = 1
    """Optimiser updates in a pass: the steps taken per generation."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW. The small model wants about 3e-4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "prompts_per_step", "max_new_tokens", "num_iterations", "num_minibatches")
        require_at_least(self, 0, "warmup_steps", "rollout_batch_size", "reward_timeout", "router_aux_loss_coef")
        require_positive(self, "temperature", "warmup_learning_rate", "warmup_batch_size", "max_operand")
        require(self.num_generations >= 2, "num_generations", self.num_generations, "at least 2, to compare")
        rows, weights = self.prompts_per_step * self.num_generations, self.reward_weights
        whole = f"a divisor of prompts_per_step x num_generations = {rows}"
        require(rows % self.num_minibatches == 0, "num_minibatches", self.num_minibatches, whole)
        require(len(weights) in (0, len(self.rewards)), "reward_weights", weights, f"one for each of {self.rewards}")
        require(0 < self.warmup_accuracy <= 1, "warmup_accuracy", self.warmup_accuracy, "above 0 and at most 1")
        idle = self.warmup_accuracy < 1 and self.warmup_steps == 0
        require(not idle, "warmup_steps", 0, f"at least 1 when warmup_accuracy is given ({self.warmup_accuracy})")
        adapters = self.lora_r > 0 and self.warmup_steps > 0
        require(not adapters, "warmup_steps", self.warmup_steps, "0 with LoRA, whose reference is the model as loaded")
        generated = self.task == "arithmetic"
        require(not (generated and self.data), "data", self.data, "none for the task 'arithmetic', which is generated")
        require(generated or self.data is not None, "data", self.data, f"where the task {self.task!r} is read from")
        self.loss()

    @property
    def off_policy(self) -> bool:
        """Whether updates use a rollout after the model has changed, or weigh it against another sampler."""
        return self.num_iterations * self.num_minibatches > 1 or self.importance_sampling != "none"

    def loss(self) -> PolicyLoss:
        given: dict[str, Any] = dict(self.objective_options)
        for name in ("epsilon_low", "epsilon_high", "delta", "off_policy_mask_threshold"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        if self.objective == "dr_grpo":
            given["max_completion_length"] = self.max_new_tokens
        if self.level != "default":
            given["level"] = self.level
        if self.importance_sampling != "none":
            bounds = {"importance_sampling_min", "importance_sampling_max"}
            given |= {"importance_sampling": self.importance_sampling} | {name: getattr(self, name) for name in bounds}
        return PRESETS[self.objective](
            kl=self.kl,
            beta=self.beta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            entropy_coef=self.entropy_coef,
            top_entropy_quantile=self.top_entropy_quantile,
            **given,
        )
