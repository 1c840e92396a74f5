"""Group-relative policy optimisation with verifiable rewards.

A step samples a group of completions for each of some prompts, scores them, and takes a few updates on one of the
objectives of `fused_rlhf.objectives`, by default the clipped one of GRPO (DeepSeekMath, arXiv:2402.03300),

    loss = mean over sequences of mean over tokens of  -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta KL

with r = exp(logprob - old logprob), A the group-normalised reward and KL an estimate against the frozen model the steps
began with. Current, old and reference log-probs come from one op, which never holds the logits. In Python:
`train(Config(task="arithmetic", warmup_steps=300, learning_rate=3e-4))`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

import fused_rlhf as fr
from fused_rlhf import advantages
from fused_rlhf.objectives import PolicyLoss
from fused_rlhf.objectives.reductions import Metrics
from fused_rlhf.trainers import data, engine, evaluation, rewards, warmup
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers import rollout as rollouts
from fused_rlhf.trainers.collation import ready
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.data import Sample, Task
from fused_rlhf.trainers.grpo_config import COMPARING, Config
from fused_rlhf.trainers.layout_trial import settle
from fused_rlhf.trainers.minibatches import Rows, chunks, deal, everyones, microbatches, own_prompts
from fused_rlhf.trainers.rollout import Completions
from fused_rlhf.trainers.run import Logged, Run
from fused_rlhf.trainers.sampler import Sampler, sampled, takes
from fused_rlhf.trainers.trainer import Result, Trainer, fit, means, place, plan

__all__ = ["Config", "GRPOTrainer", "Result", "fit", "plan", "prepare", "train"]


@dataclass(kw_only=True)
class GRPOTrainer(Trainer):
    """GRPO's data and verbs. It keeps no reference where beta is 0."""

    config: Config
    task: Task
    rewards: Sequence[rewards.Reward]
    sampler: Sampler | None  # None: the model itself

    name = "GRPO"
    shown = ("reward", "reward_std", "kl", "clip_ratio/region_mean", "accuracy")
    plotted = (
        *("accuracy", "reward", "reward_std", "loss", "kl", "clip_ratio/region_mean", "grad_norm"),
        *("entropy", "completion_length", "score"),
    )

    def objective(self) -> PolicyLoss:
        return self.config.loss()

    def supervise(self) -> None:
        warmup.on_answers(self.run, self.loaded, self.task, self.config)

    def step(self, number: int) -> Logged:
        """One rollout and its updates."""
        n = self.config.prompts_per_step
        rollout = collect(self, number, data.batch_at(self.task.train, self.config.seed, (number - 1) * n, n))
        metrics = summary(self, rollout)
        for name in rewards.names_of(self.rewards):
            if math.isnan(metrics[f"rewards/{name}"]):
                what = f"the reward {name!r} scored no completion (None or NaN for all of them)"
                self.run.warn(what, number, "it teaches nothing so")
        metrics = metrics | update(self, rollout)
        if self.samples_due(number):
            rows = zip(rollout.samples, rollout.completions.texts, rollout.rewards.tolist())
            mine = [{**sample, "completion": text, "reward": reward} for sample, text, reward in rows]
            self.run.samples(number, everyones(self.engine, n, self.config, mine))
        return metrics

    def evaluate(self) -> Logged:
        """Accuracies; where samples have no answers, the mean reward of greedy completions."""
        if evaluation.has_answers(self.task):
            return evaluation.accuracy(self.engine, self.loaded, self.task, self.config)
        weights = self.config.reward_weights or [1.0] * len(self.rewards)
        return evaluation.score(self.engine, self.loaded, self.task, self.config, self.rewards, weights)

    def describe(self, metrics: Logged) -> str:
        return evaluation.describe(metrics)


