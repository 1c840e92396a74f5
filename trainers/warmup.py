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

IGNORE = -100


def encode(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """-> input_ids (B, T) padded on the right, attention_mask (B, T) bool, targets (B, T - 1) with -100 at the prompt."""
    prompts = [tokenizer(sample["prompt"])["input_ids"] for sample in samples]
    answers = [
        [*tokenizer(str(sample["answer"]), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for sample in samples
    ]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(samples), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros(len(samples), length, dtype=torch.bool)
    targets = torch.full((len(samples), length - 1), IGNORE)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        attention_mask[row, :end] = True
        targets[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    return input_ids, attention_mask, targets


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
    head = fr.lm_head.find_head(model)
    for step in run.steps(steps, "warm-up"):
        input_ids, attention_mask, targets = (
            x.to(model.device) for x in encode(tokenizer, rng.choices(samples, k=batch_size))
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(step / ramp, 1.0)
        with accelerator.autocast():
            hidden = fr.lm_head.hidden_states(model, input_ids, attention_mask)[:, :-1]
            out = fr.linear_logprobs(
                hidden, head.weight, targets, bias=head.bias, ignore_index=IGNORE, backend=backend, **head.kwargs()
            )
        loss = -out.logprobs.sum() / (targets != IGNORE).sum()
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
