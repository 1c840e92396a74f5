"""quack (the package `quack-kernels`): its cross entropy of whole logits, and its chunked one, which gives the mean alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fused_rlhf.bench.provider import ROUNDED, Output, Step, provider
from fused_rlhf.bench.providers.plain import LOGPROB_OPS

if TYPE_CHECKING:
    from fused_rlhf.bench.inputs import Inputs


@provider("quack", packages=("quack-kernels", "torch"), ops=LOGPROB_OPS, tolerance=ROUNDED)
def quack(inputs: Inputs) -> Step:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    if not inputs.hidden.is_cuda:
        raise ValueError("quack's kernels need a GPU")
    hidden, weight, labels = inputs.hidden, inputs.weight, inputs.labels
    return lambda: -linear_cross_entropy_func(hidden, weight, None, labels, reduction="none").float()


@provider("quack-chunked", packages=("quack-kernels", "torch"), ops=("sft",), tolerance=ROUNDED)
def chunked(inputs: Inputs) -> Step:
    """Gradients in the forward; on Hopper by exponentials that its products scale."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if not inputs.hidden.is_cuda:
        raise ValueError("quack's kernels need a GPU")
    hidden, weight, labels = inputs.hidden, inputs.weight, inputs.labels
    return lambda: Output(chunked_linear_cross_entropy(hidden, weight, labels))
