"""A GRPO script of TRL, with one import changed: the head's log-probs come from fused-rlhf."""

import tempfile

import torch
from datasets import Dataset
from trl import GRPOConfig

# from trl import GRPOTrainer
from fused_rlhf.integrations.trl import FusedGRPOTrainer as GRPOTrainer
from fused_rlhf.trainers.model import build


def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def main(steps: int = 3) -> list[dict[str, float]]:
    torch.manual_seed(0)
    model, tokenizer = build(hidden_size=32, num_layers=1)
    prompts = Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(16)])
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=8,
            max_steps=steps,
            logging_steps=1,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
        )
        trainer = GRPOTrainer(model, digits, args=config, train_dataset=prompts, processing_class=tokenizer)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
