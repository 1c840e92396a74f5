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

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

import fused_rlhf as fr
from fused_rlhf.advantages import at_last_token, gae, moments, weighted_sum, whiten
from fused_rlhf.lm_head import HeadInputs
from fused_rlhf.objectives import KL_ESTIMATORS
from fused_rlhf.objectives.value import value_loss, value_metrics
from fused_rlhf.trainers import data, engine, evaluation, loop, planning, rewards, rollout, warmup
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.data import Sample, Task
from fused_rlhf.trainers.engine import Engine, Placed, copy_parameters
from fused_rlhf.trainers.inputs import encode_prompt
from fused_rlhf.trainers.loop import Metrics, Result, Run, Verbs
from fused_rlhf.trainers.ppo_config import Config
from fused_rlhf.trainers.rollout import Completions, minibatches, slices
from fused_rlhf.trainers.value import PolicyAndValue, ScalarModel, reward_of, rewards_of, value_of

__all__ = ["Config", "KLController", "Result", "State", "fit", "plan", "prepare", "train"]

SHOWN = ("objective/scores", "objective/kl", "val/explained_variance", "policy/clipfrac_avg", "accuracy", "score")
PLOTTED = (
    *("accuracy", "score", "objective/scores", "objective/kl", "objective/kl_coef", "objective/entropy"),
    *("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/explained_variance"),
)


class KLController:
    """kl_coef, adapted after each rollout of n completions whose mean KL is known (arXiv:1909.08593):

    kl_coef <- kl_coef (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)            target None: it stays as it is
    """

    def __init__(self, coef: float, target: float | None, horizon: int) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, count: int) -> None:
        if self.target is not None and not math.isnan(kl):  # NaN: nothing could be scored
            self.coef *= 1 + min(max(kl / self.target - 1, -0.2), 0.2) * count / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = state["coef"]


@dataclass
class State:
    """What the steps of a run share."""

    config: Config
    task: Task
    rewards: Sequence[rewards.Reward]
    loaded: models.Loaded
    engine: Engine  # of a PolicyAndValue around the loaded model
    reference: Placed | None  # None where kl_coef is 0, and with LoRA, where it is the policy without its adapters
    reward_model: Placed | None
    kl: KLController
    run: Run
    longest_prompt: int


@dataclass(frozen=True)
class Batch:
    """This process's B completions of one rollout, T tokens at most. [:, t] of a (B, T - 1) belongs to token t + 1."""

    samples: Sequence[Sample]
    completions: Completions
    scores: Tensor  # (B,) fp32, the penalty for a missing EOS included; NaN where unscorable
    mask: Tensor  # (B, T - 1) bool: the tokens of completions that have a score
    old_logprobs: Tensor  # (B, T - 1) fp32, as all that follow
    kl: Tensor  # of each token, to the reference
    values: Tensor  # before each token
    advantages: Tensor
    returns: Tensor

    def __getitem__(self, rows: slice) -> Batch:
        some = self.completions[rows]
        width = some.input_ids.shape[1] - 1
        tokens = (self.mask, self.old_logprobs, self.kl, self.values, self.advantages, self.returns)
        return Batch(self.samples[rows], some, self.scores[rows], *(x[rows, :width] for x in tokens))


def train(
    config: Config,
    *,
    task: Task | None = None,
    reward_functions: Sequence[rewards.Reward] | None = None,
    reward_model: PreTrainedModel | ScalarModel | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
) -> Result:
    """Run PPO as `config` says; task, rewards, reward model, model and tokenizer may be given as objects instead.

    Raises ValueError, TypeError or OSError for bad input before the first step; RewardError and NonFiniteLoss during
    the run, with a checkpoint left behind. Ctrl-C leaves the model in `<output>/model`, says so, and goes on as
    KeyboardInterrupt.
    """
    return fit(prepare(config, task, reward_functions, reward_model, model, tokenizer))


