"""Group-relative policy optimisation with verifiable rewards.

A step samples a group of completions for each of some prompts, scores them, and takes a few clipped updates on

    loss = mean over sequences of mean over tokens of  -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta KL

with r = exp(logprob - old logprob), A the group-normalised reward and KL the k3 estimate against the frozen model the
steps began with (DeepSeekMath, arXiv:2402.03300). Current, old and reference log-probs come from one op, which never
holds the logits. In Python: `train(Config(task="arithmetic", warmup_steps=300, learning_rate=3e-4))`.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

import fused_rlhf as fr
from fused_rlhf.trainers import data, evaluation, rewards, rollout
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.data import Sample, Task
from fused_rlhf.trainers.grpo_config import Config
from fused_rlhf.trainers.loop import Run, require
from fused_rlhf.trainers.rollout import Completions, slices
from fused_rlhf.trainers.warmup import warm_up

SHOWN = ("reward", "reward_std", "kl", "clip_ratio/region_mean", "accuracy")
PLOTTED = ("accuracy", "reward", "reward_std", "loss", "kl", "clip_ratio/region_mean", "grad_norm", "completion_length")


@dataclass(frozen=True)
class Result:
    """What a run leaves. Before and after the GRPO steps: accuracy, and accuracy_unseen, on prompts not trained on."""

    before: dict[str, float]
    after: dict[str, float]
    seconds: float
    model_path: Path
    metrics: list[dict[str, Any]]  # the rows of metrics.jsonl


@dataclass
class State:
    """What the steps of a run share."""

    config: Config
    task: Task
    rewards: Sequence[rewards.Reward]
    model: PreTrainedModel
    reference: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    optimizer: Any
    scheduler: Any
    run: Run


@dataclass(frozen=True)
class Batch:
    """B completions of one rollout, those of a prompt side by side, T tokens at most."""

    samples: Sequence[Sample]
    completions: Completions
    scores: Tensor  # (B, number of rewards) fp32, NaN where unscorable
    rewards: Tensor  # (B,) fp32, their weighted sum
    advantages: Tensor  # (B,) fp32
    old_logprobs: Tensor | None  # (B, T - 1) fp32; None where the only update is on-policy
    ref_logprobs: Tensor | None  # (B, T - 1) fp32; None where beta is 0


def train(
    config: Config,
    *,
    task: Task | None = None,
    reward_functions: Sequence[rewards.Reward] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Result:
    """Run GRPO as `config` says; task, reward functions, model and tokenizer may be given as objects instead.

    Raises ValueError, TypeError or OSError for bad input before the first step. Ctrl-C leaves a checkpoint in
    `<output>/model`, says so, and goes on as KeyboardInterrupt.
    """
    return fit(prepare(config, task, reward_functions, model, tokenizer))


def fit(state: State) -> Result:
    """The run itself: warm-up, accuracy, the steps of GRPO, accuracy."""
    config, run = state.config, state.run
    try:
        warm(state)
        before = evaluate(state)
        run.log("grpo", 0, before)
        run.say(f"before GRPO: {evaluation.describe(before)}")
        if config.beta:
            state.reference = copy.deepcopy(state.model).requires_grad_(False)
        prompts = data.endless(state.task.train, config.seed)
        for step in run.steps(config.steps, "GRPO"):
            batch = collect(state, [next(prompts) for _ in range(config.prompts_per_step)])
            metrics = summary(state, batch) | update(state, batch)
            report(state, step, batch, metrics)
        after = evaluate(state)
    except KeyboardInterrupt:
        save(state)
        run.say(f"interrupted; the model as it is now lies in {run.model_path}")
        raise
    run.log("grpo", config.steps, after)
    save(state)
    run.say(f"after GRPO: {evaluation.describe(after)}; {run.seconds():.0f} s in all")
    return Result(before, after, run.seconds(), run.model_path, run.metrics)


def prepare(
    config: Config,
    task: Task | None = None,
    reward_functions: Sequence[rewards.Reward] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> State:
    """Load and check everything, so that what can be refused is refused before the first step."""
    set_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    AcceleratorState._reset_state()  # else a second run in one process could have no other precision
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    processes = accelerator.num_processes
    require(processes == 1, "num_processes", processes, "1: a run in several processes is not supported yet")
    task = task or data.load(config.task, config.data, max_operand=config.max_operand, seed=config.seed)
    data.check(task)
    functions = list(reward_functions or map(rewards.resolve, config.rewards or (task.reward,)))
    if config.reward_weights:
        require(len(config.reward_weights) == len(functions), "reward_weights", config.reward_weights, "one per reward")
    rewards.dry_run(functions, task.train)
    require((model is None) == (tokenizer is None), "model, tokenizer", (model, tokenizer), "both or neither")
    if model is None or tokenizer is None:
        sizes = config.hidden_size, config.num_layers
        model, tokenizer = models.load(config.model) if config.model else models.build(*sizes)
    if config.chat_template:
        task = data.apply_chat_template(task, tokenizer)
    rollout.check_lengths(model, tokenizer, task, config.max_new_tokens)
    # Without dropout, which would make the log-probs of one token differ from call to call.
    model = model.eval().to(accelerator.device)
    fr.backends.resolve(config.backend, next(model.parameters()))
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0))
    updates = config.steps * config.num_iterations * config.num_minibatches
    scheduler = get_scheduler(config.lr_schedule, optimizer.optimizer, config.lr_warmup_updates, updates)
    run = Run(config.output, config, overwrite=config.overwrite)
    run.say(f"{model.num_parameters():,} parameters; {len(task.train)} training and {len(task.test)} test prompts")
    if task.note:
        run.say(task.note)
    return State(config, task, functions, model, None, tokenizer, accelerator, optimizer, scheduler, run)


def warm(state: State) -> None:
    config = state.config
    if config.warmup_steps:
        some = random.Random(config.seed).sample(state.task.train, min(256, len(state.task.train)))
        warm_up(
            state.model,
            state.tokenizer,
            state.task.train,
            run=state.run,
            accelerator=state.accelerator,
            steps=config.warmup_steps,
            batch_size=config.warmup_batch_size,
            learning_rate=config.warmup_learning_rate,
            until=config.warmup_accuracy,
            evaluate=lambda: float(correct(state, some).mean()),
            seed=config.seed,
            backend=config.backend,
        )


@torch.no_grad()
def collect(state: State, prompts: Sequence[Sample]) -> Batch:
    """Sample `num_generations` completions of each prompt, score them, and take their old and reference log-probs."""
    config = state.config
    samples = [sample for sample in prompts for _ in range(config.num_generations)]
    texts = [sample["prompt"] for sample in samples]
    with state.accelerator.autocast():
        (completions,) = rollout.generate(
            state.model, state.tokenizer, texts, max_new_tokens=config.max_new_tokens, temperature=config.temperature
        )
    scores = rewards.score(state.rewards, completions.texts, samples).to(completions.input_ids.device)
    total = rewards.weighted_sum(scores, config.reward_weights or [1.0] * len(state.rewards))
    advantages = rewards.group_advantages(total, config.num_generations, config.scale_rewards)
    if config.mask_truncated:
        completions = completions.without_truncated()
    off_policy = config.num_iterations * config.num_minibatches > 1
    old_logprobs = logprobs(state, state.model, completions) if off_policy else None
    ref_logprobs = logprobs(state, state.reference, completions) if state.reference is not None else None
    return Batch(samples, completions, scores, total, advantages, old_logprobs, ref_logprobs)


def logprobs(state: State, model: PreTrainedModel, completions: Completions) -> Tensor:
    """Log-probs of the completions, (B, T - 1), 0 elsewhere; over the very micro-batches of the updates.

    A matrix product's last bits may depend on its number of rows: with the same rows, the ratio is 1 on-policy.
    """
    B, T = completions.input_ids.shape
    result = torch.zeros(B, T - 1, device=completions.input_ids.device)
    size = state.config.micro_batch_size
    for rows in (micro for mini in minibatches(state.config, B) for micro in slices(mini, size)):
        some = completions[rows]
        with state.accelerator.autocast():
            result[rows, : some.input_ids.shape[1] - 1] = fr.lm_head.logprobs(
                model,
                some.input_ids,
                some.attention_mask,
                completion_mask=some.completion_mask,
                temperature=state.config.temperature,
                backend=state.config.backend,
            ).logprobs
    return result


def minibatches(config: Config, num_rows: int) -> list[slice]:
    return slices(slice(0, num_rows), num_rows // config.num_minibatches)


def update(state: State, batch: Batch) -> dict[str, float]:
    """`num_iterations` passes of `num_minibatches` updates each; -> metrics, means over the updates."""
    config, accelerator = state.config, state.accelerator
    updates: list[dict[str, Tensor]] = []
    for mini in minibatches(config, len(batch.samples)) * config.num_iterations:
        num_tokens = batch.completions.completion_mask[mini].sum().clamp(min=1)
        metrics: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
        for rows in slices(mini, config.micro_batch_size):
            loss, means = policy_loss(state, batch, rows, mini.stop - mini.start, num_tokens)
            accelerator.backward(loss)
            share = batch.completions.completion_mask[rows].sum() / num_tokens
            metrics["loss"] += loss.detach()
            for name, mean in means.items():
                metrics[name] += share * mean
        metrics["grad_norm"] = accelerator.clip_grad_norm_(state.model.parameters(), config.max_grad_norm)
        if not metrics["loss"].isfinite():
            raise FloatingPointError(f"the loss is {metrics['loss'].item()}; only the last checkpoint is saved")
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.zero_grad()
        updates.append(metrics)
    result = {name: torch.stack([metrics[name] for metrics in updates]).mean().item() for name in updates[0]}
    return result | {"learning_rate": state.scheduler.get_last_lr()[0]}


def policy_loss(
    state: State, batch: Batch, rows: slice, num_sequences: int, num_tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of some rows in the loss of a mini-batch with these counts, and metrics: means over their tokens."""
    some = batch.completions[rows]
    width = some.input_ids.shape[1] - 1
    with state.accelerator.autocast():
        inputs = fr.lm_head.forward(state.model, some.input_ids, some.attention_mask)
        return fr.linear_policy_loss(
            inputs.hidden[:, :-1],
            inputs.head.weight,
            some.input_ids[:, 1:],
            advantages=batch.advantages[rows],
            completion_mask=some.completion_mask[:, 1:],
            old_logprobs=None if batch.old_logprobs is None else batch.old_logprobs[rows, :width],
            ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs[rows, :width],
            objective=state.config.loss(),
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            temperature=state.config.temperature,
            outputs=("entropy",),
            backend=state.config.backend,
            **inputs.head.kwargs(),
        )


