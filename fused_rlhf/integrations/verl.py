"""verl's fused log-probabilities and entropy on our op.

`linear_cross_entropy` has the arguments and results of the function of that name in verl.utils.kernel.linear_cross_entropy,
which verl's Triton backend (`use_fused_kernels=true`, `fused_kernel_options.impl_backend=triton`) looks up at each forward,
and which the modules for Megatron have imported by then; `FusedLinearForPPO` is that of its torch backend:

    from fused_rlhf.integrations.verl import patch_verl
    patch_verl()

in every worker, e.g. as a module of yours named by `actor_rollout_ref.model.external_lib`. Only `patch_verl` imports verl;
`unpatch_verl` takes it back, `patched_verl` is a context manager of both. In spite of its name the first result of the function
is the log-probability itself, not its negative.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_rlhf import notices
from fused_rlhf.functional import linear_logprobs
from fused_rlhf.op.head import Head

REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `labels` and entropies, with z = hidden @ weight.T / temperature.

    Any H, V and strides; only the wanted gradients are computed.

    Args:
        hidden: (..., H), N tokens in all; bf16, fp16 or fp32. Megatron's (s, 1, H) goes with labels (1, s).
        weight: (V, H).
        labels: (...), int64, in [0, V); -100 leaves a token out, and gives it 0 in both results.
        temperature: positive; None means 1.
        reduction: "none", "sum" or "mean" (over the tokens that are not left out) of the log-probabilities, in any case;
            None means "none".
        dist_process_group: Megatron's tensor-parallel group, where weight holds this rank's rows; None: the head is whole.
            As in verl, each rank's d_hidden is then its own part, which the backward of the sequence-parallel gather sums.

    Returns:
        logprobs (N,), a scalar where reduced, and entropy (N,), never reduced; fp32, both differentiable.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs`, and an unknown reduction.
    """
    how = "none" if reduction is None else reduction.lower()
    if how not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {list(REDUCTIONS)}, got {reduction!r}")
    if hidden.shape[:-1] != labels.shape and not _is_one_sequence(hidden, labels):
        raise ValueError(
            f"labels must have shape {tuple(hidden.shape[:-1])}, as hidden, or (1, s) beside Megatron's (s, 1, H), got "
            f"{tuple(labels.shape)}"
        )
    flat = labels.reshape(-1)
    out = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        flat,
        temperature=1.0 if temperature is None else temperature,
        outputs=("entropy",),
        process_group=dist_process_group,
        hidden_grad="local",
    )
    notices.runs("verl's log-probs", hidden, Head(weight), "auto", "labels of -100 are skipped")
    assert out.entropy is not None
    logprobs = out.logprobs
    if how != "none":
        logprobs = logprobs.sum()
    if how == "mean":
        logprobs = logprobs / (flat != -100).sum().clamp(min=1)
    return logprobs, out.entropy


def _is_one_sequence(hidden: Tensor, labels: Tensor) -> bool:
    """Whether these are the (s, 1, H) and (1, s) of Megatron, whose tokens are in one order; of several rows they are not."""
    return hidden.dim() == 3 and hidden.shape[1] == 1 and labels.shape == (1, hidden.shape[0])


