"""What can be chosen about any run that learns from its own samples: task, rewards, warm-up, rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import fused_rlhf as fr
from fused_rlhf.trainers.config import TrainConfig, differs, require, require_at_least, require_positive

PROMPT = "{prompt}"  # its place in prompt_format
CUTS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True)
class RolloutConfig(TrainConfig):
    """Options that GRPO and PPO share. Raises ValueError or TypeError for values out of range or at odds with each other."""

    # Model and data
    task: Literal["arithmetic", "pictures", "gsm8k-steps", "gsm8k", "prompts"] = "arithmetic"
    """arithmetic: generated sums and differences. pictures: generated ones, whose squares are to be counted or named by their
    colour. gsm8k-steps: the calculator steps of GSM8K's answers (`48/2=`).
    gsm8k: its whole questions. prompts: your own rows with prompt, maybe images, and an answer where a reward reads it."""
    data: str | None = None
    """Folder with GSM8K's train.jsonl and test.jsonl; for prompts also a .jsonl or .parquet file or a hub id."""
    max_operand: int = 99
    """Largest operand of an arithmetic prompt or a calculator step; steps beyond it are left out."""
    prompt_format: str = PROMPT
    """What the model reads in the place of a prompt that is a text, {prompt} in it: worked examples before, or words around."""

    # Rewards
    rewards: tuple[str, ...] = ()
    """exact_match, numeric_answer, regex=PATTERN, length=N, model=FOLDER_OR_ID (a sequence classifier with one label that
    reads texts) or your own module:function; several are added up. Default: the task's own."""
    reward_weights: tuple[float, ...] = ()
    """One weight for each reward. Default: 1 each."""
    reward_timeout: float = 0.0
    """Seconds that one call of a reward may take; 0: as many as it likes."""

    # Warm-up: supervised steps before the run's own
    warmup_steps: int = 0
    """Supervised steps on the training answers before the run's own, at most."""
    warmup_accuracy: float = 1.0
    """End the warm-up once this share of 256 training prompts is answered right, greedily."""

    # Rollouts
    prompts_per_step: int = 32
    """Prompts in a rollout, over all processes."""
    max_new_tokens: int = 512
    """Longest completion, in tokens."""
    stop_token: str | None = None
    """A token that ends a completion as an EOS does."""
    temperature: float = 1.0
    """Sampling temperature; the log-probabilities are taken at the same."""
    top_k: int = 0
    """Sample from the top_k likeliest tokens; 0: from all. top_k, top_p of what it leaves and min_p cut the distribution at the
    temperature. Log-probabilities, ratios and entropies are then those of what is kept; the KL compares whole
    distributions."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this probability together; 1: from all. See top_k."""
    min_p: float = 0.0
    """Sample from the tokens that have at least min_p times the likeliest one's probability; 0: from all. See top_k."""
    rollout_batch_size: int = 0
    """Completions sampled together by one process, at most; 0: as many as have 4 GB of keys, values and logits together, by the
    longest prompt and max_new_tokens. Each row draws with numbers of its own, whichever are sampled with it."""
    num_minibatches: int = 1
    """Optimiser updates in a pass over a rollout; each pass deals the completions anew."""
    # Objective
    ref_model: str | None = None
    """Folder or hub id of the model that the KL is to. None: the model that the run's steps begin with."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "prompts_per_step", "max_new_tokens", "num_minibatches")
        require_at_least(self, 0, "rollout_batch_size", "reward_timeout", "top_k")
        require_positive(self, "temperature", "warmup_batch_size", "max_operand")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "at least 0 and at most 1")
        if differs(self, *CUTS):
            fr.Truncation(self.top_k, self.top_p, self.min_p)  # which checks their types
        weights = self.reward_weights
        named = self.rewards  # functions may be given as objects: then they are counted by `rewards.choose`
        require(not named or len(weights) in (0, len(named)), "reward_weights", weights, f"one for each of {named}")
        require(0 < self.warmup_accuracy <= 1, "warmup_accuracy", self.warmup_accuracy, "above 0 and at most 1")
        idle = self.warmup_accuracy < 1 and self.warmup_steps == 0
        require(not idle, "warmup_steps", 0, f"at least 1 when warmup_accuracy is given ({self.warmup_accuracy})")
        adapters = self.lora_r > 0 and self.warmup_steps > 0
        require(not adapters, "warmup_steps", self.warmup_steps, "0 with LoRA, whose reference is the model as loaded")
        format_ = self.prompt_format
        require(PROMPT in format_, "prompt_format", format_, f"a text with {PROMPT} in it")
        generated = self.task in ("arithmetic", "pictures")
        require(
            not (generated and self.data), "data", self.data, f"none for the task {self.task!r}, which is generated"
        )
        require(generated or self.data is not None, "data", self.data, f"where the task {self.task!r} is read from")

    @property
    def truncation(self) -> fr.Truncation | None:
        """How the sampler's distribution is cut; None: not at all."""
        return fr.Truncation(self.top_k, self.top_p, self.min_p) if differs(self, *CUTS) else None
