"""Frameworks that take logits, on deferred ones: `fr.defer(model)` on their model, and that is all where they call torch alone.

Some hand logits to a kernel of their own where a GPU or a package is there. These functions have to be told:

    from fused_rlhf.integrations import logits
    logits.patch("trl")            # or "openrlhf", "verl"; in every process, before or after their modules are imported

From then on the function does what it does without the kernel wherever its logits are deferred; all others go the way they
went. Names and arguments are checked first. Nothing here imports a framework but `patch`, the one that is named.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fused_rlhf.deferred.tensor import Deferred


def _token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """(...) of logits (..., V) and labels (...)."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _openrlhf(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    if temperature != 1.0:
        logits.div_(temperature)  # in place, as theirs: what reads these logits later expects it
    return _token_logprobs(logits, labels)


def _verl(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    return _token_logprobs(logits, labels)


def _trl(logits: Tensor, index: Tensor | None = None, row_mask: Tensor | None = None) -> bool:
    return False


@dataclass(frozen=True)
class _Function:
    """One that must be told of deferred logits, its first argument; `ours` has its other arguments."""

    module: str
    name: str
    ours: Callable[..., Any]

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.ours).parameters)


FUNCTIONS = {
    "openrlhf": _Function("openrlhf.models.utils", "log_probs_from_logits", _openrlhf),  # flash_attn's cross entropy
    "trl": _Function("trl.trainer.utils", "_supports_trl_loss_kernel", _trl),  # whether its Triton kernel serves
    "verl": _Function("verl.utils.torch_functional", "logprobs_from_logits", _verl),  # flash_attn's, or an NPU's
}


def patch(framework: str) -> None:
    """Tell a framework's function of deferred logits, in this process, also in modules that hold it already.

    Args:
        framework: "openrlhf", "trl" (1.16 and later; ms-swift calls its functions) or "verl".

    Raises:
        ValueError: another name.
        ModuleNotFoundError: the framework is not installed.
        ImportError: it has no such function, or one with other arguments.
    """
    if framework not in FUNCTIONS:
        raise ValueError(f"framework must be one of {sorted(FUNCTIONS)}, got {framework!r}")
    of = FUNCTIONS[framework]
    theirs = vars(importlib.import_module(of.module)).get(of.name)
    if hasattr(theirs, "takes_deferred"):
        return
    found = None if theirs is None else tuple(inspect.signature(theirs).parameters)
    if theirs is None or found != of.arguments:
        raise ImportError(f"{of.module}.{of.name} takes {found}, expected {of.arguments}")
    told = _told(theirs, of.ours)
    package = of.module.split(".")[0]
    for loaded in [m for key, m in sys.modules.items() if key.split(".")[0] == package and m is not None]:
        if vars(loaded).get(of.name) is theirs:
            setattr(loaded, of.name, told)


def _told(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def function(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (ours if isinstance(logits, Deferred) else theirs)(logits, *args, **kwargs)

    function.takes_deferred = True  # type: ignore[attr-defined]
    return function
