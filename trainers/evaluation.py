"""Accuracy: the share of samples whose greedy answer is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fused_rlhf.trainers.data import Sample
from fused_rlhf.trainers.rewards import Reward, score
from fused_rlhf.trainers.rollout import generate


def correct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    reward: Reward,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Tensor:
    """The reward of each sample's greedy answer, (len(samples),) fp32 on the CPU; 1 is right."""
    prompts = [sample["prompt"] for sample in samples]
    batches = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=0.0, batch_size=batch_size)
    return score([reward], [text for batch in batches for text in batch.texts], samples)[:, 0]


def accuracies(right: Tensor, samples: Sequence[Sample], train: Sequence[Sample]) -> dict[str, float]:
    """accuracy; where some but not all of the prompts occur in `train`, accuracy_unseen too: of those that do not."""
    seen = {sample["prompt"] for sample in train}
    unseen = torch.tensor([sample["prompt"] not in seen for sample in samples])
    metrics = {"accuracy": right.mean().item()}
    if unseen.any() and not unseen.all():
        metrics["accuracy_unseen"] = right[unseen].mean().item()
    return metrics


def describe(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' on ')} {100 * value:.1f} %" for name, value in metrics.items())
