"""What can be chosen about a PPO run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import fused_rlhf as fr
from fused_rlhf.trainers.config import TrainConfig, require, require_at_least, require_positive


@dataclass(frozen=True)
class Config(TrainConfig):
    """Options of a PPO run. Raises ValueError for values out of range or at odds with each other."""

    task: Literal["arithmetic", "gsm8k-steps", "gsm8k", "prompts"] = "arithmetic"
    """arithmetic: generated sums and differences. gsm8k-steps: the calculator steps of GSM8K's answers (`48/2=`).
    gsm8k: its whole questions. prompts: your own rows with prompt and answer."""
    data: str | None = None
    """Folder with GSM8K's train.jsonl and test.jsonl; for prompts also a .jsonl or .parquet file or a hub id."""
    max_operand: int = 99
    """Largest operand of an arithmetic prompt or a calculator step; steps beyond it are left out."""
    output: str = "runs/ppo"
    """Folder for metrics, curves, samples, checkpoints and the model."""

    rewards: tuple[str, ...] = ()
    """exact_match, numeric_answer, regex=PATTERN, length=N, model=FOLDER_OR_ID (a reward model that reads texts) or your
    own module:function; several are added up. Default: the task's own, or none beside a reward_model."""
    reward_weights: tuple[float, ...] = ()
    """One weight for each reward. Default: 1 each."""
    reward_timeout: float = 0.0
    """Seconds that one call of a reward may take; 0: as many as it likes."""
    reward_model: str | None = None
    """Folder or hub id of a sequence classifier with one label that reads the policy's own tokens; its number at the
    completion's last one is added to the rewards. Prompts need no answers where it is the only one."""
    value_model: str = "shared"
    """shared: a linear head on the policy's body. copy: a model of its own that begins as the policy's body. Otherwise
    the folder or hub id of a model, best a reward model; a head is put on where it has none."""

    warmup_steps: int = 0
    """Supervised steps on the training answers before PPO, at most."""
    warmup_accuracy: float = 1.0
    """End the warm-up once this share of 256 training prompts is answered right, greedily."""
    warmup_batch_size: int = 256
    """Samples in a supervised step."""
    warmup_learning_rate: float = 1e-3
    """Learning rate of the supervised steps."""

    steps: int = 200
    """PPO steps: rollouts, each followed by its updates."""
    prompts_per_step: int = 128
    """Prompts in a rollout, each with one completion, over all processes."""
    max_new_tokens: int = 128
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; the log-probabilities are taken at the same."""
    top_k: int = 0
    """Sample from the top_k likeliest tokens; 0: from all. The log-probabilities stay those of all tokens."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this probability together; 1: from all. See top_k."""
    rollout_batch_size: int = 0
    """Completions sampled together by one process; 0: all of its own."""
    stop_token: str | None = None
    """A token that ends a completion as an EOS does."""
    missing_eos_penalty: float = 0.0
    """Taken from the score of a completion that reached max_new_tokens without an end."""

    kl_coef: float = 0.05
    """Weight of the KL to the model the PPO steps begin with, in the reward of every token; 0 keeps no copy of it."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimate of a token's KL: log pi - log ref, or exp(log ref - log pi) - (log ref - log pi) - 1."""
    target_kl: float | None = None
    """Adapt kl_coef so that the KL of a completion, in nats, approaches this; None leaves it as it is."""
    kl_horizon: int = 10_000
    """Completions over which kl_coef is adapted: it changes by at most 0.2 prompts_per_step / kl_horizon in a step."""
    whiten_rewards: bool = False
    """Give the rewards of a rollout's tokens unit variance; their mean stays."""
    whiten_advantages: bool = True
    """Give the advantages of a rollout's tokens mean 0 and variance 1."""
    gamma: float = 1.0
    """Discount of rewards to come."""
    lam: float = 0.95
    """Decay of the generalised advantage estimate: 0 trusts the values alone, 1 the rewards alone."""

    num_ppo_epochs: int = 4
    """Passes over each rollout."""
    num_minibatches: int = 1
    """Optimiser updates in a pass."""
    cliprange: float = 0.2
    """The ratio is clipped to 1 - cliprange ... 1 + cliprange."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    cliprange_value: float = 0.2
    """A value is clipped to within this of its value at the rollout."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(
            self, 1, "prompts_per_step", "max_new_tokens", "num_ppo_epochs", "num_minibatches", "kl_horizon"
        )
        require_at_least(
            self, 0, "warmup_steps", "rollout_batch_size", "reward_timeout", "missing_eos_penalty", "top_k"
        )
        require_at_least(self, 0, "kl_coef", "vf_coef")
        require_positive(self, "temperature", "warmup_learning_rate", "warmup_batch_size", "max_operand")
        require_positive(self, "cliprange_value")
        for name in ("top_p", "warmup_accuracy"):
            require(0 < getattr(self, name) <= 1, name, getattr(self, name), "above 0 and at most 1")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        rows, weights, target = self.prompts_per_step, self.reward_weights, self.target_kl
        whole = f"a divisor of prompts_per_step = {rows}"
        require(rows % self.num_minibatches == 0, "num_minibatches", self.num_minibatches, whole)
        require(len(weights) in (0, len(self.rewards)), "reward_weights", weights, f"one for each of {self.rewards}")
        require(target is None or target > 0, "target_kl", target, "more than 0, or None")
        require(target is None or self.kl_coef > 0, "kl_coef", self.kl_coef, "more than 0 with a target_kl")
        adapters = self.lora_r > 0 and self.warmup_steps > 0
        require(not adapters, "warmup_steps", self.warmup_steps, "0 with LoRA, whose reference is the model as loaded")
        idle = self.warmup_accuracy < 1 and self.warmup_steps == 0
        require(not idle, "warmup_steps", 0, f"at least 1 when warmup_accuracy is given ({self.warmup_accuracy})")
        generated = self.task == "arithmetic"
        require(not (generated and self.data), "data", self.data, "none for the task 'arithmetic', which is generated")
        require(generated or self.data is not None, "data", self.data, f"where the task {self.task!r} is read from")
        self.loss()

    def loss(self) -> fr.PolicyLoss:
        """The policy's part of the loss."""
        return fr.PPO(epsilon_low=self.cliprange, epsilon_high=self.cliprange, entropy_coef=self.entropy_coef)
