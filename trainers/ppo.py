"""Proximal policy optimisation with a value model, and a KL penalty in the reward.

A step samples a completion for each of some prompts, scores it, and takes a few clipped updates of policy and values:

    r_t  = -kl_coef KL_t, plus the score at the completion's last token      KL_t against the model the steps begin with
    A_t  = sum_k (gamma lam)^k delta_{t+k},   delta_t = r_t + gamma V_{t+1} - V_t,   R_t = A_t + V_t;    A then whitened
    loss = mean over tokens of  max(-ratio A, -clip(ratio, 1 - cliprange, 1 + cliprange) A) - entropy_coef H
           + vf_coef / 2 max((v - R)^2, (clip(v, V - cliprange_value, V + cliprange_value) - R)^2)

(arXiv:1707.06347; of language models arXiv:1909.08593, arXiv:2203.02155). A rollout keeps tokens alone: old, reference
and current log-probs come from one op, which never holds the logits. Means are over the completions' tokens of the whole
batch, however it is split. In Python: `train(Config(task="arithmetic", warmup_steps=300, learning_rate=3e-4))`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

import fused_rlhf as fr
from fused_rlhf.advantages import at_last_token, gae, moments, weighted_sum, whiten
from fused_rlhf.objectives import KL_ESTIMATORS, PolicyLoss, reductions
from fused_rlhf.objectives.reductions import Metrics
from fused_rlhf.objectives.value import value_loss, value_metrics
from fused_rlhf.trainers import data, engine, evaluation, rewards, warmup
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers import rollout as rollouts
from fused_rlhf.trainers import value as values
from fused_rlhf.trainers.collation import ready
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.data import Sample, Task
from fused_rlhf.trainers.engine import Placed, copy_parameters
from fused_rlhf.trainers.kl_control import KLController
from fused_rlhf.trainers.layout_trial import check_budget, settled
from fused_rlhf.trainers.minibatches import (
    ANY,
    Rows,
    Turn,
    chunks,
    columns_of,
    counted,
    deal,
    everyones,
    exchanged,
    forwards,
    own_prompts,
    turns_of,
)
from fused_rlhf.trainers.ppo_config import Config
from fused_rlhf.trainers.rollout import Completions
from fused_rlhf.trainers.run import Logged, Run
from fused_rlhf.trainers.trainer import Controller, Result, Trainer, fit, means, place, plan
from fused_rlhf.trainers.value import PolicyAndValue, ScalarModel, logprobs_and_values, reward_of, rewards_of, value_of

__all__ = ["Config", "KLController", "PPOTrainer", "Result", "fit", "plan", "prepare", "train"]

VALUE_RATE = 1e-5  # at least that of the values, by default

# PPO's names for metrics of the objective.
POLICY_METRICS = {
    "policy/approxkl_avg": "approx_kl",
    "policy/clipfrac_avg": "clip_ratio/region_mean",
    "policy/entropy_avg": "entropy",
    "val/ratio": "ratio_mean",
    "val/ratio_var": "ratio_var",
}
# Of a cut distribution, and what it lacks beside the whole one.
OF_CUT = ("untruncated/ratio_mean", "untruncated/ratio_difference", "targets_added")


@dataclass(kw_only=True)
class PPOTrainer(Trainer):
    """PPO's data and verbs. Its engine is that of a PolicyAndValue; it keeps no reference where kl_coef is 0."""

    config: Config
    task: Task
    rewards: Sequence[rewards.Reward]
    reward_model: Placed | None
    kl: KLController

    name = "PPO"
    shown = ("objective/scores", "objective/kl", "val/explained_variance", "policy/clipfrac_avg", "accuracy", "score")
    plotted = (
        *("accuracy", "score", "objective/scores", "objective/kl", "objective/kl_coef", "objective/entropy"),
        *("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/explained_variance", "loss"),
    )

    def objective(self) -> PolicyLoss:
        return self.config.loss()

    def supervise(self) -> None:
        """Values on a body of their own begin where the policy's warm-up ends, as the reference does."""
        warmup.on_answers(self.run, self.loaded, self.task, self.config, loss=answer_loss)
        if self.config.value_model == "copy":
            module: Any = self.engine.module
            copy_parameters(self.loaded.model.base_model, module.value.body)

    def controllers(self) -> dict[str, Controller]:
        return super().controllers() | {"kl": self.kl}

    def step(self, number: int) -> Logged:
        """One rollout and its updates."""
        n = self.config.prompts_per_step
        experience = collect(self, number)
        metrics = summary(self, experience)
        if math.isnan(metrics["objective/scores"]):
            what = "no completion could be scored (None or NaN for all of them)"
            self.run.warn(what, number, "nothing is learned from such a step")
        metrics = metrics | update(self, experience)
        self.kl.update(metrics["objective/kl"], n)
        return metrics | {"episode": number * n}

    def save_model(self, metrics: Logged) -> None:
        """The values too, as a model of their own, where transformers has one of the kind."""
        super().save_model(metrics)
        both: Any = self.engine.module

        def export(folder: Path) -> None:
            values.save(self.engine, both, self.config.lora_scaling, folder)
            if self.engine.rank == 0:
                (self.loaded.processor or self.loaded.tokenizer).save_pretrained(folder)

        try:
            self.run.save_model(export, {}, "value_model", card=False)
        except ValueError as error:
            self.run.say(f"the value model is in the checkpoints alone: {str(error).splitlines()[0]}")

    @torch.no_grad()
    def evaluate(self) -> Logged:
        """Of greedy answers: accuracies, or with a reward model, or where samples have no answers, the mean score."""
        if self.reward_model is None and evaluation.has_answers(self.task):
            return evaluation.accuracy(self.engine, self.loaded, self.task, self.config)
        if not self.task.test:
            return {}
        mine = self.engine.mine(self.task.test[: self.config.eval_samples or None])
        scores = score(self, sample_completions(self, mine, uniforms=None), mine).tolist() if mine else []
        return {"score": torch.tensor(self.engine.gather(scores)).nanmean().item()}

    def describe(self, metrics: Logged) -> str:
        return evaluation.describe(metrics)