def summary(state: State, batch: Batch) -> dict[str, float]:
    """Rewards and lengths of a rollout."""
    groups = batch.rewards.view(-1, state.config.num_generations)
    metrics = {
        "reward": batch.rewards.nanmean(),
        "reward_std": rewards.std(groups).mean(),
        "frac_reward_zero_std": (rewards.std(groups) == 0).float().mean(),
        "completion_length": batch.completions.completion_mask.sum(dim=1).float().mean(),
        "truncated": batch.completions.truncated.float().mean(),
    }
    for function, column in zip(state.rewards, batch.scores.unbind(dim=1)):
        metrics[f"rewards/{rewards.name_of(function)}"] = column.nanmean()
    return {name: value.item() for name, value in metrics.items()}


def report(state: State, step: int, batch: Batch, metrics: dict[str, float]) -> None:
    config, run = state.config, state.run
    if config.eval_steps and step % config.eval_steps == 0 and step < config.steps:
        metrics = metrics | evaluate(state)
    run.log("grpo", step, metrics, show=SHOWN)
    if config.sample_steps and (step == 1 or step % config.sample_steps == 0):
        rows = zip(batch.samples, batch.completions.texts, batch.rewards.tolist())
        run.samples(step, [{**sample, "completion": text, "reward": reward} for sample, text, reward in rows])
    if config.save_steps and step % config.save_steps == 0 and step < config.steps:
        save(state)


def evaluate(state: State) -> dict[str, float]:
    """Accuracies on the first `eval_samples` test samples."""
    task, count = state.task, state.config.eval_samples or None
    return evaluation.accuracies(correct(state, task.test[:count]), task.test[:count], task.train)


def correct(state: State, samples: Sequence[Sample]) -> Tensor:
    with state.accelerator.autocast():
        return evaluation.correct(
            state.model,
            state.tokenizer,
            samples,
            rewards.resolve(state.task.reward),
            max_new_tokens=state.config.max_new_tokens,
            batch_size=state.config.micro_batch_size,
        )


def save(state: State) -> None:
    state.run.save(state.model, state.tokenizer)
    state.run.plot(PLOTTED)