def prepare(
    config: Config,
    task: Task | None = None,
    reward_functions: Sequence[rewards.Reward] | None = None,
    scorer: PreTrainedModel | ScalarModel | str | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
) -> State:
    """Load and check everything, so that what can be refused is refused before the first step; writes nothing."""
    accelerator = engine.start(config)
    share = config.num_minibatches * accelerator.num_processes
    even = config.prompts_per_step % share == 0
    require(even, "prompts_per_step", config.prompts_per_step, f"a multiple of num_minibatches x processes = {share}")
    scorer = scorer or config.reward_model
    named = bool(reward_functions or config.rewards or scorer is None)
    answers = named or config.warmup_steps > 0
    task = task or data.load(
        config.task, config.data, max_operand=config.max_operand, seed=config.seed, answers=answers
    )
    data.check(task, answers)
    functions: list[rewards.Reward] = []
    if named:
        functions = rewards.choose(
            reward_functions, config.rewards, config.reward_weights, task, config.reward_timeout, accelerator.device
        )
    loaded = models.load_for(config, model, tokenizer)
    longest = rollout.longest_prompt(loaded, task, config)
    if config.stop_token is not None:
        ends = rollout.eos_ids(loaded.model, loaded.tokenizer)
        loaded.model.generation_config.eos_token_id = [*ends, stop_id(config.stop_token, loaded.tokenizer)]
    fr.backends.resolve(config.backend, next(loaded.model.parameters()).to(accelerator.device))
    judge = None if scorer is None else reward_of(config, scorer, loaded.tokenizer)
    frozen = copy.deepcopy(loaded.model) if config.kl_coef and not config.lora_r else None
    trained = PolicyAndValue(loaded.model, value_of(config, loaded.model)).eval()
    placed = Engine(config, accelerator, trained, config.steps * config.num_ppo_epochs * config.num_minibatches)
    reference = None if frozen is None else placed.frozen(frozen)
    reward_model = None if judge is None else placed.frozen(judge.eval())
    kl = KLController(config.kl_coef, config.target_kl, config.kl_horizon)
    return State(config, task, functions, loaded, placed, reference, reward_model, kl, Run(placed), longest)


def stop_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    require(len(ids) == 1 and ids[0] != tokenizer.unk_token_id, "stop_token", token, "one token of the tokenizer")
    return ids[0]


def plan(state: State) -> str:
    """What the run would do and need, for `--dry-run`."""
    config = state.config
    return planning.describe(
        state.engine,
        state.loaded,
        reference=state.reference is not None,
        sequences=config.prompts_per_step,
        length=state.longest_prompt + config.max_new_tokens,
        updates_per_step=config.num_ppo_epochs * config.num_minibatches,
        data=f"{len(state.task.train)} training and {len(state.task.test)} test prompts; {state.task.note}",
    )


def fit(state: State) -> Result:
    """The run itself: warm-up, evaluation, the steps of PPO, evaluation."""
    config, task, run, n = state.config, state.task, state.run, state.config.prompts_per_step
    policy, both = state.loaded.model.num_parameters(), sum(p.numel() for p in state.engine.module.parameters())
    sizes = f"{policy:,} parameters and {both - policy:,} of the values"
    run.say(f"{sizes}; {len(task.train)} training, {len(task.test)} test prompts")
    if task.note:
        run.say(task.note)
    controllers: dict[str, loop.Controller] = {"kl": state.kl}
    if config.warmup_steps and state.reference is not None:
        controllers["reference"] = state.reference
    verbs = Verbs(
        name="PPO",
        step=partial(step, state),
        evaluate=partial(evaluate, state),
        export=partial(models.save, state.engine, state.loaded),
        shown=SHOWN,
        plotted=PLOTTED,
        describe=evaluation.describe if state.reward_model is None else lambda m: f"score {m['score']:.4g}",
        batch=lambda i: f"prompts {(i - 1) * n} to {i * n - 1} of the shuffled training set",
        warm=partial(warm, state) if config.warmup_steps else None,
        controllers=controllers,
    )
    return loop.fit(run, verbs)


def warm(state: State) -> None:
    """Supervised steps; reference and values begin where they end."""
    trained: Any = state.engine.module
    warmup.warm_up(state.run, state.loaded, state.task, state.config, loss=supervised_loss)
    if state.reference is not None:
        copy_parameters(state.loaded.model, state.reference.module)
    if state.config.value_model == "copy":
        copy_parameters(state.loaded.model.base_model, trained.value.body)


