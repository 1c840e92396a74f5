"""Group-relative policy optimisation with verifiable rewards.

A step samples a group of completions for each of some prompts, scores them, and takes a few updates on one of the
objectives of `fused_rlhf.objectives`, by default the clipped one of GRPO (DeepSeekMath, arXiv:2402.03300),

    loss = mean over sequences of mean over tokens of  -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta KL

with r = exp(logprob - old logprob), A the group-normalised reward and KL an estimate against the frozen model the steps
began with. Current, old and reference log-probs come from one op, which never holds the logits. In Python:
`train(Config(task="arithmetic", warmup_steps=300, learning_rate=3e-4))`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

import fused_rlhf as fr
from fused_rlhf import advantages
from fused_rlhf.trainers import data, engine, evaluation, loop, planning, rewards, rollout, warmup
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.data import Sample, Task
from fused_rlhf.trainers.engine import Engine, Placed
from fused_rlhf.trainers.grpo_config import Config
from fused_rlhf.trainers.inputs import encode_prompt
from fused_rlhf.trainers.loop import Metrics, Result, Run, Verbs
from fused_rlhf.trainers.rollout import Completions, Sampler, minibatches, slices

__all__ = ["Config", "Result", "State", "fit", "plan", "prepare", "train"]

SHOWN = ("reward", "reward_std", "kl", "clip_ratio/region_mean", "accuracy")
PLOTTED = ("accuracy", "reward", "reward_std", "loss", "kl", "clip_ratio/region_mean", "grad_norm", "completion_length")


@dataclass
class State:
    """What the steps of a run share."""

    config: Config
    task: Task
    rewards: Sequence[rewards.Reward]
    loaded: models.Loaded
    engine: Engine
    reference: Placed | None  # None where beta is 0, and with LoRA, where it is the model without its adapters
    sampler: Sampler | None  # None: the model itself
    run: Run
    longest_prompt: int


@dataclass(frozen=True)
class Batch:
    """This process's B completions of one rollout, those of a prompt side by side, T tokens at most."""

    samples: Sequence[Sample]
    completions: Completions
    scores: Tensor  # (B, number of rewards) fp32, NaN where unscorable
    rewards: Tensor  # (B,) fp32, their weighted sum
    lengths: Tensor  # (B,) tokens of each completion
    advantages: Tensor  # (B,) fp32
    old_logprobs: Tensor | None  # (B, T - 1) fp32; None where the only update is on-policy
    ref_logprobs: Tensor | None  # (B, T - 1) fp32; None where beta is 0


def train(
    config: Config,
    *,
    task: Task | Sequence[Sample] | None = None,
    reward_functions: Sequence[rewards.Reward] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    sampler: Sampler | None = None,
) -> Result:
    """Run GRPO as `config` says; task (or a list of samples), rewards, model and tokenizer may be given as objects.

    `sampler` takes the place of the model in rollouts: an inference engine, say, that reports its log-probs.

    Raises ValueError, TypeError or OSError for bad input before the first step; RewardError and NonFiniteLoss during
    the run, with a checkpoint left behind. Ctrl-C leaves the model in `<output>/model`, says so, and goes on as
    KeyboardInterrupt.
    """
    return fit(prepare(config, task, reward_functions, model, tokenizer, sampler))


def prepare(
    config: Config,
    task: Task | Sequence[Sample] | None = None,
    reward_functions: Sequence[rewards.Reward] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    sampler: Sampler | None = None,
) -> State:
    """Load and check everything, so that what can be refused is refused before the first step; writes nothing."""
    accelerator = engine.start(config)
    processes, n = accelerator.num_processes, config.prompts_per_step
    share = config.num_minibatches * processes
    require(processes == 1 or n % share == 0, "prompts_per_step", n, f"a multiple of {share}, the mini-batches' shares")
    external = config.importance_sampling != "none"
    require(sampler is not None or not external, "importance_sampling", config.importance_sampling, "a sampler with it")
    if task is None:
        task = data.load(config.task, config.data, max_operand=config.max_operand, seed=config.seed)
    elif not isinstance(task, Task):
        task = data.in_memory(task, seed=config.seed)
    data.check(task)
    functions = rewards.choose(
        reward_functions, config.rewards, config.reward_weights, task, config.reward_timeout, accelerator.device
    )
    loaded = models.load_for(config, model, tokenizer)
    longest = rollout.longest_prompt(loaded, task, config)
    fr.backends.resolve(config.backend, next(loaded.model.parameters()).to(accelerator.device))
    frozen = copy.deepcopy(loaded.model) if config.beta and not config.lora_r else None
    placed = Engine(config, accelerator, loaded.model, config.steps * config.num_iterations * config.num_minibatches)
    reference = None if frozen is None else placed.frozen(frozen)
    return State(config, task, functions, loaded, placed, reference, sampler, Run(placed), longest)


