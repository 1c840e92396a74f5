"""verl's fused log-probabilities and entropy on our op.

`linear_cross_entropy` has the arguments and results of the function of that name in verl.utils.kernel.linear_cross_entropy,
which verl's Triton backend (`use_fused_kernels=true`, `fused_kernel_options.impl_backend=triton`) looks up at each forward:

    import verl.utils.kernel.linear_cross_entropy as module
    from fused_rlhf.integrations.verl import linear_cross_entropy
    module.linear_cross_entropy = linear_cross_entropy

in every worker, e.g. as a module of yours named by `actor_rollout_ref.model.external_lib`. This file imports nothing of verl.
In spite of the name, the first result is the log-probability itself, not its negative.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fused_rlhf.functional import linear_logprobs

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
        hidden: (..., H), N tokens in all; bf16, fp16 or fp32.
        weight: (V, H).
        labels: (...), int64, in [0, V); -100 leaves a token out, and gives it 0 in both results.
        temperature: positive; None means 1.
        reduction: "none", "sum" or "mean" (over the tokens that are not left out) of the log-probabilities, in any case;
            None means "none".
        dist_process_group: one of a single rank, or None.

    Returns:
        logprobs (N,), a scalar where reduced, and entropy (N,), never reduced; fp32, both differentiable.

    Raises:
        ValueError, TypeError: as `linear_logprobs`, and an unknown reduction.
        NotImplementedError: a group of several ranks (row OP12).
    """
    how = "none" if reduction is None else reduction.lower()
    if how not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {list(REDUCTIONS)}, got {reduction!r}")
    if dist_process_group is not None and dist.get_world_size(dist_process_group) > 1:
        raise NotImplementedError(
            "dist_process_group with several ranks (a vocabulary-parallel head, row OP12) is not implemented yet"
        )
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"labels must have shape {tuple(hidden.shape[:-1])}, as hidden, got {tuple(labels.shape)}")
    flat = labels.reshape(-1)
    out = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        flat,
        temperature=1.0 if temperature is None else temperature,
        outputs=("entropy",),
    )
    assert out.entropy is not None
    logprobs = out.logprobs
    if how != "none":
        logprobs = logprobs.sum()
    if how == "mean":
        logprobs = logprobs / (flat != -100).sum().clamp(min=1)
    return logprobs, out.entropy
