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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

import fused_rlhf as fr
from fused_rlhf.objectives import PolicyLoss
from fused_rlhf.objectives.reductions import Metrics
from fused_rlhf.objectives.surrogates import Count
from fused_rlhf.trainers import collation, data, engine, evaluation, rewards, warmup
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers import rollout as rollouts
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.data import Sample, Task
from fused_rlhf.trainers.grpo_config import COMPARING, Config
from fused_rlhf.trainers.grpo_rollout import (
    Rollout,
    collect,
    differences,
    named,
    ready,
    summary,
)
from fused_rlhf.trainers.layout_trial import check_budget, settled
from fused_rlhf.trainers.minibatches import ANY, counted, everyones
from fused_rlhf.trainers.run import Logged, Run
from fused_rlhf.trainers.sampler import Sampler, takes
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
    shown = ("reward", "reward_std", "kl", "clip_ratio/region_mean", "live/clip_ratio/region_mean", "accuracy")
    plotted = (
        *("accuracy", "reward", "reward_std", "loss", "kl", "clip_ratio/region_mean", "live/clip_ratio/region_mean"),
        *("grad_norm", "entropy", "live/entropy", "dead_sequences", "completion_length", "score"),
    )

    def objective(self) -> PolicyLoss:
        return self.config.loss()

    def supervise(self) -> None:
        warmup.on_answers(self.run, self.loaded, self.task, self.config)

    def step(self, number: int) -> Logged:
        """One rollout and its updates."""
        rollout = collect(self, number)
        metrics = summary(self, rollout)
        for name in rewards.names_of(self.rewards):
            if math.isnan(metrics[f"rewards/{name}"]):
                what = f"the reward {name!r} scored no completion (None or NaN for all of them)"
                self.run.warn(what, number, "it teaches nothing so")
        if self.samples_due(number):
            rows = zip(rollout.samples, rollout.completions.texts, rollout.rewards.tolist())
            mine = [{**sample, "completion": text, "reward": reward} for sample, text, reward in rows]
            self.run.samples(number, everyones(self.engine, self.config.prompts_per_step, self.config, mine))
        rollout = ready(self, number, rollout)
        metrics = metrics | differences(self, rollout) | update(self, rollout)
        if metrics["skipped_updates"]:
            what = f"{metrics['skipped_updates']:.0f} updates had no sequence with an advantage"
            self.run.warn(what, number, "weights, optimiser and schedule stay as they are")
        return metrics

    def evaluate(self) -> Logged:
        """Accuracies; where samples have no answers, the mean reward of greedy completions."""
        if evaluation.has_answers(self.task):
            return evaluation.accuracy(self.engine, self.loaded, self.task, self.config)
        weights = self.config.reward_weights or [1.0] * len(self.rewards)
        return evaluation.score(self.engine, self.loaded, self.task, self.config, self.rewards, weights)

    def describe(self, metrics: Logged) -> str:
        return evaluation.describe(metrics)


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
    loaded = settled(config, accelerator.device, loaded, work.length, [frozen])
    check_budget(config, work.length, "the longest prompt with max_new_tokens")
    placed, reference = place(config, accelerator, loaded, work, frozen)
    loaded = collation.ready(placed, loaded, task.pictures)
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


def update(trainer: GRPOTrainer, rollout: Rollout) -> Logged:
    """`num_iterations` passes of `num_minibatches` updates each; -> metrics, means over the updates.

    An update that no process has a live sequence for is not made. Where dead ones are passed over, metrics of tokens are
    of the live ones alone, and called `live/...`.
    """
    own, mask, done = trainer.engine, rollout.completions.completion_mask, []
    config = trainer.config.with_sampler(rollout.completions.sampling_logprobs is not None)
    for turn in rollout.turns:
        tokens = mask[turn.rows].sum()
        num_sequences, num_tokens = own.sum(torch.stack([tokens.new_tensor(len(turn.rows)), tokens])).clamp(min=1)
        if not turn.live:
            continue
        if config.objective == "bnpo":  # a mean over each micro-batch's own tokens
            counts = [mask[micro].sum().clamp(min=1) * len(turn.micro) * own.world for micro in turn.micro]
        else:
            counts = [num_tokens] * len(turn.micro)
        pieces = [
            (config, rollout[micro or ANY], num_sequences, count, bool(micro))
            for micro, count in zip(turn.micro, counts, strict=True)
        ]
        done.append(own.update(policy_loss, pieces))
    live = rollout.live(config)
    count, total = own.sum(torch.stack([live.sum(), live.new_tensor(len(live), dtype=torch.int64)])).tolist()
    result = {"dead_sequences": 1 - count / total}
    result["skipped_updates"] = len(rollout.turns) - len(done)
    if not done:
        return result | own.unmoved()
    found = means(done)
    # Over the tokens of all updates: between them, too.
    found["ratio_var"] += statistics.pvariance([metrics["ratio_mean"] for metrics in done])
    return result | named(config, found)


def policy_loss(
    model: Any, config: Config, rollout: Rollout, num_sequences: Count, num_tokens: Count, live: bool = True
) -> tuple[Tensor, Metrics]:
    """The share of a micro-batch in the loss of a mini-batch with these counts, and its metrics; none where it is not live,
    and there for its calls alone."""
    some = rollout.completions
    batch, cut = some.batch(), some.cut(config.truncation)
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
        outputs=("entropy", "full_logprobs") if cut else ("entropy",),
        backend=config.backend,
        **cut,
    )
    if inputs.aux_loss is not None and config.router_aux_loss_coef:
        loss = loss + config.router_aux_loss_coef * len(some.texts) / num_sequences * inputs.aux_loss
    return counted(loss, metrics, live)