def plan(state: State) -> str:
    """What the run would do and need, for `--dry-run`."""
    config = state.config
    sequences = config.prompts_per_step * config.num_generations
    return planning.describe(
        state.engine,
        state.loaded,
        reference=state.reference is not None,
        sequences=sequences,
        length=state.longest_prompt + config.max_new_tokens,
        updates_per_step=config.num_iterations * config.num_minibatches,
        data=f"{len(state.task.train)} training and {len(state.task.test)} test prompts; {state.task.note}",
    )


def fit(state: State) -> Result:
    """The run itself: warm-up, accuracy, the steps of GRPO, accuracy."""
    config, task, run = state.config, state.task, state.run
    size = state.loaded.model.num_parameters()
    run.say(f"{size:,} parameters; {len(task.train)} training and {len(task.test)} test prompts")
    if task.note:
        run.say(task.note)
    n = config.prompts_per_step
    kept = config.warmup_steps > 0 and state.reference is not None
    verbs = Verbs(
        name="GRPO",
        step=partial(step, state),
        evaluate=partial(evaluate, state),
        export=partial(models.save, state.engine, state.loaded),
        shown=SHOWN,
        plotted=PLOTTED,
        describe=evaluation.describe,
        batch=lambda i: f"prompts {(i - 1) * n} to {i * n - 1} of the shuffled training set",
        warm=partial(warm, state) if config.warmup_steps else None,
        controllers={"reference": state.reference} if kept and state.reference else None,
    )
    return loop.fit(run, verbs)


def warm(state: State) -> None:
    """Supervised steps; the reference begins where they end."""
    warmup.warm_up(state.run, state.loaded, state.task, state.config)
    if state.reference is not None:
        engine.copy_parameters(state.engine.module, state.reference.module)


def step(state: State, number: int) -> Metrics:
    """One rollout and its updates."""
    config, n = state.config, state.config.prompts_per_step
    prompts = data.batch_at(state.task.train, config.seed, (number - 1) * n, n)
    batch = collect(state, number, prompts)
    metrics = summary(state, batch) | update(state, batch)
    if config.sample_steps and (number == 1 or number % config.sample_steps == 0):
        rows = zip(batch.samples, batch.completions.texts, batch.rewards.tolist())
        state.run.samples(number, [{**sample, "completion": text, "reward": reward} for sample, text, reward in rows])
    return metrics


@torch.no_grad()
def collect(state: State, number: int, prompts: Sequence[Sample]) -> Batch:
    """Sample `num_generations` completions of this process's prompts, score them, take old and reference log-probs."""
    config, G = state.config, state.config.num_generations
    own = rollout.own_rows(state.engine, len(prompts), config)
    samples = [prompts[i] for i in own for _ in range(G)]
    completions = sample_completions(state, number, prompts, own)
    scores = evaluation.score_together(state.engine, state.rewards, completions, samples, config.reward_timeout)
    lengths = completions.completion_mask.sum(dim=1)
    weights = config.reward_weights or [1.0] * len(state.rewards)
    values = relative_rewards(state, scores, weights, lengths)
    if config.mask_truncated:
        completions = completions.without_truncated()
    old = logprobs(state, state.engine, completions) if config.off_policy else None
    ref = None
    if config.beta:
        with models.without_adapters(state.loaded.model) if config.lora_r else nullcontext():
            ref = logprobs(state, state.reference or state.engine, completions)
    total = advantages.weighted_sum(scores, weights)
    return Batch(samples, completions, scores, total, lengths, values, old, ref)


