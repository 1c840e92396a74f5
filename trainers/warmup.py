"""Supervised steps on prompts and their answers, so that a small model has something to explore from.

loss = -mean over answer tokens (EOS included) of log p(token)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import fused_rlhf as fr
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.data import Sample, batch_at
from fused_rlhf.trainers.inputs import encode_prompt
from fused_rlhf.trainers.loop import Run
from fused_rlhf.trainers.model import Loaded
from fused_rlhf.trainers.rollout import Completions, assemble, slices


@dataclass(frozen=True)
class Plan:
    """At most `steps` steps of AdamW; fewer where `evaluate()`, called every `eval_every` steps, reaches `until`."""

    steps: int
    batch_size: int
    learning_rate: float
    evaluate: Callable[[], float]
    until: float = 1.0
    eval_every: int = 25


def encode(loaded: Loaded, samples: Sequence[Sample], chat_template: bool = False) -> Completions:
    """Prompts followed by their answers, as if the model had given them."""
    tokenizer = loaded.tokenizer
    prompts = [encode_prompt(tokenizer, loaded.processor, sample, chat_template) for sample in samples]
    answers = [tokenizer(str(sample["answer"]), add_special_tokens=False)["input_ids"] for sample in samples]
    ended = [[*answer, tokenizer.eos_token_id] for answer in answers]
    return assemble(prompts, ended, [tokenizer.eos_token_id], tokenizer, loaded.model.device)


def supervised_loss(
    model: Any, some: Completions, num_tokens: Tensor, backend: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of some rows in the loss of a batch with this many answer tokens."""
    out = fr.lm_head.logprobs(
        model,
        some.input_ids,
        some.attention_mask,
        completion_mask=some.completion_mask,
        backend=backend,
        **some.model_inputs(),
    )
    return -out.logprobs.sum() / num_tokens, {}


def warm_up(
    run: Run, loaded: Loaded, samples: Sequence[Sample], plan: Plan, loss: Callable[..., Any] = supervised_loss
) -> None:
    """Train the engine's module on the samples' answers, by the `loss` that suits it."""
    config, engine = run.config, run.engine
    even = plan.batch_size % engine.world == 0
    require(even, "warmup_batch_size", plan.batch_size, f"a multiple of {engine.world}, the processes")
    ramp = max(min(50, plan.steps // 4), 1)
    apart = engine.apart(plan.learning_rate, lambda update: min((update + 1) / ramp, 1.0))
    for step in run.steps(plan.steps, "warm-up"):
        batch = batch_at(samples, config.seed, (step - 1) * plan.batch_size, plan.batch_size)
        some = encode(loaded, engine.mine(batch), config.chat_template)
        num_tokens = engine.sum(some.completion_mask.sum())
        rows = slices(slice(0, len(some.texts)), config.micro_batch_size)
        metrics = apart.update(loss, [(some[micro], num_tokens, config.backend) for micro in rows])
        shown = {"loss": metrics["loss"]}
        if step % plan.eval_every == 0 or step == plan.steps:
            shown["accuracy"] = plan.evaluate()
        run.log("warmup", step, shown, show=("loss", "accuracy"))
        if shown.get("accuracy", 0.0) >= plan.until:
            break
