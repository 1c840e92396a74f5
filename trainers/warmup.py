"""Supervised steps on prompts and their answers, so that a small model has something to explore from.

loss = -mean over answer tokens (EOS included) of log p(token)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fused_rlhf as fr
from fused_rlhf.trainers.data import Sample
from fused_rlhf.trainers.loop import Run


def encode(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """-> input_ids (B, T) padded on the right, attention_mask and answer_mask (B, T) bool; the EOS is of the answer."""
    prompts = [tokenizer(sample["prompt"])["input_ids"] for sample in samples]
    answers = [tokenizer(str(sample["answer"]), add_special_tokens=False)["input_ids"] for sample in samples]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)) + 1
    input_ids = torch.full((len(samples), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros(len(samples), length, dtype=torch.bool)
    answer_mask = torch.zeros(len(samples), length, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer) + 1
        input_ids[row, :end] = torch.tensor([*prompt, *answer, tokenizer.eos_token_id])
        attention_mask[row, :end] = True
        answer_mask[row, len(prompt) : end] = True
    return input_ids, attention_mask, answer_mask


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    run: Run,
    accelerator: Accelerator,
    steps: int,
    batch_size: int,
    learning_rate: float,
    evaluate: Callable[[], float],
    until: float = 1.0,
    eval_every: int = 25,
    seed: int = 0,
    backend: str = "auto",
) -> None:
    """At most `steps` steps of AdamW; fewer where `evaluate()`, called every `eval_every` steps, reaches `until`."""
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0))
    ramp = max(min(50, steps // 4), 1)
    rng = random.Random(seed)
    for step in run.steps(steps, "warm-up"):
        input_ids, attention_mask, answer_mask = (
            x.to(model.device) for x in encode(tokenizer, rng.choices(samples, k=batch_size))
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(step / ramp, 1.0)
        with accelerator.autocast():
            out = fr.lm_head.logprobs(model, input_ids, attention_mask, completion_mask=answer_mask, backend=backend)
        loss = -out.logprobs.sum() / answer_mask.sum()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        metrics = {"loss": loss.item()}
        if step % eval_every == 0 or step == steps:
            metrics["accuracy"] = evaluate()
        run.log("warmup", step, metrics, show=("loss", "accuracy"))
        if metrics.get("accuracy", 0.0) >= until:
            break
