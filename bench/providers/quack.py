"""quack (the package `quack-kernels`): its cross entropy of whole logits. Its chunked one has no result per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fused_rlhf.bench.provider import ROUNDED, Step, provider
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
