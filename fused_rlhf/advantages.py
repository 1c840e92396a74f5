"""Advantages: what each completion, or each of its tokens, was worth beyond expectation.

B completions, those of a prompt side by side in groups of G; T tokens; m a (B, T) mask of the completion's tokens.

    group       A_i = (R_i - mean of the group) / (std + 1e-4)            std of the group, of the batch, or 1
    RLOO        A_i = R_i - mean of the group's others
    OPO         A_i = R_i - sum_j n_j R_j / sum_j n_j                     n_j tokens, over the group
    ReMax       A_i = R_i - R(greedy completion of the same prompt)
    REINFORCE++ A_t = whiten(sum_k gamma^k (r_{t+k} - beta kl_{t+k}))
    GAE         A_t = sum_k (gamma lam)^k delta_{t+k},                    delta_t = r_t + gamma V_{t+1} - V_t

t runs over the tokens of the mask alone, V past the last of them is 0. What lies outside a mask never matters, NaN
included, and comes back as 0. A reward of NaN says that the completion could not be scored: it counts in no statistic
and its advantage is 0. Statistics have the unbiased variance. Results are fp32, or fp64 for fp64 input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]


def group_advantages(rewards: Tensor, num_generations: int, scale: Scale = "group") -> Tensor:
    """Advantages within groups: (B,) rewards -> (B,), B = prompts x num_generations.

    The group's mean is subtracted; the result is divided by the standard deviation of the group (DeepSeekMath,
    arXiv:2402.03300) or of the batch, plus 1e-4, or by nothing (Dr. GRPO, arXiv:2503.20783).

    Raises ValueError for other shapes, fewer than two generations, or an unknown scale.
    """
    groups = _groups(rewards, num_generations)
    centred = _centred(groups)
    if scale == "group":
        centred = centred / (std(groups).unsqueeze(1) + 1e-4)
    elif scale == "batch":
        centred = centred / (std(groups.reshape(1, -1)) + 1e-4)
    elif scale != "none":
        raise ValueError(f"scale: expected 'group', 'batch' or 'none', got {scale!r}")
    return centred.nan_to_num(0.0).reshape(-1)


def combine_rewards(
    scores: Tensor,
    weights: Sequence[float],
    num_generations: int,
    how: Aggregation = "sum_then_normalize",
    scale: Scale = "group",
) -> Tensor:
    """Advantages of completions that several functions scored: (B, R) scores and R weights -> (B,).

    sum_then_normalize: `group_advantages` of the weighted sum. normalize_then_sum: the weighted sum of each function's
    own `group_advantages`, whitened over the batch, so that no function drowns another (GDPO, arXiv:2601.05242).

    Raises ValueError as `group_advantages`, and for weights that are not one per function or an unknown `how`.
    """
    if how == "sum_then_normalize":
        return group_advantages(weighted_sum(scores, weights), num_generations, scale)
    if how != "normalize_then_sum":
        raise ValueError(f"how: expected 'sum_then_normalize' or 'normalize_then_sum', got {how!r}")
    unscorable = scores.isnan().all(dim=1)
    own = [group_advantages(column, num_generations, scale) for column in scores.unbind(dim=1)]
    total = weighted_sum(torch.stack(own, dim=1), weights).masked_fill(unscorable, math.nan)
    return group_advantages(total, len(total))


def weighted_sum(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """(B, R) scores -> (B,) rewards; NaN counts as 0 beside other scores, and is NaN where no function could score."""
    if scores.ndim != 2 or scores.shape[1] != len(weights):
        raise ValueError(f"scores must be (B, R) with R weights, got {tuple(scores.shape)} and {len(weights)}")
    total = (scores * scores.new_tensor(weights)).nansum(dim=1)
    return total.masked_fill(scores.isnan().all(dim=1), math.nan)


def std(rows: Tensor) -> Tensor:
    """Unbiased standard deviation of each row's numbers, NaN ones left out; 0 for fewer than two."""
    count = (~rows.isnan()).sum(dim=1)
    centred = _centred(rows)
    return (centred.square().nansum(dim=1) / (count - 1).clamp(min=1)).sqrt()


def _centred(rows: Tensor) -> Tensor:
    """Each row's numbers less their mean; exactly 0 where they are all equal, whatever their mean is rounded to."""
    return (rows - rows.nanmean(dim=1, keepdim=True)).masked_fill(_equal(rows), 0.0)


def _equal(rows: Tensor) -> Tensor:
    """(rows, 1) bool: whether all numbers of a row are equal, NaN ones left out."""
    largest, smallest = rows.nan_to_num(nan=-math.inf).amax(1, True), rows.nan_to_num(nan=math.inf).amin(1, True)
    return largest <= smallest


def rloo_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """R_i less the mean of the group's others: (B,) -> (B,), 0 where there is no other   (RLOO, arXiv:2402.14740)

    Raises ValueError for other shapes or fewer than two generations.
    """
    groups = _groups(rewards, num_generations)
    others = (~groups.isnan()).sum(dim=1, keepdim=True) - 1
    baseline = (groups.nansum(dim=1, keepdim=True) - groups) / others.clamp(min=1)
    values = torch.where(others > 0, groups - baseline, 0.0).masked_fill(_equal(groups), 0.0)
    return values.nan_to_num(0.0).reshape(-1)


