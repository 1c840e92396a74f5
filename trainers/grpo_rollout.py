"""What a step of GRPO learns from: completions of groups, scored and rated, and how they go into its updates.

scored -> rated        at each process, of its own prompts
(dead groups replaced, by `resample_dead` further rollouts at most)
ready                  rows exchanged where tokens are balanced; micro-batches; old and reference log-probs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf import advantages
from fused_rlhf.trainers import data, evaluation, rewards
from fused_rlhf.trainers import rollout as rollouts
from fused_rlhf.trainers.data import Sample
from fused_rlhf.trainers.grpo_config import Config
from fused_rlhf.trainers.minibatches import (
    ANY,
    Rows,
    Turn,
    chunks,
    columns_of,
    deal,
    exchanged,
    forwards,
    own_prompts,
    turns_of,
)
from fused_rlhf.trainers.rollout import Completions
from fused_rlhf.trainers.run import Logged
from fused_rlhf.trainers.sampler import sampled

if TYPE_CHECKING:
    from fused_rlhf.trainers.grpo import GRPOTrainer

OF_UPDATE = ("loss", "grad_norm", "learning_rate")  # metrics that are of no tokens


@dataclass(frozen=True)
class Rollout:
    """This process's B completions of one step, those of a prompt side by side, T tokens at most."""

    samples: Sequence[Sample]
    completions: Completions
    scores: Tensor  # (B, number of rewards) fp32, NaN where unscorable
    rewards: Tensor  # (B,) fp32, their weighted sum
    lengths: Tensor  # (B,) tokens of each completion
    advantages: Tensor  # (B,) fp32
    old_logprobs: Tensor | None = None  # (B, T - 1) fp32; None where the only update is on-policy
    ref_logprobs: Tensor | None = None  # (B, T - 1) fp32; None where beta is 0
    turns: Sequence[Turn] = ()  # the updates that it is for, in their order

    def __getitem__(self, rows: Rows) -> Rollout:
        """Some of the completions, cut to the longest of them."""
        some = self.completions[rows]
        old, ref = (
            None if x is None else x[rows, : some.input_ids.shape[1] - 1]
            for x in (self.old_logprobs, self.ref_logprobs)
        )
        scores, rewards, lengths = self.scores[rows], self.rewards[rows], self.lengths[rows]
        samples, values = [self.samples[row] for row in rows], self.advantages[rows]
        return Rollout(samples, some, scores, rewards, lengths, values, old, ref)

    def live(self, config: Config) -> Tensor:
        """(B,) bool: whether a completion has a part in the loss, but for its divisors."""
        some = self.completions.completion_mask.any(dim=1)
        return some & (self.advantages != 0) if config.skips_dead else some


@torch.no_grad()
def collect(trainer: GRPOTrainer, number: int) -> Rollout:
    """Sample and score `num_generations` completions of this process's prompts of a step, and say how each did.

    Groups without an advantage give way to such of up to `resample_dead` further rollouts, of other prompts.
    """
    config, own = trainer.config, trainer.engine
    rollout = rated(trainer, *scored(trainer, number))
    for attempt in range(1, config.resample_dead + 1):
        dead = [group for group in groups(config, len(rollout.samples)) if not rollout.advantages[group].any()]
        if not own.sum(torch.tensor(len(dead), device=own.device)):
            break
        samples, completions, scores = scored(trainer, number, attempt)
        more = rated(trainer, samples, completions, scores)
        spare = [group for group in groups(config, len(samples)) if more.advantages[group].any()]
        order = list(range(len(samples)))
        for out, new in zip(dead, spare):
            order[out[0] : out[-1] + 1] = [i + len(samples) for i in new]
        both = rollouts.joined([rollout.completions, completions])
        taken = [*rollout.samples, *samples], both, torch.cat([rollout.scores, scores])
        rollout = rated(trainer, [taken[0][i] for i in order], both[order], taken[2][order])
    return rollout


def groups(config: Config, count: int) -> list[list[int]]:
    """The rows of each prompt."""
    return [list(some) for some in chunks(range(count), config.num_generations)]


def scored(trainer: GRPOTrainer, number: int, attempt: int = 0) -> tuple[Sequence[Sample], Completions, Tensor]:
    """Completions of a step's prompts, or of those of a further rollout, and their rewards, (B, number of rewards)."""
    config, n = trainer.config, trainer.config.prompts_per_step
    seed = config.seed + 15_485_863 * attempt  # another order of the prompts, and other numbers
    prompts = data.batch_at(trainer.task.train, seed, (number - 1) * n, n)
    own = own_prompts(trainer.engine, len(prompts), config)
    samples = [prompts[i] for i in own for _ in range(config.num_generations)]
    completions = sample_completions(trainer, seed, number, prompts, own)
    scores = evaluation.score_together(trainer.engine, trainer.rewards, completions, samples, config.reward_timeout)
    return samples, completions, scores


