"""The demo: a small model learns sums and differences on a CPU, first from answers, then from rewards alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fused_rlhf.trainers.grpo_config import Config

if TYPE_CHECKING:
    from fused_rlhf.trainers.grpo import Result


@dataclass(frozen=True)
class Demo(Config):
    """Options of the demo: those of a GRPO run, with other defaults."""


DEFAULTS = Demo(
    task="arithmetic",
    max_operand=49,
    hidden_size=96,
    num_layers=3,
    output="runs/demo",
    overwrite=True,
    # Until about half of the answers are right: enough for rewards to say something, and much left to learn from them.
    warmup_steps=800,
    warmup_accuracy=0.45,
    warmup_batch_size=128,
    warmup_learning_rate=2e-3,
    steps=80,
    prompts_per_step=64,
    num_generations=8,
    max_new_tokens=4,
    micro_batch_size=512,
    learning_rate=1.5e-4,
    lr_warmup_updates=5,
    threads=1,
    eval_steps=20,
    sample_steps=20,
)


def closing(config: Config, result: Result) -> str:
    """What the demo prints at its end."""
    before, after = (100 * accuracy["accuracy"] for accuracy in (result.before, result.after))
    folder = result.model_path.parent
    return f"""
accuracy on held-out prompts: {before:.1f} % before GRPO, {after:.1f} % after ({result.seconds:.0f} s)

  metrics    {folder / "metrics.jsonl"}
  curves     {folder / "curves.png"}
  report     {folder / "report.html"}
  samples    {folder / "samples.jsonl"}
  options    {folder / "config.yaml"}
  model      {result.model_path}  (AutoModelForCausalLM.from_pretrained)

Next: real data and your own model
  fused-rlhf grpo --config gsm8k_steps --data DIR_WITH_GSM8K
  fused-rlhf grpo --task gsm8k --data DIR_WITH_GSM8K --model MODEL_FOLDER_OR_HUB_ID --output runs/gsm8k
  fused-rlhf grpo --help
"""