@dataclass(frozen=True)
class Rollout:
    """This process's B completions of one step, those of a prompt side by side, T tokens at most."""

    samples: Sequence[Sample]
    completions: Completions
    scores: Tensor  # (B, number of rewards) fp32, NaN where unscorable
    rewards: Tensor  # (B,) fp32, their weighted sum
    lengths: Tensor  # (B,) tokens of each completion
    advantages: Tensor  # (B,) fp32
    old_logprobs: Tensor | None  # (B, T - 1) fp32; None where the only update is on-policy
    ref_logprobs: Tensor | None  # (B, T - 1) fp32; None where beta is 0
    updates: Sequence[Rows]  # those of each update that it is for, in their order

    def __getitem__(self, rows: Rows) -> Rollout:
        """Some of the completions, cut to the longest of them."""
        some = self.completions[rows]
        old, ref = (
            None if x is None else x[rows, : some.input_ids.shape[1] - 1]
            for x in (self.old_logprobs, self.ref_logprobs)
        )
        scores, rewards, lengths = self.scores[rows], self.rewards[rows], self.lengths[rows]
        samples, values = [self.samples[row] for row in rows], self.advantages[rows]
        return Rollout(samples, some, scores, rewards, lengths, values, old, ref, ())


def train(
    config: Config,
    *,
    task: Task | Sequence[Sample] | None = None,
    reward_functions: Sequence[rewards.Reward] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    sampler: Sampler | None = None,
    ref_model: PreTrainedModel | None = None,
) -> Result:
    """Run GRPO as `config` says; task (or a list of samples), rewards, model and tokenizer, and the reference may be given
    as objects.

    `sampler` takes the place of the model in rollouts: an inference engine, say, that reports its log-probs.

    Raises ValueError, TypeError or OSError for bad input before the first step; RewardError, SamplerError and
    NonFiniteLoss during the run, with a checkpoint left behind. Ctrl-C leaves the model in `<output>/model`, says so, and
    goes on as KeyboardInterrupt.
    """
    return fit(prepare(config, task, reward_functions, model, tokenizer, sampler, ref_model))


def prepare(
    config: Config,
    task: Task | Sequence[Sample] | None = None,
    reward_functions: Sequence[rewards.Reward] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    sampler: Sampler | None = None,
    ref_model: PreTrainedModel | None = None,
) -> GRPOTrainer:
    """Load and check everything, so that what can be refused is refused before the first step; writes nothing."""
    accelerator = engine.start(config)
    processes, n = accelerator.num_processes, config.prompts_per_step
    share = config.num_minibatches * processes
    require(processes == 1 or n % share == 0, "prompts_per_step", n, f"a multiple of {share}, the mini-batches' shares")
    rows, micro = n * config.num_generations // share, config.micro_batch_size
    whole = not config.compares_tokens or micro >= rows
    words = (
        f"at least {rows}, those of a mini-batch and process: top_entropy_quantile and *_cov compare all of its tokens"
    )
    require(whole, "micro_batch_size", micro, words)
    alone = processes == 1 or config.objective not in COMPARING
    require(
        alone, "objective", config.objective, "another in several processes: it compares all tokens of a mini-batch"
    )
    bounds = (config.importance_sampling_min, config.importance_sampling_max)
    external = config.corrects or bounds != (None, None)
    asked = (config.importance_sampling, *bounds)
    require(sampler is not None or not external, "importance_sampling, its bounds", asked, "a sampler with them")
    threshold, acts = config.off_policy_mask_threshold, sampler is not None or config.off_policy
    require(
        acts or threshold is None, "off_policy_mask_threshold", threshold, "a sampler, or several updates a rollout"
    )
    named = rewards.named(reward_functions, config)
    answers = not named or config.warmup_steps > 0 or any(map(rewards.reads_answers, named))
    task = data.load_for(config, task, answers)
    functions = rewards.choose(named, config, task, accelerator.device)
    loaded = models.load_for(config, model, tokenizer, task.pictures)
    work = rollouts.workload(loaded, task, config, config.num_generations, config.num_iterations)
    frozen = models.reference_for(config, loaded, ref_model, needed=config.beta > 0)
    layout = settle(config, accelerator.device, loaded, work.length, [] if frozen is None else [frozen])
    loaded = replace(loaded, layout=layout)
    placed, reference = place(config, accelerator, loaded, work, frozen)
    loaded = ready(placed, loaded, task.pictures)
    sees = sampler is None or not task.pictures or takes(sampler, "images")
    require(sees, "sampler", sampler, "one that takes images=, for samples have pictures")
    return GRPOTrainer(
        config=config,
        loaded=loaded,
        engine=placed,
        reference=reference,
        own_reference=ref_model is None and config.ref_model is None,
        ends=rollouts.ends_of(config, loaded),
        workload=work,
        run=Run(placed, work.fingerprint),
        task=task,
        rewards=functions,
        sampler=sampler,
    )