def supervised_loss(
    module: PolicyAndValue, some: Completions, num_tokens: Tensor, backend: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of some rows in the loss of a batch with this many answer tokens."""
    loss, metrics = warmup.supervised_loss(module.policy, some, num_tokens, backend)
    # DDP waits for the gradient of every parameter, those of the values too.
    return loss + 0.0 * module(some[:1])[1].sum(), metrics


def logprobs_of(inputs: HeadInputs, some: Completions, temperature: float, backend: str) -> Tensor:
    """Log-probs of the completions' tokens, (B, T - 1) fp32, 0 elsewhere."""
    targets = some.input_ids[:, 1:].masked_fill(~some.completion_mask[:, 1:], -100)
    with inputs.autocast():
        return fr.linear_logprobs(
            inputs.hidden[:, :-1],
            inputs.head.weight,
            targets,
            temperature=temperature,
            backend=backend,
            **inputs.head.kwargs(),
        ).logprobs


def step(state: State, number: int) -> Metrics:
    """One rollout and its updates."""
    config = state.config
    batch = collect(state, number)
    metrics = summary(state, batch) | update(state, batch)
    state.kl.update(metrics["objective/kl"], config.prompts_per_step)
    if config.sample_steps and (number == 1 or number % config.sample_steps == 0):
        rows = zip(batch.samples, batch.completions.texts, batch.scores.tolist())
        state.run.samples(number, [{**sample, "completion": text, "score": score} for sample, text, score in rows])
    return metrics | {"episode": number * config.prompts_per_step}


@torch.no_grad()
def collect(state: State, number: int) -> Batch:
    """Sample and score the completions of this process's prompts; what was expected, and what to learn from them."""
    config, n = state.config, state.config.prompts_per_step
    prompts = data.batch_at(state.task.train, config.seed, (number - 1) * n, n)
    own = rollout.own_rows(state.engine, n, config)
    samples = [prompts[i] for i in own]
    drawn = rollout.uniforms(config.seed, number, n, config.max_new_tokens)[own]
    completions = sample_completions(state, samples, uniforms=drawn)
    scores = score(state, completions, samples) - config.missing_eos_penalty * completions.truncated
    mask = completions.completion_mask[:, 1:] & ~scores.isnan().unsqueeze(1)
    old_logprobs, kl, values = (torch.zeros(mask.shape, device=mask.device) for _ in range(3))
    # Micro-batches as in the updates: the same shapes give the same bits, and a ratio of 1 before the first update.
    for rows in (micro for mini in minibatches(len(own), config) for micro in slices(mini, config.micro_batch_size)):
        some = completions[rows]
        width = some.input_ids.shape[1] - 1
        logprobs, values[rows, :width] = state.engine(policy_and_values, config, some)
        old_logprobs[rows, :width] = logprobs
        if config.kl_coef:
            kl[rows, :width] = KL_ESTIMATORS[config.kl_estimator](logprobs, reference_logprobs(state, some))
    token_rewards = at_last_token(scores, mask) - state.kl.coef * kl
    if config.whiten_rewards:
        token_rewards = whiten(token_rewards, mask, shift_mean=False, total=state.engine.sum)
    advantages, returns = gae(token_rewards, values, mask, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask, total=state.engine.sum)
    return Batch(samples, completions, scores, mask, old_logprobs, kl, values, advantages, returns)


def sample_completions(state: State, samples: Sequence[Sample], uniforms: Tensor | None) -> Completions:
    """One completion for each sample; greedy without uniforms."""
    config, loaded = state.config, state.loaded
    prompts = [encode_prompt(loaded.tokenizer, loaded.processor, sample, config.chat_template) for sample in samples]
    with state.engine.whole():
        return rollout.generate(
            loaded.model,
            loaded.tokenizer,
            prompts,
            max_new_tokens=config.max_new_tokens,
            uniforms=uniforms,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            batch_size=config.rollout_batch_size or None,
        )


def score(state: State, completions: Completions, samples: Sequence[Sample]) -> Tensor:
    """(B,) fp32: weighted sum of the rewards, plus the reward model's; NaN where none of them could score."""
    config, columns = state.config, []
    if state.rewards:
        timeout = config.reward_timeout
        columns.append(evaluation.score_together(state.engine, state.rewards, completions, samples, timeout))
    if state.reward_model is not None:
        with state.reward_model.whole() as module:
            rows = slices(slice(0, len(samples)), config.micro_batch_size)
            columns.append(torch.cat([rewards_of(module, completions[some]) for some in rows]).unsqueeze(1))
    weights = [*(config.reward_weights or [1.0] * len(state.rewards)), *([1.0] if state.reward_model else [])]
    return weighted_sum(torch.cat([column.to(state.engine.device) for column in columns], dim=1), weights)


def policy_and_values(module: PolicyAndValue, config: Config, some: Completions) -> tuple[Tensor, Tensor]:
    inputs, values = module(some)
    return logprobs_of(inputs, some, config.temperature, config.backend), values


def reference_logprobs(state: State, some: Completions) -> Tensor:
    config, lora = state.config, state.config.lora_r > 0

    def of(module: Any) -> Tensor:
        model = module.policy if lora else module
        inputs = fr.lm_head.forward(model, some.input_ids, some.attention_mask, **some.model_inputs())
        return logprobs_of(inputs, some, config.temperature, config.backend)

    with models.without_adapters(state.loaded.model) if lora else nullcontext():
        return (state.reference or state.engine)(of)


def update(state: State, batch: Batch) -> Metrics:
    """`num_ppo_epochs` passes of `num_minibatches` updates each; -> metrics, means over the updates."""
    config, updates = state.config, []
    for mini in minibatches(len(batch.samples), config) * config.num_ppo_epochs:
        num_tokens = state.engine.sum(batch.mask[mini].sum()).clamp(min=1)
        pieces = [(config, batch[rows], num_tokens) for rows in slices(mini, config.micro_batch_size)]
        metrics = state.engine.update(ppo_loss, pieces)
        metrics["val/ratio_var"] -= (metrics["val/ratio"] - 1) ** 2
        updates.append(metrics)
    means = {name: sum(metrics[name] for metrics in updates) / len(updates) for name in updates[0]}
    del means["learning_rate"]
    return means | {"lr": updates[-1]["learning_rate"]}


def ppo_loss(
    module: PolicyAndValue, config: Config, batch: Batch, num_tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of a micro-batch in the loss of a mini-batch with this many tokens, and in its metrics."""
    some = batch.completions
    inputs, values = module(some)
    with inputs.autocast():
        policy, means = fr.linear_policy_loss(
            inputs.hidden[:, :-1],
            inputs.head.weight,
            some.input_ids[:, 1:],
            advantages=batch.advantages,
            completion_mask=batch.mask,
            old_logprobs=batch.old_logprobs,
            objective=config.loss(),
            num_tokens=num_tokens,
            temperature=config.temperature,
            outputs=("entropy",),
            backend=config.backend,
            **inputs.head.kwargs(),
        )
    targets = batch.returns, batch.values, batch.mask
    value = value_loss(values, *targets, cliprange_value=config.cliprange_value, num_tokens=num_tokens)
    means |= value_metrics(values.detach(), *targets, cliprange_value=config.cliprange_value)
    share = batch.mask.sum() / num_tokens
    entropy = share * means["entropy"]
    return policy + config.vf_coef * value, {
        "loss/policy_avg": policy + config.entropy_coef * entropy,
        "loss/value_avg": value,
        "policy/approxkl_avg": share * means["approx_kl"],
        "policy/clipfrac_avg": share * means["clip_ratio/region_mean"],
        "policy/entropy_avg": entropy,
        "val/clipfrac_avg": share * means["value_clip_fraction"],
        "val/ratio": share * means["ratio_mean"],
        "val/ratio_var": share * (means["ratio_var"] + (means["ratio_mean"] - 1).square()),  # about 1: these add up
    }


def summary(state: State, batch: Batch) -> Metrics:
    """Of a rollout over all processes: means per completion that has a score, KL and entropy summed over its tokens."""
    mask, total, scored = batch.mask, state.engine.sum, ~batch.scores.isnan()
    sums = [
        scored.sum(),
        batch.scores.nansum(),
        batch.kl[mask].sum(),
        -batch.old_logprobs[mask].sum(),
        mask.sum(),
        (~batch.completions.truncated).sum(),
    ]
    count, scores, kl, entropy, tokens, ended = total(torch.stack([x.float() for x in sums])).tolist()
    _, variance = moments(batch.returns, mask, total=total)
    _, residual = moments(batch.returns - batch.values, mask, total=total)
    per = 1 / count if count else math.nan
    penalty = -state.kl.coef * kl * per
    return {
        "objective/kl": kl * per,
        "objective/kl_coef": state.kl.coef,
        "objective/entropy": entropy * per,
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": penalty + scores * per,
        "objective/scores": scores * per,
        "val/explained_variance": 1 - (residual / variance).item(),
        "val/num_eos_tokens": ended,
        "completion_length": tokens * per,
    }


@torch.no_grad()
def evaluate(state: State) -> Metrics:
    """Of greedy answers to the first `eval_samples` test samples: accuracies, or with a reward model the mean score."""
    task = state.task
    samples = task.test[: state.config.eval_samples or None]
    if state.reward_model is None:
        right = evaluation.correct(state.engine, state.loaded, task, state.config, samples)
        return evaluation.accuracies(right, samples, task.train)
    mine = state.engine.mine(samples)
    scores = score(state, sample_completions(state, mine, uniforms=None), mine).tolist() if mine else []
    return {"score": torch.tensor(state.engine.gather(scores)).nanmean().item()}
