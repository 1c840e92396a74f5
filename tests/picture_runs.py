"""Runs of the command line over rows of which one in four has pictures."""

from __future__ import annotations

import json
from pathlib import Path

from fused_rlhf.bench.picture_rows import picture
from tests.vision_families import FAMILIES


def picture_run(folder: Path, family: str, command: str) -> list[str]:
    """The flags of such a run; its model and data are written to the folder."""
    folder.mkdir(exist_ok=True)
    model, processor = FAMILIES[family]()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = []
    for i in range(16):
        prompt = [{"role": "user", "content": f"What is {i}?"}]
        row = {"prompt": prompt, "chosen": f"{i}", "rejected": f"{i + 1}", "answer": f"{i}"}
        if i % 4 == 0:
            picture(15 * i, 24 + 4 * i, 32).save(folder / f"{i}.png")
            row["images"] = [f"{i}.png"] * (1 + i % 8 // 4)
        rows.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    flags = f"{command} --model {folder / 'model'} --data {folder / 'rows.jsonl'} --steps 4 --learning-rate 1e-3"
    flags += " --eval-steps 0 --save-steps 0 --sample-steps 0 --eval-samples 2 --threads 1"
    if command == "dpo":
        return [*flags.split(), "--batch-size", "4", "--micro-batch-size", "4", "--num-test", "2"]
    flags += " --task prompts --rewards length=2 --prompts-per-step 4 --max-new-tokens 3 --micro-batch-size 4"
    more = "--num-generations 2 --beta 0.1" if command == "grpo" else "--value-model copy --num-ppo-epochs 2"
    return [*flags.split(), *more.split(), "--num-minibatches", "2"]