@torch.no_grad()
def collect(trainer: GRPOTrainer, number: int, prompts: Sequence[Sample]) -> Rollout:
    """Sample `num_generations` completions of this process's prompts, score them, take old and reference log-probs."""
    G, own = trainer.config.num_generations, own_prompts(trainer.engine, len(prompts), trainer.config)
    samples = [prompts[i] for i in own for _ in range(G)]
    completions = sample_completions(trainer, number, prompts, own)
    config = trainer.config.with_sampler(completions.sampling_logprobs is not None)
    scores = evaluation.score_together(trainer.engine, trainer.rewards, completions, samples, config.reward_timeout)
    lengths = completions.completion_mask.sum(dim=1)
    weights = config.reward_weights or [1.0] * len(trainer.rewards)
    values = relative_rewards(trainer, scores, weights, lengths)
    if config.mask_truncated:
        completions = completions.without_truncated()
    turns = deal(trainer.engine, len(samples), config, number, config.num_iterations)
    first = turns[: config.num_minibatches]
    old = logprobs(config, trainer.engine, completions, first) if config.off_policy else None
    ref = logprobs(config, trainer.by_reference, completions, first) if config.beta else None
    rewarded = advantages.weighted_sum(scores, weights)
    return Rollout(samples, completions, scores, rewarded, lengths, values, old, ref, turns)


def sample_completions(trainer: GRPOTrainer, number: int, prompts: Sequence[Sample], own: Sequence[int]) -> Completions:
    """`num_generations` for each of the prompts `own`, by the model or the external sampler."""
    config, loaded, G = trainer.config, trainer.loaded, trainer.config.num_generations
    grouped = [prompt for prompt in rollouts.encoded(loaded, [prompts[i] for i in own], config) for _ in range(G)]
    if trainer.sampler is not None:
        return sampled(trainer.engine, loaded, trainer.sampler, grouped, config)
    drawn = rollouts.uniforms(config.seed, number, len(prompts) * G, config.max_new_tokens)
    drawn = drawn.view(len(prompts), G, -1)[list(own)].flatten(0, 1)
    return rollouts.complete(trainer.engine, loaded, grouped, config, drawn)


def relative_rewards(trainer: GRPOTrainer, scores: Tensor, weights: Sequence[float], lengths: Tensor) -> Tensor:
    """(B,) advantages; statistics of the batch are those of all processes."""
    config, G, B = trainer.config, trainer.config.num_generations, len(scores)
    if config.baseline == "leave_one_out":
        return advantages.rloo_advantages(advantages.weighted_sum(scores, weights), G)
    if config.baseline == "length_weighted":
        return advantages.opo_advantages(advantages.weighted_sum(scores, weights), lengths, G)
    everyone = trainer.engine.accelerator.gather(scores) if trainer.engine.world > 1 else scores
    values = advantages.combine_rewards(everyone, weights, G, config.combine_rewards, config.scale_rewards)
    return values[trainer.engine.rank * B : (trainer.engine.rank + 1) * B]


def logprobs(
    config: Config, call: Callable[..., Tensor], completions: Completions, minibatches: Sequence[Rows]
) -> Tensor:
    """Log-probs of the completions, (B, T - 1), 0 elsewhere, by `call(function, *args)` with a model before them.

    Over the very micro-batches of the updates: a matrix product's last bits may depend on its number of rows, and with
    the same rows the ratio is 1 on-policy.
    """
    B, T = completions.input_ids.shape
    result = torch.zeros(B, T - 1, device=completions.input_ids.device)
    for rows in microbatches(minibatches, config):
        some = completions[rows]
        found = call(rollouts.completion_logprobs, some, config.temperature, config.backend)
        result[rows, : some.input_ids.shape[1] - 1] = found
    return result