def sample_completions(state: State, number: int, prompts: Sequence[Sample], own: Sequence[int]) -> Completions:
    config, loaded, G = state.config, state.loaded, state.config.num_generations
    encoded = [encode_prompt(loaded.tokenizer, loaded.processor, prompts[i], config.chat_template) for i in own]
    encoded = [prompt for prompt in encoded for _ in range(G)]
    if state.sampler is not None:
        tokens, sampled = state.sampler([prompt.ids for prompt in encoded])
        ends = rollout.eos_ids(loaded.model, loaded.tokenizer)
        return rollout.assemble(encoded, tokens, ends, loaded.tokenizer, state.engine.device, sampled)
    drawn = rollout.uniforms(config.seed, number, len(prompts) * G, config.max_new_tokens)
    with state.engine.whole():
        return rollout.generate(
            loaded.model,
            loaded.tokenizer,
            encoded,
            max_new_tokens=config.max_new_tokens,
            uniforms=drawn.view(len(prompts), G, -1)[list(own)].flatten(0, 1),
            temperature=config.temperature,
            batch_size=config.rollout_batch_size or None,
        )


def relative_rewards(state: State, scores: Tensor, weights: Sequence[float], lengths: Tensor) -> Tensor:
    """(B,) advantages; statistics of the batch are those of all processes."""
    config, G, B = state.config, state.config.num_generations, len(scores)
    if config.baseline == "leave_one_out":
        return advantages.rloo_advantages(advantages.weighted_sum(scores, weights), G)
    if config.baseline == "length_weighted":
        return advantages.opo_advantages(advantages.weighted_sum(scores, weights), lengths, G)
    everyone = state.engine.accelerator.gather(scores) if state.engine.world > 1 else scores
    values = advantages.combine_rewards(everyone, weights, G, config.combine_rewards, config.scale_rewards)
    return values[state.engine.rank * B : (state.engine.rank + 1) * B]


def logprobs(state: State, placed: Placed, completions: Completions) -> Tensor:
    """Log-probs of the completions, (B, T - 1), 0 elsewhere; over the very micro-batches of the updates.

    A matrix product's last bits may depend on its number of rows: with the same rows, the ratio is 1 on-policy.
    """
    config = state.config
    B, T = completions.input_ids.shape

    def of(model: Any, some: Completions) -> Tensor:
        return fr.lm_head.logprobs(
            model,
            some.input_ids,
            some.attention_mask,
            completion_mask=some.completion_mask,
            temperature=config.temperature,
            backend=config.backend,
            **some.model_inputs(),
        ).logprobs

    result = torch.zeros(B, T - 1, device=completions.input_ids.device)
    for rows in (micro for mini in minibatches(B, config) for micro in slices(mini, config.micro_batch_size)):
        some = completions[rows]
        result[rows, : some.input_ids.shape[1] - 1] = placed(of, some)
    return result


def update(state: State, batch: Batch) -> Metrics:
    """`num_iterations` passes of `num_minibatches` updates each; -> metrics, means over the updates."""
    config = state.config
    updates: list[Metrics] = []
    for mini in minibatches(len(batch.samples), config) * config.num_iterations:
        rows = slices(mini, config.micro_batch_size)
        num_sequences = (mini.stop - mini.start) * state.engine.world
        num_tokens = state.engine.sum(batch.completions.completion_mask[mini].sum()).clamp(min=1)
        if config.objective == "bnpo":  # a mean over each micro-batch's own tokens
            own = [batch.completions.completion_mask[micro].sum().clamp(min=1) for micro in rows]
            counts = [count * len(rows) * state.engine.world for count in own]
        else:
            counts = [num_tokens] * len(rows)
        pieces = [(config, batch, micro, num_sequences, num_tokens, count) for micro, count in zip(rows, counts)]
        updates.append(state.engine.update(policy_loss, pieces))
    result = {name: sum(metrics[name] for metrics in updates) / len(updates) for name in updates[0]}
    result["ratio_var"] = result.pop("ratio_sq") - result["ratio_mean"] ** 2
    return result | {"learning_rate": updates[-1]["learning_rate"]}


