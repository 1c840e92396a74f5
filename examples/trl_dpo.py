"""A DPO script of TRL, untouched but for `patch_trl()` on top: as for a script that is not one's own."""

import tempfile

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from fused_rlhf.integrations.trl import patched_trl  # patch_trl() for the whole process
from fused_rlhf.trainers.model import build


def main(steps: int = 3) -> list[dict[str, float]]:
    torch.manual_seed(0)
    model, tokenizer = build(hidden_size=32, num_layers=1)
    pairs = Dataset.from_list([{"prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": f"{i}"} for i in range(16)])
    with tempfile.TemporaryDirectory() as folder, patched_trl():
        config = DPOConfig(
            folder,
            per_device_train_batch_size=4,
            max_steps=steps,
            logging_steps=1,
            learning_rate=1e-3,
            precompute_ref_log_probs=True,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
        )
        trainer = DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