@dataclass(frozen=True)
class Experience:
    """This process's B completions of one step, T tokens at most. [:, t] of a (B, T - 1) belongs to token t + 1."""

    completions: Completions
    scores: Tensor  # (B,) fp32, the penalty for a missing EOS included; NaN where unscorable
    mask: Tensor  # (B, T - 1) bool: the tokens of completions that have a score
    old_logprobs: Tensor  # (B, T - 1) fp32, as all that follow
    kl: Tensor  # of each token, to the reference
    values: Tensor  # before each token
    advantages: Tensor
    returns: Tensor
    turns: Sequence[Turn]  # the updates that it is for, in their order

    def __getitem__(self, rows: Rows) -> Experience:
        """Some of the completions, cut to the longest of them."""
        some = self.completions[rows]
        width = some.input_ids.shape[1] - 1
        of_tokens = (self.mask, self.old_logprobs, self.kl, self.values, self.advantages, self.returns)
        mask, old, kl, values, advantages, returns = (x[rows, :width] for x in of_tokens)
        return Experience(some, self.scores[rows], mask, old, kl, values, advantages, returns, ())


def train(
    config: Config,
    *,
    task: Task | Sequence[Sample] | None = None,
    reward_functions: Sequence[rewards.Reward] | None = None,
    reward_model: torch.nn.Module | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    ref_model: PreTrainedModel | None = None,
    value_model: PreTrainedModel | ScalarModel | None = None,
) -> Result:
    """Run PPO as `config` says; task (or a list of samples), rewards, reward model, model and tokenizer, the reference and
    the value model may be given as objects instead.

    Raises ValueError, TypeError or OSError for bad input before the first step; RewardError and NonFiniteLoss during
    the run, with a checkpoint left behind. Ctrl-C leaves the model in `<output>/model`, says so, and goes on as
    KeyboardInterrupt.
    """
    return fit(prepare(config, task, reward_functions, reward_model, model, tokenizer, ref_model, value_model))


def prepare(
    config: Config,
    task: Task | Sequence[Sample] | None = None,
    reward_functions: Sequence[rewards.Reward] | None = None,
    reward_model: torch.nn.Module | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    ref_model: PreTrainedModel | None = None,
    value_model: PreTrainedModel | ScalarModel | None = None,
) -> PPOTrainer:
    """Load and check everything, so that what can be refused is refused before the first step; writes nothing."""
    accelerator = engine.start(config)
    share = config.num_minibatches * accelerator.num_processes
    even = config.prompts_per_step % share == 0
    require(even, "prompts_per_step", config.prompts_per_step, f"a multiple of num_minibatches x processes = {share}")
    once = reward_model is None or config.reward_model is None
    require(once, "reward_model", config.reward_model, "none beside the one given")
    scorer = config.reward_model if reward_model is None else reward_model
    named = bool(reward_functions or config.rewards or scorer is None)
    weights = config.reward_weights
    require(named or not weights, "reward_weights", weights, "none: the reward model's own weight is 1")
    chosen = rewards.named(reward_functions, config)
    read = any(map(rewards.reads_answers, chosen)) or (named and not chosen)
    task = data.load_for(config, task, answers=read or config.warmup_steps > 0)
    functions = rewards.choose(chosen, config, task, accelerator.device) if named else []
    loaded = models.load_for(config, model, tokenizer, task.pictures)
    work = rollouts.workload(loaded, task, config, generations=1, passes=config.num_ppo_epochs)
    judge = None if scorer is None else reward_of(config, scorer, loaded)
    frozen = models.reference_for(config, loaded, ref_model, needed=config.kl_coef > 0)
    value = value_of(config, loaded, value_model)
    others = [frozen, None if isinstance(value, torch.nn.Linear) else value]
    loaded = settled(config, accelerator.device, loaded, work.length, others)
    check_budget(config, work.length, "the longest prompt with max_new_tokens")
    both = PolicyAndValue(loaded.model, value).eval()
    rate = config.value_learning_rate or max(config.learning_rate, VALUE_RATE)
    placed, reference = place(config, accelerator, loaded, work, frozen, both, [(both.value, rate)])
    loaded = ready(placed, loaded, task.pictures)
    return PPOTrainer(
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
        reward_model=None if judge is None else placed.frozen(judge.eval()),
        kl=KLController(config.kl_coef, config.target_kl, config.kl_horizon),
    )


