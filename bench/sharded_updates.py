"""Memory of a trainer's update with its head under FSDP2, streamed and made whole: python -m bench.sharded_updates

Two processes over gloo on one CPU; an untied Qwen3 whose head and embedding dominate, as `--fsdp` places it, or replicated. An
update is one of GRPO (without a reference) on completions that are there, or one of DPO with the log-probs of its reference,
a copy of the model. Updates are measured from the second on, the ways in turns: the peak of the resident set of each
process over what it was before the update, and over what it was before the model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from fused_rlhf import lm_head
from fused_rlhf.bench import sharded
from fused_rlhf.bench.document import commit
from fused_rlhf.bench.measure import PeakMemory, release, resident
from fused_rlhf.trainers import dpo, engine, grpo, grpo_rollout
from fused_rlhf.trainers import model as models

SEQUENCES = 4  # of each process
TURNS = 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def model_of(sizes: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden_size,
        intermediate_size=3 * sizes.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=sizes.hidden_size // 8,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


def words(count: int, length: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return ["".join(LETTERS[i] for i in torch.randint(26, (length,), generator=generator)) for _ in range(count)]


def update_of(sizes: argparse.Namespace, folder: str) -> Callable[[], dict[str, float]]:
    """One update of `SEQUENCES` rows of this process."""
    half, total = sizes.length // 2, SEQUENCES * dist.get_world_size()
    options: dict[str, Any] = {"output": folder, "fsdp": sizes.placed == "sharded", "threads": 1, "layout": "padded"}
    options |= {"sample_steps": 0, "eval_steps": 0, "save_steps": 0, "lora_r": sizes.lora_r}
    model, tokenizer = model_of(sizes), models.char_tokenizer()
    if sizes.trainer == "dpo":
        texts = [words(16, half, seed) for seed in range(3)]
        pairs = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(*texts)]
        made = dpo.prepare(dpo.Config(batch_size=total // 2, **options), rows=pairs, model=model, tokenizer=tokenizer)
        return lambda: made.step(1)

    def sampler(prompts: list[list[int]]) -> tuple[list[list[int]], None]:
        return [tokenizer.encode(word) for word in words(len(prompts), half, 7)], None

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    config = grpo.Config(prompts_per_step=total // SEQUENCES, num_generations=SEQUENCES, max_new_tokens=half, **options)
    task = [{"prompt": word} for word in words(16, half, 8)]
    trainer = grpo.prepare(config, task, [reward], model=model, tokenizer=tokenizer, sampler=sampler)
    rollout = grpo_rollout.ready(trainer, 1, grpo_rollout.collect(trainer, 1))
    return lambda: grpo.update(trainer, rollout)


def rank(sizes: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    release()
    imports, found = resident(), []
    with tempfile.TemporaryDirectory() as folder:
        update = update_of(sizes, folder)
        update()  # AdamW's moments, and what is made once
        ways = sharded.WAYS if sizes.placed == "sharded" else ("replicated",)
        for way in ways * TURNS:
            dist.barrier()
            never: Any = mock.patch.object(lm_head, "shards_of", return_value=None)
            with never if way == "whole" else nullcontext(), PeakMemory("cpu") as memory:
                before = resident()
                metrics = update()
            extra = memory.extra or 0
            row = {"way": way, "extra_bytes": extra, "bytes": before + extra - imports}
            found.append(row | {name: metrics[name] for name in ("loss", "grad_norm")})
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        conditions = {"torch": torch.__version__, "commit": commit(), "sequences": SEQUENCES, **vars(sizes)}
        print(json.dumps({"conditions": conditions, "ranks": everyone}, indent=1))
    engine.leave()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=("grpo", "dpo"), default="grpo")
    parser.add_argument("--placed", choices=("sharded", "replicated"), default="sharded")
    parser.add_argument(
        "--lora-r", type=int, default=0, help="0 trains all weights, else embedding and head are frozen"
    )
    parser.add_argument("--vocabulary", type=int, default=60000)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence, half of them prompt")
    return sharded.in_two("fused_rlhf.bench.sharded_updates", parser, rank)


if __name__ == "__main__":
    sys.exit(main())
