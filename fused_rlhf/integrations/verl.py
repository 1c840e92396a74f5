"""verl's fused log-probabilities and entropy on our op.

`linear_cross_entropy` has the arguments and results of the function of that name in verl.utils.kernel.linear_cross_entropy,
which verl's Triton backend (`use_fused_kernels=true`, `fused_kernel_options.impl_backend=triton`) looks up at each forward,
and which the modules for Megatron have imported by then:

    from fused_rlhf.integrations.verl import patch_verl
    patch_verl()

in every worker, e.g. as a module of yours named by `actor_rollout_ref.model.external_lib`. Only `patch_verl` imports verl.
In spite of the name, the first result is the log-probability itself, not its negative.
"""

from __future__ import annotations

import importlib
import inspect
import sys

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


def patch_verl() -> None:
    """Put `linear_cross_entropy` in the place of verl's own, in this process, also in modules that hold it already.

    verl's modules for Megatron import the function by name, so that replacing it where it is defined reaches those alone
    that are imported later.

    Raises:
        ModuleNotFoundError: verl is not installed.
        ImportError: verl has no such function, or one with other arguments.
    """
    name = "linear_cross_entropy"
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    theirs = vars(module).get(name)
    if theirs is linear_cross_entropy:
        return
    arguments = tuple(inspect.signature(linear_cross_entropy).parameters)
    function = getattr(
        vars(module).get("LinearCrossEntropy"), "forward", theirs
    )  # theirs is its `apply`, without a signature
    found = (
        None if function is None else tuple(name for name in inspect.signature(function).parameters if name != "ctx")
    )
    if theirs is None or found != arguments:
        raise ImportError(f"verl.utils.kernel.linear_cross_entropy.{name} takes {found}, expected {arguments}")
    for loaded in [m for key, m in sys.modules.items() if key.split(".")[0] == "verl" and m is not None]:
        if vars(loaded).get(name) is theirs:
            setattr(loaded, name, linear_cross_entropy)