def update(trainer: GRPOTrainer, rollout: Rollout) -> Logged:
    """`num_iterations` passes of `num_minibatches` updates each; -> metrics, means over the updates."""
    own, mask, done = trainer.engine, rollout.completions.completion_mask, []
    config = trainer.config.with_sampler(rollout.completions.sampling_logprobs is not None)
    for mini in rollout.updates:
        rows, num_sequences = chunks(mini, config.micro_batch_size), len(mini) * own.world
        if config.objective == "bnpo":  # a mean over each micro-batch's own tokens
            counts = [mask[micro].sum().clamp(min=1) * len(rows) * own.world for micro in rows]
        else:
            counts = [own.sum(mask[mini].sum()).clamp(min=1)] * len(rows)
        pieces = [(config, rollout[micro], num_sequences, count) for micro, count in zip(rows, counts, strict=True)]
        done.append(own.update(policy_loss, pieces))
    result = means(done)
    # Over the tokens of all updates: between them, too.
    result["ratio_var"] += statistics.pvariance([metrics["ratio_mean"] for metrics in done])
    return result


def policy_loss(
    model: Any, config: Config, rollout: Rollout, num_sequences: int, num_tokens: Tensor
) -> tuple[Tensor, Metrics]:
    """The share of a micro-batch in the loss of a mini-batch with these counts, and its metrics."""
    some = rollout.completions
    batch = some.batch()
    more = {"output_router_logits": True} if config.router_aux_loss_coef else {}
    inputs = batch.head_inputs(model, **more)
    sampled = some.sampling_logprobs if config.reads_sampler else None
    old, ref, sampling = (
        None if x is None else batch.flat(x) for x in (rollout.old_logprobs, rollout.ref_logprobs, sampled)
    )
    loss, metrics = fr.linear_policy_loss(
        inputs.hidden,
        inputs.head,
        batch.targets,
        advantages=rollout.advantages,
        old_logprobs=old,
        ref_logprobs=ref,
        sampling_logprobs=sampling,
        objective=config.loss(),
        cu_seqlens=batch.cu_seqlens,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        temperature=config.temperature,
        outputs=("entropy",),
        backend=config.backend,
    )
    if inputs.aux_loss is not None and config.router_aux_loss_coef:
        loss = loss + config.router_aux_loss_coef * len(some.texts) / num_sequences * inputs.aux_loss
    return loss, metrics


def summary(trainer: GRPOTrainer, rollout: Rollout) -> Logged:
    """Rewards and lengths of a rollout, over all processes; NaN where nothing could be scored."""
    some, one = rollout.completions, trainer.engine.world == 1
    table = torch.cat(
        [rollout.rewards[:, None], rollout.lengths[:, None].float(), some.truncated[:, None].float(), rollout.scores],
        dim=1,
    )
    table = table if one else trainer.engine.accelerator.gather(table)
    total, lengths, truncated, *scores = table.unbind(dim=1)
    spread = advantages.std(total.view(-1, trainer.config.num_generations))
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
    for name, column in zip(rewards.names_of(trainer.rewards), scores):
        metrics[f"rewards/{name}"] = column.nanmean()
        metrics[f"rewards/{name}/std"] = advantages.std(column[None])[0]
    if some.sampling_logprobs is not None and rollout.old_logprobs is not None:
        mask = some.completion_mask[:, 1:]
        difference = (rollout.old_logprobs - some.sampling_logprobs).abs().nan_to_num(0.0) * mask
        sums = trainer.engine.sum(torch.stack([difference.sum(), mask.sum()]))
        metrics["sampling/logprob_difference"] = sums[0] / sums[1].clamp(min=1)
    return {name: value.item() for name, value in metrics.items()}