def answer_loss(
    module: PolicyAndValue, some: Completions, num_tokens: Tensor, backend: str, live: bool
) -> tuple[Tensor, Metrics]:
    """The share of some rows in the loss of a batch with this many answer tokens."""
    loss, metrics = warmup.answer_loss(module.policy, some, num_tokens, backend, live)
    # DDP waits for the gradient of every parameter, those of the values too.
    return loss + 0.0 * module(some[range(1)].batch())[1].sum(), metrics


@torch.no_grad()
def collect(trainer: PPOTrainer, number: int) -> Experience:
    """Sample and score the completions of this process's prompts; what was expected, and what to learn from them."""
    config, own, n = trainer.config, trainer.engine, trainer.config.prompts_per_step
    prompts = data.batch_at(trainer.task.train, config.seed, (number - 1) * n, n)
    mine = own_prompts(own, n, config)
    samples = [prompts[i] for i in mine]
    completions = sample_completions(
        trainer, samples, rollouts.uniforms(config.seed, number, n, config.max_new_tokens)[mine]
    )
    scores = score(trainer, completions, samples) - config.missing_eos_penalty * completions.truncated
    if trainer.samples_due(number):
        scored = zip(samples, completions.texts, scores.tolist())
        shown = [{**sample, "completion": text, "score": score} for sample, text, score in scored]
        trainer.run.samples(number, everyones(own, n, config, shown))
    columns: Sequence[int] = columns_of(own, len(mine), config)
    if trainer.exchanges:
        taken, columns = exchanged(own, completions.sizes().lengths, 1, config)
        completions = rollouts.everywhere(own, completions)[taken]
        scores = own.accelerator.gather(scores)[taken]
    mask = completions.completion_mask[:, 1:] & ~scores.isnan().unsqueeze(1)
    old_logprobs, kl, values = (torch.zeros(mask.shape, device=mask.device) for _ in range(3))
    dealt = deal(columns, n // config.num_minibatches, config, number, config.num_ppo_epochs)
    turns = turns_of(own, dealt, mask.any(dim=1).tolist(), completions.sizes(), config)
    # Micro-batches as in the updates: the same shapes give the same bits, and a ratio of 1 before the first update.
    for rows in forwards(turns[: config.num_minibatches]):
        some = completions[rows or ANY]
        width = some.input_ids.shape[1] - 1
        logprobs, found, full = own(logprobs_and_values, some, config)
        if config.kl_coef:
            ref = trainer.by_reference(rollouts.completion_logprobs, some.whole(), config.temperature, config.backend)
        if rows:
            old_logprobs[rows, :width], values[rows, :width] = logprobs, found
        if rows and config.kl_coef:
            kl[rows, :width] = KL_ESTIMATORS[config.kl_estimator](full, ref)
    token_rewards = at_last_token(scores, mask) - trainer.kl.coef * kl
    if config.whiten_rewards:
        token_rewards = whiten(token_rewards, mask, shift_mean=False, total=own.sum)
    advantages, returns = gae(token_rewards, values, mask, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask, total=own.sum)
    return Experience(completions, scores, mask, old_logprobs, kl, values, advantages, returns, turns)


def sample_completions(trainer: PPOTrainer, samples: Sequence[Sample], uniforms: Tensor | None) -> Completions:
    """One completion for each sample; greedy without uniforms."""
    config, loaded = trainer.config, trainer.loaded
    prompts = rollouts.encoded(loaded, samples, config)
    return rollouts.complete(trainer.engine, loaded, prompts, config, uniforms)


def score(trainer: PPOTrainer, completions: Completions, samples: Sequence[Sample]) -> Tensor:
    """(B,) fp32: weighted sum of the rewards, plus the reward model's; NaN where none of them could score."""
    config, own, columns = trainer.config, trainer.engine, []
    if trainer.rewards:
        columns.append(evaluation.score_together(own, trainer.rewards, completions, samples, config.reward_timeout))
    if trainer.reward_model is not None:
        with trainer.reward_model.whole() as module:
            rows = chunks(range(len(samples)), config.micro_batch_size)
            columns.append(torch.cat([rewards_of(module, completions[some]) for some in rows]).unsqueeze(1))
    weights = [*(config.reward_weights or [1.0] * len(trainer.rewards)), *([1.0] if trainer.reward_model else [])]
    return weighted_sum(torch.cat([column.to(own.device) for column in columns], dim=1), weights)


def update(trainer: PPOTrainer, experience: Experience) -> Logged:
    """`num_ppo_epochs` passes of `num_minibatches` updates each; -> metrics, means over the updates.

    An update that no process has a scored completion for is not made.
    """
    config, done = trainer.config, []
    for turn in experience.turns:
        num_tokens = trainer.engine.sum(experience.mask[turn.rows].sum()).clamp(min=1)
        if turn.live:
            pieces = [(config, experience[micro or ANY], num_tokens, bool(micro)) for micro in turn.micro]
            done.append(trainer.engine.update(ppo_loss, pieces))
    result: Logged = {"skipped_updates": len(experience.turns) - len(done)}
    result |= means(done) if done else trainer.engine.unmoved()
    return result | {"lr": result.pop("learning_rate")}


def ppo_loss(
    module: PolicyAndValue, config: Config, experience: Experience, num_tokens: Tensor, live: bool = True
) -> tuple[Tensor, Metrics]:
    """The share of a micro-batch in the loss of a mini-batch with this many tokens, and its metrics; none where it is not
    live, and there for its calls alone."""
    batch, cut = experience.completions.batch(), experience.completions.cut(config.truncation)
    inputs, values = module(batch)
    with inputs.autocast():
        policy, of_tokens = fr.linear_policy_loss(
            inputs.hidden,
            inputs.head,
            batch.targets,
            advantages=batch.flat(experience.advantages),
            completion_mask=batch.flat(experience.mask),
            old_logprobs=batch.flat(experience.old_logprobs),
            objective=config.loss(),
            cu_seqlens=batch.cu_seqlens,
            num_tokens=num_tokens,
            temperature=config.temperature,
            outputs=("entropy", "full_logprobs") if cut else ("entropy",),
            backend=config.backend,
            **cut,
        )
    targets = [batch.flat(x) for x in (experience.returns, experience.values, experience.mask)]
    value = value_loss(values, *targets, cliprange_value=config.cliprange_value, num_tokens=num_tokens)
    clipped = value_metrics(values.detach(), *targets, cliprange_value=config.cliprange_value)["value_clip_fraction"]
    count = experience.mask.sum()
    bonus = config.entropy_coef * of_tokens["entropy"] * count / num_tokens
    metrics = {name: of_tokens.parts[its] for name, its in POLICY_METRICS.items()}
    metrics |= {name: of_tokens.parts[name] for name in OF_CUT if name in of_tokens.parts}
    metrics["loss/policy_avg"] = reductions.total(policy.detach() + bonus)
    metrics["loss/value_avg"] = reductions.total(value.detach())
    metrics["val/clipfrac_avg"] = reductions.mean(clipped, count)
    return counted(policy + config.vf_coef * value, Metrics(metrics), live)


def summary(trainer: PPOTrainer, experience: Experience) -> Logged:
    """Of a rollout over all processes: means per completion that has a score, KL and entropy summed over its tokens."""
    mask, total, scored = experience.mask, trainer.engine.sum, ~experience.scores.isnan()
    sums = [
        scored.sum(),
        experience.scores.nansum(),
        experience.kl[mask].sum(),
        -experience.old_logprobs[mask].sum(),
        mask.sum(),
        (~experience.completions.truncated).sum(),
    ]
    count, scores, kl, entropy, tokens, ended = total(torch.stack([x.float() for x in sums])).tolist()
    _, variance = moments(experience.returns, mask, total=total)
    _, residual = moments(experience.returns - experience.values, mask, total=total)
    per = 1 / count if count else math.nan
    penalty = -trainer.kl.coef * kl * per
    return {
        "objective/kl": kl * per,
        "objective/kl_coef": trainer.kl.coef,
        "objective/entropy": entropy * per,
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": penalty + scores * per,
        "objective/scores": scores * per,
        "val/explained_variance": 1 - (residual / variance).item(),
        "val/num_eos_tokens": ended,
        "completion_length": tokens * per,
    }
