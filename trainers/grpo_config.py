"""What can be chosen about a GRPO run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import fused_rlhf as fr
from fused_rlhf.trainers.loop import require, require_choices

OBJECTIVES = {"grpo": fr.GRPO, "dr_grpo": fr.DrGRPO, "dapo": fr.DAPO}


@dataclass(frozen=True)
class Config:
    """Options of a GRPO run. Raises ValueError for values out of range or at odds with each other."""

    task: Literal["arithmetic", "gsm8k-steps", "gsm8k", "prompts"] = "arithmetic"
    """arithmetic: generated sums and differences. gsm8k-steps: the calculator steps of GSM8K's answers (`48/2=`).
    gsm8k: its whole questions. prompts: your own rows with prompt and answer."""
    data: str | None = None
    """Folder with GSM8K's train.jsonl and test.jsonl; for prompts also a .jsonl or .parquet file or a hub id."""
    max_operand: int = 99
    """Largest operand of an arithmetic prompt or a calculator step; steps beyond it are left out."""
    model: str | None = None
    """Model folder or hub id. None builds a small Qwen3 with a character tokenizer, untrained: give it a warm-up."""
    hidden_size: int = 128
    """Width of the model built when none is given."""
    num_layers: int = 4
    """Depth of the model built when none is given."""
    chat_template: bool = False
    """Make each prompt a user's message by the tokenizer's chat template."""
    output: str = "runs/grpo"
    """Folder for metrics, curves, samples and the model."""
    overwrite: bool = False
    """Write over the run that the output folder holds."""

    rewards: tuple[str, ...] = ()
    """exact_match, numeric_answer or your own module:function; several are added up. Default: the task's own."""
    reward_weights: tuple[float, ...] = ()
    """One weight for each reward. Default: 1 each."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation the advantages are divided by."""

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
    """Prompts in a rollout."""
    num_generations: int = 8
    """Completions of each prompt: the group."""
    max_new_tokens: int = 128
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; the log-probabilities are taken at the same."""
    mask_truncated: bool = False
    """Leave completions that reached max_new_tokens without an EOS out of the loss."""

    objective: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    """How tokens weigh: alike within each sequence; by the fixed max_new_tokens; all alike."""
    num_iterations: int = 1
    """Passes over each rollout."""
    num_minibatches: int = 1
    """Optimiser updates in a pass."""
    micro_batch_size: int = 256
    """Completions in a forward and backward; bounds the memory, leaves the result as it is."""
    beta: float = 0.0
    """Weight of the KL to the model the GRPO steps begin with; 0 keeps no copy of it."""
    epsilon_low: float = 0.2
    """The ratio is clipped below 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """The ratio is clipped above 1 + epsilon_high."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW, without weight decay. The small model wants about 3e-4."""
    lr_schedule: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """How the learning rate goes on after its peak."""
    lr_warmup_updates: int = 0
    """Updates over which the learning rate rises to its peak."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast dtype; the weights stay fp32."""
    threads: int = 0
    """CPU threads of torch; 0: as many as it takes by itself. A small model gains next to nothing from a second one."""
    backend: str = "auto"
    """Backend of the op: auto, triton, chunked or reference."""

    eval_samples: int = 500
    """Test samples in the accuracy, whose answers are greedy; 0: all of them."""
    eval_steps: int = 50
    """Steps between accuracies; 0: only before and after."""
    save_steps: int = 100
    """Steps between checkpoints; 0: only at the end and on Ctrl-C."""
    sample_steps: int = 25
    """Steps between sample completions, printed and saved; 0: none."""
    seed: int = 0
    """Seed of the data's order, the sampling and a new model's weights."""

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("prompts_per_step", "max_new_tokens", "num_iterations", "num_minibatches", "micro_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("steps", "warmup_steps", "lr_warmup_updates", "threads"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("eval_samples", "eval_steps", "save_steps", "sample_steps"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("temperature", "learning_rate", "warmup_learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        require(self.num_generations >= 2, "num_generations", self.num_generations, "at least 2, to compare")
        rows, weights = self.prompts_per_step * self.num_generations, self.reward_weights
        whole = f"a divisor of prompts_per_step x num_generations = {rows}"
        require(rows % self.num_minibatches == 0, "num_minibatches", self.num_minibatches, whole)
        require(len(weights) in (0, len(self.rewards)), "reward_weights", weights, f"one for each of {self.rewards}")
        require(0 < self.warmup_accuracy <= 1, "warmup_accuracy", self.warmup_accuracy, "above 0 and at most 1")
        idle = self.warmup_accuracy < 1 and self.warmup_steps == 0
        require(not idle, "warmup_steps", 0, f"at least 1 when warmup_accuracy is given ({self.warmup_accuracy})")
        generated = self.task == "arithmetic"
        require(not (generated and self.data), "data", self.data, "none for the task 'arithmetic', which is generated")
        require(generated or self.data is not None, "data", self.data, f"where the task {self.task!r} is read from")
        built = self.model is None
        require(not (built and self.chat_template), "chat_template", True, "false: the small model has none")
        sizes, default = (self.hidden_size, self.num_layers), (Config.hidden_size, Config.num_layers)
        require(built or sizes == default, "hidden_size, num_layers", sizes, f"left alone with model={self.model!r}")
        self.loss()

    def loss(self) -> fr.PolicyLoss:
        options: dict[str, Any] = {"max_completion_length": self.max_new_tokens} if self.objective == "dr_grpo" else {}
        clip = {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high}
        return OBJECTIVES[self.objective](beta=self.beta, **clip, **options)
