"""Rewards of one's own: a file with functions, named on the command line or given in Python.

fused-rlhf grpo --task prompts --data prompts.jsonl --rewards reward:right_digits reward:brief --reward-weights 1 0.1
"""

import tempfile
from pathlib import Path

from fused_rlhf.trainers.grpo import Config, train


def right_digits(completions, answer, **columns):
    """The share of the answer's characters that are right. `answer` is a column of the data, as any other would be."""
    return [sum(a == b for a, b in zip(text, want)) / len(want) for text, want in zip(completions, answer)]


def brief(completions, **columns):
    """Minus the length. None says that a completion cannot be scored: it is left out."""
    return [-len(text) / 4 if text else None for text in completions]


def main(steps: int = 3) -> list[str]:
    samples = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(32)]
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            output=folder + "/run",
            reward_weights=(1.0, 0.1),
            steps=steps,
            prompts_per_step=8,
            num_generations=4,
            max_new_tokens=4,
            hidden_size=32,
            num_layers=1,
            learning_rate=1e-3,
            eval_steps=0,
        )
        train(config, task=samples, reward_functions=[right_digits, brief])
        return (Path(folder) / "run/metrics.jsonl").read_text().splitlines()


if __name__ == "__main__":
    print("\n".join(main()))
