"""Deferred logits are computed outside of compiled graphs: a region that meets them breaks there, and goes on after it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_of_graphs(function: Function) -> Function:
    """As torch.compiler.disable, which would import the compiler: seconds, for who does not compile."""
    left_alone: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not left_alone:
            left_alone.append(torch.compiler.disable(function, reason="deferred logits are computed outside of graphs"))
        return left_alone[0](*args, **kwargs)

    return call  # type: ignore[return-value]
