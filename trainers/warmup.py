"""Supervised steps on prompts and their answers, so that a small model has something to explore from.

loss = -mean over answer tokens (EOS included) of log p(token)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

import fused_rlhf as fr
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.data import Sample, Task, batch_at
from fused_rlhf.trainers.evaluation import correct
from fused_rlhf.trainers.inputs import encode_prompt
from fused_rlhf.trainers.loop import Run
from fused_rlhf.trainers.model import Loaded
from fused_rlhf.trainers.rollout import Completions, assemble, slices
from fused_rlhf.trainers.rollout_config import RolloutConfig

EVAL_SAMPLES = 256
EVAL_STEPS = 25


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
    run: Run, loaded: Loaded, task: Task, config: RolloutConfig, loss: Callable[..., Any] = supervised_loss
) -> None:
    """Train the engine's module on the training answers, by the `loss` that suits it.

    At most `warmup_steps` steps; fewer where greedy answers reach `warmup_accuracy`.
    """
    engine, size, steps = run.engine, config.warmup_batch_size, config.warmup_steps
    require(size % engine.world == 0, "warmup_batch_size", size, f"a multiple of {engine.world}, the processes")
    some = batch_at(task.train, config.seed, 0, min(EVAL_SAMPLES, len(task.train)))
    ramp = max(min(50, steps // 4), 1)
    apart = engine.apart(config.warmup_learning_rate, lambda update: min((update + 1) / ramp, 1.0))
    for step in run.steps(steps, "warm-up"):
        mine = engine.mine(batch_at(task.train, config.seed, (step - 1) * size, size))
        batch = encode(loaded, mine, config.chat_template)
        num_tokens = engine.sum(batch.completion_mask.sum())
        rows = slices(slice(0, len(batch.texts)), config.micro_batch_size)
        metrics = apart.update(loss, [(batch[micro], num_tokens, config.backend) for micro in rows])
        shown = {"loss": metrics["loss"]}
        if step % EVAL_STEPS == 0 or step == steps:
            shown["accuracy"] = correct(engine, loaded, task, config, some).mean().item()
        run.log("warmup", step, shown, show=("loss", "accuracy"))
        if shown.get("accuracy", 0.0) >= config.warmup_accuracy:
            break
