"""The clipped value loss of PPO, and its metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_rlhf.checks import check_count
from fused_rlhf.door import Door
from fused_rlhf.objectives.registry import check_number
from fused_rlhf.objectives.surrogates import Count


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask.bool(), values, torch.zeros_like(values))


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    cliprange_value: float | None = 0.2,
    num_tokens: Count | None = None,
) -> Tensor:
    """1/2 mean of max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) over the active tokens   (arXiv:1707.06347)

    Args:
        values: any shape, differentiable; what the mask leaves out never matters.
        returns, old_values: the same shape, no gradient. old_values may be None when cliprange_value is.
        mask: the same shape, bool or 0 / 1; None: all tokens are active.
        cliprange_value: c, positive; None does not clip.
        num_tokens: the global count that normalises; default: this call's active tokens.

    Raises:
        ValueError: shapes differ, cliprange_value is not positive, or it is given without old_values.
    """
    for name, other in (("returns", returns), ("old_values", old_values), ("mask", mask)):
        if other is not None and other.shape != values.shape:
            raise ValueError(f"{name} must have the shape of values {tuple(values.shape)}, got {tuple(other.shape)}")
    door, active = Door(), None if mask is None else mask.bool()
    door.zero_or_one("mask", mask)
    if num_tokens is None:
        door.read()
        count = values.numel() if active is None else active.sum()
    else:
        (live,) = (values.numel(),) if active is None else door.read(active)
        count = check_count("num_tokens", num_tokens, live)
    loss = (_masked(values, mask) - _masked(returns, mask)).square()
    if cliprange_value is not None:
        check_number("cliprange_value", cliprange_value, above=0)
        if old_values is None:
            raise ValueError(f"old_values must be given with cliprange_value={cliprange_value}, got None")
        clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
        loss = torch.maximum(loss, (_masked(clipped, mask) - _masked(returns, mask)).square())
    return 0.5 * loss.sum() / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


@torch.no_grad()
def value_metrics(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor,
    mask: Tensor | None = None,
    *,
    cliprange_value: float | None = 0.2,
) -> dict[str, Tensor]:
    """Over the active tokens, 0-d: value_clip_fraction, where clipping raised the loss; explained_variance of returns."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    count = mask.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return _masked(x, mask).sum() / count

    def variance(x: Tensor) -> Tensor:
        return mean((x - mean(x)).square())

    metrics = {"explained_variance": 1 - variance(returns - values) / variance(returns).clamp(min=1e-12)}
    if cliprange_value is not None:
        clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
        raised = (clipped - returns).square() > (values - returns).square()
        metrics["value_clip_fraction"] = mean(raised.to(values.dtype))
    return metrics