class FusedLinearForPPO(torch.nn.Module):
    """In the place of the module of that name in verl.utils.experimental.torch_functional, of verl's torch backend.

    chunk_size changes nothing: no logits are held whatever the length.
    """

    def __init__(self, chunk_size: int = 512) -> None:
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of input_ids and entropies.

        Args:
            hidden_states: (T, H) or (B, T, H). vocab_weights: (V, H). input_ids: (T,) or (B, T), integers.
            temperature: positive.

        Returns:
            Both of the shape of input_ids, fp32, both differentiable.

        Raises:
            ValueError, TypeError: as `linear_logprobs`.
        """
        found = linear_logprobs(
            hidden_states, vocab_weights, input_ids.long(), temperature=temperature, outputs=("entropy",)
        )
        notices.runs("verl's log-probs", hidden_states, Head(vocab_weights), "auto", "labels of -100 are skipped")
        assert found.entropy is not None
        return found.logprobs, found.entropy


def sum_pi_squared(
    hidden: Tensor, weight: Tensor, temperature: float = 1.0, dist_process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sum of the squared probabilities, which verl's optimal token baseline takes and computes from logits.

    Args:
        hidden: (N, H) or (B, T, H). weight, temperature, dist_process_group: as in `linear_cross_entropy`.

    Returns:
        (N,) or (B, T), fp32, differentiable.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs`.
    """
    any_token = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    found = linear_logprobs(
        hidden,
        weight,
        any_token,
        temperature=temperature,
        outputs=("sum_sq",),
        process_group=dist_process_group,
        hidden_grad="local",
    )
    assert found.sum_sq is not None
    return found.sum_sq


# What takes whose place, and the function or class attribute that says with which arguments.
_PLACES: tuple[tuple[str, str, Any, Callable[..., Any], str], ...] = (
    (
        *("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"),
        *(linear_cross_entropy, linear_cross_entropy, "LinearCrossEntropy"),
    ),
    (
        *("verl.utils.experimental.torch_functional", "FusedLinearForPPO"),
        *(FusedLinearForPPO, FusedLinearForPPO.forward, "FusedLinearForPPO"),
    ),
)
_replaced: list[tuple[ModuleType, str, object]] = []  # what was where


def patch_verl() -> None:
    """Put `linear_cross_entropy` and `FusedLinearForPPO` in the place of verl's own, in this process, wherever a module of
    verl holds them, under whatever name. What is imported later finds them, too; a second call changes nothing more.

    verl's modules for Megatron import the function by name, so that replacing it where it is defined reaches those alone
    that are imported later.

    Raises:
        ModuleNotFoundError: verl is not installed.
        ImportError: verl lacks one of them, or has it with other arguments; nothing is replaced then.
    """
    found = [(_theirs(*place), place[2]) for place in _PLACES]
    for theirs, ours in found:
        if theirs is ours:
            continue
        for module in _modules():
            for name in [name for name, value in vars(module).items() if value is theirs]:
                _replaced.append((module, name, theirs))
                setattr(module, name, ours)


def unpatch_verl() -> None:
    """Take back what `patch_verl` did, also in modules that were imported since; without it nothing happens."""
    originals = {id(place[2]): theirs for place in _PLACES for theirs in _original(place[0], place[1])}
    for module in _modules():
        for name, value in list(vars(module).items()):
            if id(value) in originals:
                setattr(module, name, originals[id(value)])
    _replaced.clear()


@contextmanager
def patched_verl() -> Iterator[None]:
    """`patch_verl` in the block, `unpatch_verl` after it."""
    patch_verl()
    try:
        yield
    finally:
        unpatch_verl()


def _theirs(home: str, name: str, ours: Any, like: Callable[..., Any], signed: str) -> Any:
    """verl's own, or ours where that is there already. Raises ImportError where it takes other arguments."""
    module = importlib.import_module(home)
    theirs = vars(module).get(name)
    if theirs is ours:
        return ours
    # An autograd function's `apply` has no signature; its `forward` has.
    forward = getattr(vars(module).get(signed), "forward", None)
    expected, found = (
        None
        if function is None
        else tuple(n for n in inspect.signature(function).parameters if n not in ("ctx", "self"))
        for function in (like, forward)
    )
    if theirs is None or found != expected:
        raise ImportError(f"{home}.{name} takes {found}, expected {expected}")
    return theirs


def _original(home: str, name: str) -> list[object]:
    return [value for module, attribute, value in _replaced if (module.__name__, attribute) == (home, name)]


def _modules() -> list[ModuleType]:
    """Those of verl that are loaded."""
    return [module for key, module in sys.modules.items() if key.split(".")[0] == "verl" and module is not None]
