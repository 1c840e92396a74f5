"""What can be chosen about a PPO run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import fused_rlhf as fr
from fused_rlhf.trainers.config import differs, require, require_at_least, require_default, require_positive
from fused_rlhf.trainers.rollout_config import RolloutConfig


@dataclass(frozen=True)
class Config(RolloutConfig):
    """Options of a PPO run. Raises ValueError or TypeError for values out of range or at odds with each other."""

    # Output
    output: str = "runs/ppo"
    """Folder for metrics, curves, samples, checkpoints and the model."""

    # Rewards
    reward_model: str | None = None
    """Folder or hub id of a sequence classifier with one label that reads the policy's own tokens; its number at the
    completion's last one is added to the rewards. Prompts need no answers where it is the only one."""
    # Values
    value_model: str = "shared"
    """shared: a linear head on the policy's body. copy: a model of its own that begins as the policy's body. Otherwise
    the folder or hub id of a model, best a reward model; a head is put on where it has none."""
    value_learning_rate: float | None = None
    """Peak learning rate of the values' own weights. None: the policy's, but at least 1e-5: a critic that begins at zero
    learns next to nothing at the rates that suit a policy."""

    # Optimisation
    steps: int = 200
    """PPO steps: rollouts, each followed by its updates."""
    # Rollouts
    prompts_per_step: int = 128
    """Prompts in a rollout, each with one completion, over all processes."""
    # Rewards
    missing_eos_penalty: float = 0.0
    """Taken from the score of a completion that reached max_new_tokens without an end."""

    # KL to the reference
    kl_coef: float = 0.05
    """Weight of the KL to the model the PPO steps begin with, in the reward of every token; 0 keeps no copy of it."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimate of a token's KL: log pi - log ref, or exp(log ref - log pi) - (log ref - log pi) - 1."""
    target_kl: float | None = None
    """Adapt kl_coef so that the KL of a completion, in nats, approaches this; None leaves it as it is."""
    kl_horizon: int = 10_000
    """Completions over which kl_coef is adapted: it changes by at most 0.2 prompts_per_step / kl_horizon in a step."""
    # Rewards
    whiten_rewards: bool = False
    """Give the rewards of a rollout's tokens unit variance; their mean stays."""
    # Advantages
    whiten_advantages: bool = True
    """Give the advantages of a rollout's tokens mean 0 and variance 1."""
    gamma: float = 1.0
    """Discount of rewards to come."""
    lam: float = 0.95
    """Decay of the generalised advantage estimate: 0 trusts the values alone, 1 the rewards alone."""

    # Objective
    num_ppo_epochs: int = 4
    """Passes over each rollout."""
    cliprange: float = 0.2
    """The ratio is clipped to 1 - cliprange ... 1 + cliprange."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    cliprange_value: float = 0.2
    """A value is clipped to within this of its value at the rollout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "num_ppo_epochs", "kl_horizon")
        require_at_least(self, 0, "missing_eos_penalty", "kl_coef", "vf_coef")
        require_positive(self, "cliprange_value")
        rate = self.value_learning_rate
        require(rate is None or rate > 0, "value_learning_rate", rate, "more than 0, or None")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        rows, target = self.prompts_per_step, self.target_kl
        whole = f"a divisor of prompts_per_step = {rows}"
        require(rows % self.num_minibatches == 0, "num_minibatches", self.num_minibatches, whole)
        require(target is None or target > 0, "target_kl", target, "more than 0, or None")
        require(target is None or self.kl_coef > 0, "kl_coef", self.kl_coef, "more than 0 with a target_kl")
        require_default(self, target is not None, "without target_kl", "kl_horizon")
        require_default(self, self.kl_coef > 0, "without kl_coef", "kl_estimator", "ref_model")
        if differs(self, "cliprange", "entropy_coef"):
            self.loss()  # which checks them

    def loss(self) -> fr.PolicyLoss:
        """The policy's part of the loss."""
        return fr.PPO(epsilon_low=self.cliprange, epsilon_high=self.cliprange, entropy_coef=self.entropy_coef)