def opo_advantages(rewards: Tensor, lengths: Tensor, num_generations: int) -> Tensor:
    """R_i less the group's length-weighted mean: (B,) rewards, (B,) lengths -> (B,)   (OPO, arXiv:2505.23585)

    Raises ValueError for other shapes or fewer than two generations.
    """
    groups = _groups(rewards, num_generations)
    _same_shape("lengths", lengths, "rewards", rewards)
    weights = lengths.view_as(groups) * ~groups.isnan()
    total = weights.sum(dim=1, keepdim=True).clamp(min=1)
    baseline = (weights * groups).nansum(dim=1, keepdim=True) / total
    return (groups - baseline).masked_fill(_equal(groups), 0.0).nan_to_num(0.0).reshape(-1)


def remax_advantages(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """R_i less the reward of the greedy completion of its prompt: (B,), (B,) -> (B,)   (ReMax, arXiv:2310.10505)

    Raises ValueError where the shapes differ.
    """
    _same_shape("greedy_rewards", greedy_rewards, "rewards", rewards)
    return (_wide(rewards) - _wide(greedy_rewards)).nan_to_num(0.0)


def reinforce_pp_advantages(
    rewards: Tensor,
    kl: Tensor,
    mask: Tensor,
    *,
    beta: float,
    gamma: float = 1.0,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """(B,) rewards, (B, T) per-token KL estimates, (B, T) mask -> (B, T)   (REINFORCE++, arXiv:2501.03262)

    The reward counts at the completion's last token. For its variant with a baseline, pass
    `group_advantages(rewards, num_generations, "none")` as the rewards. `total`: as in `moments`.

    Raises ValueError where shapes do not fit.
    """
    _same_shape("kl", kl, "mask", mask)
    mask = mask.bool() & ~rewards.isnan().unsqueeze(1)
    per_token = at_last_token(rewards, mask) - beta * _inside(kl, mask)
    returns, _ = gae(per_token, torch.zeros_like(per_token), mask, gamma=gamma, lam=1.0)
    return whiten(returns, mask, total=total)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates: (B, T) rewards and values, (B, T) mask -> advantages, returns = A + V, (B, T).

    values[:, t] is the value before token t is chosen. Padding may lie on either side, and gaps (a tool's tokens) are
    stepped over.   (arXiv:1506.02438)

    Raises ValueError where shapes differ, or gamma or lam lie outside [0, 1].
    """
    _same_shape("values", values, "rewards", rewards)
    _same_shape("mask", mask, "rewards", rewards)
    for name, decay in (("gamma", gamma), ("lam", lam)):
        if not 0 <= decay <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {decay}")
    mask, rewards, values = mask.bool(), _inside(rewards, mask), _inside(values, mask)
    advantage, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    columns = []
    for reward, value, live in zip(reversed(rewards.unbind(1)), reversed(values.unbind(1)), reversed(mask.unbind(1))):
        delta = reward + gamma * next_value - value
        advantage = torch.where(live, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(live, value, next_value)
        columns.append(advantage)
    advantages = _inside(torch.stack(columns[::-1], dim=1), mask)
    return advantages, advantages + values


def whiten(
    values: Tensor,
    mask: Tensor,
    shift_mean: bool = True,
    *,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """(values - mean) / sqrt(variance + 1e-8) over the mask, any shape; the mean is added back unless `shift_mean`.

    `total`: as in `moments`. Raises ValueError where the shapes differ.
    """
    mean, variance = moments(values, mask, total=total)
    whitened = (_inside(values, mask) - mean) * (variance + 1e-8).rsqrt()
    return _inside(whitened if shift_mean else whitened + mean, mask)


def moments(
    values: Tensor, mask: Tensor, *, total: Callable[[Tensor], Tensor] = lambda sums: sums
) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the mask, 0-d; 0 where there are no values, or one.

    `total` adds a tensor up over the ranks, for moments of the whole batch; by default they are of this call.

    Raises ValueError where the shapes differ.
    """
    _same_shape("mask", mask, "values", values)
    values = _inside(values, mask)
    count, summed = total(torch.stack([mask.sum().to(values), values.sum()]))
    mean = summed / count.clamp(min=1)
    variance = total(_inside(values - mean, mask).square().sum()) / (count - 1).clamp(min=1)
    return mean, variance


def at_last_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """(B,) rewards -> (B, T): each at the last token of its row's mask, 0 elsewhere and in rows without a token."""
    if mask.ndim != 2 or rewards.shape != mask.shape[:1]:
        raise ValueError(f"rewards must be (B,) for a (B, T) mask {tuple(mask.shape)}, got {tuple(rewards.shape)}")
    after = mask.long().flip(1).cumsum(1).flip(1)  # tokens of the mask at or after each position
    return torch.where(mask.bool() & (after == 1), _wide(rewards).unsqueeze(1), 0.0)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _inside(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), _wide(values), 0.0)


def _groups(rewards: Tensor, num_generations: int) -> Tensor:
    if num_generations < 2 or rewards.ndim != 1 or len(rewards) % num_generations:
        raise ValueError(
            f"rewards must be (prompts x num_generations,) with num_generations >= 2, got shape "
            f"{tuple(rewards.shape)} and {num_generations}"
        )
    return _wide(rewards).view(-1, num_generations)


def _same_shape(name: str, value: Tensor, other: str, expected: Tensor) -> None:
    if value.shape != expected.shape:
        raise ValueError(f"{name} must have the shape of {other} {tuple(expected.shape)}, got {tuple(value.shape)}")
