"""What the tables of policy and preference objectives share: options, checks, and derivatives of a small function."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.kernels.interface import TokenGrads
from fused_rlhf.words import nearest


def keywords(function: Callable[..., Any]) -> set[str]:
    """The options of a registered function."""
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def options_of(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """The options of a registered function: given, or its own defaults."""
    parameters = inspect.signature(function).parameters
    return {name: given.get(name, parameters[name].default) for name in keywords(function)}


def formula(function: Callable[..., Any]) -> str:
    """The first line of a docstring, without its source."""
    return (inspect.getdoc(function) or "").split("\n")[0].split("   (")[0]


def registered(argument: str, name: str, table: dict[str, Any]) -> None:
    if name not in table:
        raise ValueError(f"{argument} must be one of {sorted(table)}, got {name!r}{nearest(name, table)}")


def check_number(name: str, value: Any, *, above: float = -math.inf, at_least: float = -math.inf) -> None:
    """Raises TypeError unless `value` is a number, ValueError unless it is finite, > above and >= at_least."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number > above and number >= at_least):
        bound = f" and > {above:g}" if above > -math.inf else f" and >= {at_least:g}" if at_least > -math.inf else ""
        raise ValueError(f"{name} must be finite{bound}, got {value}")


def check_options(of: object, given: Iterable[str], known: set[str]) -> None:
    """Raises TypeError for a keyword that a preset does not have, naming those it has and the nearest."""
    for name in given:
        if name not in known:
            raise TypeError(f"{name} is no option of {of}: {sorted(known)}{nearest(name, known)}")


def snake_case(name: str) -> str:
    """DrGRPO -> dr_grpo, GSPOToken -> gspo_token, ReinforcePP -> reinforce_pp"""
    out = name[0]
    for before, letter, after in zip(name, name[1:], name[2:] + " "):
        starts = letter.isupper() and (before.islower() or after.islower())
        out += f"_{letter}" if starts else letter
    return out.lower()


def differentiated(
    function: Callable[[Tensor, Tensor | None], Tensor], logprobs: Tensor, entropy: Tensor | None, by_entropy: bool
) -> tuple[Tensor, TokenGrads]:
    """What `function(logprobs, entropy)` gives and the derivatives of its sum, by autograd on the (n,) vectors.

    None of the derivatives under `torch.inference_mode`, where nothing can be differentiated, nor needs to be.
    """
    if torch.is_inference_mode_enabled():
        return function(logprobs, entropy), TokenGrads(None)
    with torch.enable_grad():
        lp = logprobs.detach().requires_grad_()
        h = None if entropy is None else entropy.detach().requires_grad_(by_entropy)
        loss = function(lp, h)
        wanted = [lp] if h is None or not by_entropy else [lp, h]
        found = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
    by_logprob = torch.zeros_like(logprobs) if found[0] is None else found[0]
    return loss.detach(), TokenGrads(by_logprob, found[1] if len(wanted) == 2 else None)
