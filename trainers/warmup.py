"""Supervised steps before a trainer's own, so that a small model has something to explore from; on prompts' answers:

loss = -mean over answer tokens (EOS included) of log p(token)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fused_rlhf.objectives.reductions import Metrics
from fused_rlhf.trainers import conversation
from fused_rlhf.trainers.data import Sample, Task, batch_at
from fused_rlhf.trainers.evaluation import correct
from fused_rlhf.trainers.minibatches import ANY, turns_of
from fused_rlhf.trainers.model import Loaded
from fused_rlhf.trainers.rollout import Completions, assemble, completion_logprobs
from fused_rlhf.trainers.rollout_config import RolloutConfig
from fused_rlhf.trainers.run import Run

EVAL_SAMPLES = 256
EVAL_STEPS = 25


def encode(loaded: Loaded, samples: Sequence[Sample], chat_template: bool = False) -> Completions:
    """Prompts followed by their answers, as if the model had given them."""
    tokenizer, processor = loaded.tokenizer, loaded.processor
    made = [
        conversation.encode(
            tokenizer, processor, sample, str(sample["answer"]), chat_template=chat_template, sampled=True
        )
        for sample in samples
    ]
    prompts = [some.without_last(some.completion) for some in made]
    answers = [some.ids[len(some.prompt) :] for some in made]
    ends, device = [tokenizer.eos_token_id], loaded.model.device
    together = assemble(prompts, answers, ends, tokenizer, device, collator=loaded.collator)
    return replace(together, layout=loaded.layout)


def answer_loss(model: Any, some: Completions, num_tokens: Tensor, backend: str, live: bool) -> tuple[Tensor, Metrics]:
    """The share of some rows in the loss of a batch with this many answer tokens; none where they are not live."""
    return -completion_logprobs(model, some, 1.0, backend).sum() / num_tokens * live, Metrics({})


def on_answers(
    run: Run, loaded: Loaded, task: Task, config: RolloutConfig, loss: Callable[..., Any] = answer_loss
) -> None:
    """Train the engine's module on the training answers, by the `loss` that suits it."""
    engine, size = run.engine, config.warmup_batch_size
    some = batch_at(task.train, config.seed, 0, min(EVAL_SAMPLES, len(task.train)))

    def pieces(step: int) -> list[tuple[Any, ...]]:
        mine = engine.mine(batch_at(task.train, config.seed, (step - 1) * size, size))
        batch = encode(loaded, mine, config.chat_template)
        num_tokens = engine.sum(batch.completion_mask.sum())
        rows = range(len(batch.texts))
        (turn,) = turns_of(engine, [rows], [True] * len(rows), batch.sizes(), config)
        return [(batch[micro or ANY], num_tokens, config.backend, bool(micro)) for micro in turn.micro]

    def accuracy() -> float:
        return correct(engine, loaded, task, config, some).mean().item()

    supervise(run, loss, pieces, accuracy=accuracy, enough=config.warmup_accuracy)


def supervise(
    run: Run,
    loss: Callable[..., tuple[Tensor, Metrics]],
    pieces: Callable[[int], Sequence[tuple[Any, ...]]],
    *,
    accuracy: Callable[[], float] | None = None,
    enough: float = 1.0,
    decay: bool = False,
) -> None:
    """`warmup_steps` updates with an optimiser of their own, or fewer.

    Args:
        loss, pieces: what `Engine.update` takes; pieces(step) of steps 1, 2 ...
        accuracy: asked every `EVAL_STEPS` steps; the warm-up ends once it is `enough`.
        decay: the learning rate falls to 0 at the end, linearly; else it stays at its peak.
    """
    config = run.config
    steps, ramp = config.warmup_steps, max(min(50, config.warmup_steps // 4), 1)
    apart = run.engine.apart(
        config.warmup_learning_rate, lambda update: min((update + 1) / ramp, 1 - update / steps if decay else 1.0)
    )
    for step in run.steps(steps, "warm-up"):
        shown = {"loss": apart.update(loss, pieces(step))["loss"]}
        if accuracy is not None and (step % EVAL_STEPS == 0 or step == steps):
            shown["accuracy"] = accuracy()
        run.log("warmup", step, shown, show=("loss", "accuracy"))
        if shown.get("accuracy", 0.0) >= enough:
            break