def rated(trainer: GRPOTrainer, samples: Sequence[Sample], completions: Completions, scores: Tensor) -> Rollout:
    """Their advantages."""
    config = trainer.config
    weights = config.reward_weights or [1.0] * len(trainer.rewards)
    lengths = completions.attention_mask.sum(dim=1) - torch.tensor(
        [len(prompt.ids) for prompt in completions.prompts], device=completions.input_ids.device
    )
    values = relative_rewards(trainer, scores, weights, lengths)
    rewarded = advantages.weighted_sum(scores, weights)
    return Rollout(samples, completions, scores, rewarded, lengths, values)


@torch.no_grad()
def ready(trainer: GRPOTrainer, number: int, rollout: Rollout) -> Rollout:
    """The rows that this process learns from, how they go into the updates, and their old and reference log-probs."""
    config, own = trainer.config.with_sampler(rollout.completions.sampling_logprobs is not None), trainer.engine
    total = len(rollout.samples) // config.num_minibatches * own.world
    columns: Sequence[int] = columns_of(own, len(rollout.samples), config)
    if config.mask_truncated:
        rollout = replace(rollout, completions=rollout.completions.without_truncated())
    if trainer.exchanges:
        costs = [
            length * alive for length, alive in zip(rollout.completions.sizes().lengths, rollout.live(config).tolist())
        ]
        rows, columns = exchanged(own, costs, config.num_generations, config)
        rollout = everywhere(trainer, rollout)[rows]
    completions = rollout.completions
    dealt = deal(columns, total, config, number, config.num_iterations)
    turns = turns_of(own, dealt, rollout.live(config).tolist(), completions.sizes(), config)
    first = turns[: config.num_minibatches]
    old = logprobs(config, trainer.engine, completions, first, config.truncation) if config.off_policy else None
    ref = logprobs(config, trainer.by_reference, completions.whole(), first) if config.beta else None
    return replace(rollout, old_logprobs=old, ref_logprobs=ref, turns=turns)


def everywhere(trainer: GRPOTrainer, rollout: Rollout) -> Rollout:
    """The rows of all processes, on each of them."""
    own, samples = trainer.engine, trainer.engine.gather(list(rollout.samples))
    completions = rollouts.everywhere(own, rollout.completions)
    numbers = (rollout.scores, rollout.rewards, rollout.lengths, rollout.advantages)
    scores, rewarded, lengths, values = (own.accelerator.gather(x) for x in numbers)
    return Rollout(samples, completions, scores, rewarded, lengths, values)


def sample_completions(
    trainer: GRPOTrainer, seed: int, number: int, prompts: Sequence[Sample], own: Sequence[int]
) -> Completions:
    """`num_generations` for each of the prompts `own`, by the model or the external sampler."""
    config, loaded, G = trainer.config, trainer.loaded, trainer.config.num_generations
    grouped = [prompt for prompt in rollouts.encoded(loaded, [prompts[i] for i in own], config) for _ in range(G)]
    if trainer.sampler is not None:
        return sampled(trainer.engine, loaded, trainer.sampler, grouped, config)
    drawn = rollouts.uniforms(seed, number, len(prompts) * G, config.max_new_tokens)
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
    config: Config,
    call: Callable[..., Tensor],
    completions: Completions,
    turns: Sequence[Turn],
    truncation: fr.Truncation | None = None,
) -> Tensor:
    """Log-probs of the completions, (B, T - 1), 0 elsewhere, by `call(function, *args)` with a model before them; over what
    `completions.cut(truncation)` keeps.

    Over the very micro-batches of the updates: a matrix product's last bits may depend on its number of rows, and with
    the same rows the ratio is 1 on-policy.
    """
    B, T = completions.input_ids.shape
    result = torch.zeros(B, T - 1, device=completions.input_ids.device)
    for rows in forwards(turns):
        some = completions[rows or ANY]
        found = call(rollouts.completion_logprobs, some, config.temperature, config.backend, truncation)
        if rows:
            result[rows, : some.input_ids.shape[1] - 1] = found
    return result


def named(config: Config, metrics: Logged) -> Logged:
    """Metrics of tokens under names that say which tokens."""
    if not config.skips_dead:
        return metrics
    return {name if name in OF_UPDATE else f"live/{name}": value for name, value in metrics.items()}


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
    return {name: value.item() for name, value in metrics.items()}


def differences(trainer: GRPOTrainer, rollout: Rollout) -> Logged:
    """How far an external sampler's log-probs are from the model's own, where it reports some."""
    config, sampling, old = trainer.config, rollout.completions.sampling_logprobs, rollout.old_logprobs
    if sampling is None or old is None:
        return {}
    mask = rollout.completions.completion_mask[:, 1:] & rollout.live(config)[:, None]
    difference = (old - sampling).abs().nan_to_num(0.0) * mask
    total, count = trainer.engine.sum(torch.stack([difference.sum(), mask.sum()])).tolist()
    return named(config, {"sampling/logprob_difference": total / max(count, 1)})
