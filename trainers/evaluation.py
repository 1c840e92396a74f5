"""Accuracy: the share of samples whose greedy answer is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rlhf.advantages import weighted_sum
from fused_rlhf.trainers.data import Sample, Task, asked
from fused_rlhf.trainers.engine import Engine
from fused_rlhf.trainers.model import Loaded
from fused_rlhf.trainers.rewards import Reward, RewardError, resolve
from fused_rlhf.trainers.rewards import score as scores_of
from fused_rlhf.trainers.rollout import Completions, complete, encoded
from fused_rlhf.trainers.rollout_config import RolloutConfig


def score_together(
    engine: Engine,
    functions: Sequence[Reward],
    completions: Completions,
    samples: Sequence[Sample],
    timeout: float = 0.0,
) -> Tensor:
    """Rewards of this process's completions, (B, R) fp32 on its device; where one process fails, all raise."""
    scores, error = torch.full((len(samples), len(functions)), torch.nan), None
    try:
        scores = scores_of(functions, completions.texts, samples, timeout)
    except RewardError as found:
        error = found
    engine.agree(error)
    return scores.to(engine.device)


def greedy_scores(
    engine: Engine,
    loaded: Loaded,
    config: RolloutConfig,
    samples: Sequence[Sample],
    functions: Sequence[Reward],
    weights: Sequence[float],
    timeout: float = 0.0,
) -> Tensor:
    """The weighted rewards of each sample's greedy completion, (len(samples),) fp32 on the CPU."""
    mine = engine.mine(samples) or samples[:1]  # nobody may stay away from what all do together
    completions = complete(engine, loaded, encoded(loaded, mine, config), config, batch_size=config.micro_batch_size)
    scores = weighted_sum(score_together(engine, functions, completions, mine, timeout), weights)
    return torch.tensor(engine.gather(scores.tolist() if engine.mine(samples) else []))


def correct(engine: Engine, loaded: Loaded, task: Task, config: RolloutConfig, samples: Sequence[Sample]) -> Tensor:
    """The task's reward of each sample's greedy answer, (len(samples),) fp32 on the CPU; 1 is right."""
    return greedy_scores(engine, loaded, config, samples, [resolve(task.reward)], [1.0])


def has_answers(task: Task) -> bool:
    return all(sample.get("answer") is not None for sample in task.test)


def score(
    engine: Engine,
    loaded: Loaded,
    task: Task,
    config: RolloutConfig,
    functions: Sequence[Reward],
    weights: Sequence[float],
) -> dict[str, float]:
    """The mean weighted reward of greedy completions of the first `eval_samples` test samples."""
    samples = task.test[: config.eval_samples or None]
    found = greedy_scores(engine, loaded, config, samples, functions, weights, config.reward_timeout)
    return {"score": found.nanmean().item()}


def accuracy(engine: Engine, loaded: Loaded, task: Task, config: RolloutConfig) -> dict[str, float]:
    """`accuracies` of the first `eval_samples` test samples; nothing where there are none."""
    samples = task.test[: config.eval_samples or None]
    if not samples:
        return {}
    return accuracies(correct(engine, loaded, task, config, samples), samples, task.train)


def accuracies(right: Tensor, samples: Sequence[Sample], train: Sequence[Sample]) -> dict[str, float]:
    """accuracy; where some but not all of the prompts occur in `train`, accuracy_unseen too: of those that do not."""
    seen = {asked(sample) for sample in train}
    unseen = torch.tensor([asked(sample) not in seen for sample in samples])
    metrics = {"accuracy": right.mean().item()}
    if unseen.any() and not unseen.all():
        metrics["accuracy_unseen"] = right[unseen].mean().item()
    return metrics


def describe(metrics: dict[str, float]) -> str:
    if "score" in metrics:
        return f"score {metrics['score']:.4g}"
    found = ", ".join(f"{name.replace('_', ' on ')} {100 * value:.1f} %" for name, value in metrics.items())
    return found or "no samples are held out"