def policy_loss(
    model: Any, config: Config, batch: Batch, rows: slice, num_sequences: int, num_tokens: Tensor, normaliser: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of some rows in the loss of a mini-batch with these counts, and in its metrics."""
    some = batch.completions[rows]
    width = some.input_ids.shape[1] - 1
    objective = config.loss()
    more = {"output_router_logits": True} if config.router_aux_loss_coef else {}
    inputs = fr.lm_head.forward(model, some.input_ids, some.attention_mask, **some.model_inputs(), **more)
    loss, means = fr.linear_policy_loss(
        inputs.hidden[:, :-1],
        inputs.head.weight,
        some.input_ids[:, 1:],
        advantages=batch.advantages[rows],
        completion_mask=some.completion_mask[:, 1:],
        old_logprobs=None if batch.old_logprobs is None else batch.old_logprobs[rows, :width],
        ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs[rows, :width],
        sampling_logprobs=some.sampling_logprobs if config.importance_sampling != "none" else None,
        objective=objective,
        num_sequences=num_sequences,
        num_tokens=normaliser,
        temperature=config.temperature,
        outputs=("entropy",),
        backend=config.backend,
        **inputs.head.kwargs(),
    )
    of_tokens = some.completion_mask.sum() / num_tokens
    of_rows = torch.full_like(of_tokens, (rows.stop - rows.start) / num_sequences)
    if inputs.aux_loss is not None and config.router_aux_loss_coef:
        loss = loss + config.router_aux_loss_coef * of_rows * inputs.aux_loss
    means["ratio_sq"] = means.pop("ratio_var") + means["ratio_mean"].square()
    whole = objective.level in ("sequence", "sequence_sum")
    return loss, {name: value * share(name, whole, of_tokens, of_rows) for name, value in means.items()}


def share(name: str, whole: bool, of_tokens: Tensor, of_rows: Tensor) -> Tensor | float:
    """What a micro-batch's metric counts for: extremes as they are, means over tokens or over sequences by their number."""
    if name.endswith(("_min", "_max")):
        return 1.0
    return of_rows if name == "phi_mean" or (whole and name.startswith("clip_ratio/")) else of_tokens


def summary(state: State, batch: Batch) -> Metrics:
    """Rewards and lengths of a rollout, over all processes; NaN where nothing could be scored."""
    some, one = batch.completions, state.engine.world == 1
    table = torch.cat(
        [batch.rewards[:, None], batch.lengths[:, None].float(), some.truncated[:, None].float(), batch.scores], dim=1
    )
    table = table if one else state.engine.accelerator.gather(table)
    total, lengths, truncated, *scores = table.unbind(dim=1)
    spread = advantages.std(total.view(-1, state.config.num_generations))
    metrics = {
        "reward": total.nanmean(),
        "reward_std": spread.mean(),
        "frac_reward_zero_std": (spread == 0).float().mean(),
        "frac_unscorable": total.isnan().float().mean(),
        "completion_length": lengths.mean(),
        "completion_length/min": lengths.min(),
        "completion_length/max": lengths.max(),
        "truncated": truncated.mean(),
    }
    for function, column in zip(state.rewards, scores):
        metrics[f"rewards/{rewards.name_of(function)}"] = column.nanmean()
        metrics[f"rewards/{rewards.name_of(function)}/std"] = advantages.std(column[None])[0]
    if some.sampling_logprobs is not None and batch.old_logprobs is not None:
        mask = some.completion_mask[:, 1:]
        difference = (batch.old_logprobs - some.sampling_logprobs).abs().nan_to_num(0.0) * mask
        sums = state.engine.sum(torch.stack([difference.sum(), mask.sum()]))
        metrics["sampling/logprob_difference"] = sums[0] / sums[1].clamp(min=1)
    return {name: value.item() for name, value in metrics.items()}


def evaluate(state: State) -> Metrics:
    """Accuracies on the first `eval_samples` test samples."""
    task, samples = state.task, state.task.test[: state.config.eval_samples or None]
    right = evaluation.correct(state.engine, state.loaded, task, state.config, samples)
    return evaluation.accuracies(right, samples, task.train)
