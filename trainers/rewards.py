"""Rewards of completions, and the advantages made from them.

A reward is a function `(prompts, completions, **columns) -> one number per completion`, where `columns` are the other
columns of the samples (`answer`, ...) as lists of the same length, so that `def f(completions, answer, **_)` is one.
None or NaN says that a completion cannot be scored: it is left out of its group's statistics and gets no advantage.

    advantage_i = (R_i - mean of the group) / (std of the group + 1e-4),    R_i = sum_r weight_r reward_ri
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

Reward = Callable[..., Sequence[float | None]]

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


class RewardError(ValueError):
    """A reward function raised, or returned something that is not one number per completion."""


def exact_match(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where the completion, white space at its ends aside, is the answer; else 0."""
    return [float(got.strip() == str(want).strip()) for got, want in zip(completions, answer, strict=True)]


def numeric_answer(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where the completion's number equals the answer's: the first one after `####` if that occurs, else the last."""
    return [
        float((number := number_in(got)) is not None and number == number_in(str(want)))
        for got, want in zip(completions, answer, strict=True)
    ]


def number_in(text: str) -> Fraction | None:
    _, marker, after = text.rpartition("####")
    numbers = NUMBER.findall(after if marker else text)
    return Fraction(numbers[0 if marker else -1].replace(",", "")) if numbers else None


REWARDS: dict[str, Reward] = {"exact_match": exact_match, "numeric_answer": numeric_answer}


def resolve(name: str) -> Reward:
    """A built-in reward by its name, or your own by `module:function`; the working directory is searched too."""
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"rewards: {name!r} is none of {sorted(REWARDS)}; your own is written module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        reward = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"rewards: cannot load {name!r}: {error}") from error
    if not callable(reward):
        raise ValueError(f"rewards: {name!r} is a {type(reward).__name__}, expected a function")
    return reward


def name_of(reward: Reward) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def score(rewards: Sequence[Reward], completions: Sequence[str], samples: Sequence[dict[str, Any]]) -> Tensor:
    """Rewards of the completions, (B, R) fp32 with NaN where unscorable.

    Raises RewardError, naming the function and the sample, where a function raises or returns anything but one finite
    number or None per completion.
    """
    return torch.stack([_call(reward, completions, samples) for reward in rewards], dim=1)


def dry_run(rewards: Sequence[Reward], samples: Sequence[dict[str, Any]]) -> None:
    """Score the answers of the first two samples as if a model had given them: a broken reward shows before a run."""
    some = samples[:2]
    score(rewards, [str(sample["answer"]) for sample in some], some)


def _call(reward: Reward, completions: Sequence[str], samples: Sequence[dict[str, Any]]) -> Tensor:
    name = name_of(reward)
    try:
        values = reward(**_arguments(completions, samples))
    except Exception as error:
        where = _first_failing(reward, completions, samples)
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}; {where}") from error
    try:
        values = list(values)
    except TypeError:
        raise RewardError(f"reward {name!r} returned {values!r}, expected a list of numbers") from None
    if len(values) != len(completions):
        raise RewardError(f"reward {name!r} returned {len(values)} values for {len(completions)} completions")
    numbers = []
    for value, completion, sample in zip(values, completions, samples, strict=True):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            number = math.inf
        if math.isinf(number) or isinstance(value, str):
            at = _place(completion, sample)
            raise RewardError(f"reward {name!r} returned {value!r}, expected a finite number or None; {at}")
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.float32)


def _arguments(completions: Sequence[str], samples: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {"prompts": columns.pop("prompt"), "completions": list(completions), **columns}


def _place(completion: str, sample: dict[str, Any]) -> str:
    return f"at prompt {sample['prompt']!r}, completion {completion!r}"


def _first_failing(reward: Reward, completions: Sequence[str], samples: Sequence[dict[str, Any]]) -> str:
    """The sample on which a reward raises when it is called on one sample at a time."""
    for completion, sample in zip(completions, samples, strict=True):
        try:
            reward(**_arguments([completion], [sample]))
        except Exception:
            return _place(completion, sample)
    return f"in a batch of {len(completions)} completions, at none of them alone"


def weighted_sum(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """(B, R) scores -> (B,) rewards; NaN counts as 0 beside other scores, and is NaN where no function could score."""
    total = (scores * scores.new_tensor(weights)).nansum(dim=1)
    return total.masked_fill(scores.isnan().all(dim=1), math.nan)


def group_advantages(
    rewards: Tensor, num_generations: int, scale: Literal["group", "batch", "none"] = "group"
) -> Tensor:
    """Advantages of completions that lie together by prompt: (B,) rewards -> (B,) fp32, B = prompts x num_generations.

    The group's mean is subtracted; the result is divided by the (unbiased) standard deviation of the group
    (DeepSeekMath, arXiv:2402.03300) or of the batch, plus 1e-4, or by nothing (Dr. GRPO, arXiv:2503.20783). NaN rewards
    count in no statistic and get advantage 0.
    """
    if num_generations < 2 or rewards.ndim != 1 or len(rewards) % num_generations:
        raise ValueError(
            f"group_advantages: expected rewards (prompts x num_generations,) and num_generations >= 2, "
            f"got shape {tuple(rewards.shape)} and {num_generations}"
        )
    groups = rewards.float().view(-1, num_generations)
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (std(groups).unsqueeze(1) + 1e-4)
    elif scale == "batch":
        centred = centred / (std(groups.reshape(1, -1)) + 1e-4)
    elif scale != "none":
        raise ValueError(f"scale: expected 'group', 'batch' or 'none', got {scale!r}")
    return centred.nan_to_num(0.0).reshape(-1)


def std(rows: Tensor) -> Tensor:
    """Unbiased standard deviation of each row's numbers, NaN ones left out; 0 for fewer than two."""
    count = (~rows.isnan()).sum(dim=1)
    centred = rows - rows.nanmean(dim=1, keepdim=True)
    return (centred.square().nansum(dim=1) / (count - 1).clamp(min=1)).sqrt()
