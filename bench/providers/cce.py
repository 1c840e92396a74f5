"""Apple's cut-cross-entropy (`cut-cross-entropy`): logits in on-chip memory, small gradients filtered by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fused_rlhf.bench.provider import ROUNDED, Step, provider
from fused_rlhf.bench.providers.plain import LOGPROB_OPS

if TYPE_CHECKING:
    from torch import Tensor

    from fused_rlhf.bench.inputs import Inputs


def cce(inputs: Inputs, impl: str) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    if not inputs.hidden.is_cuda:
        raise ValueError("cce is written in Triton alone; it needs a GPU")
    labels = inputs.labels

    def run() -> Tensor:
        return -linear_cross_entropy(inputs.hidden, inputs.weight, labels, reduction="none", impl=impl).float()

    return run


@provider("cce", packages=("cut-cross-entropy", "torch"), ops=LOGPROB_OPS, tolerance=ROUNDED)
def filtered(inputs: Inputs) -> Step:
    return cce(inputs, "cce")


@provider("cce-exact", packages=("cut-cross-entropy", "torch"), ops=LOGPROB_OPS, tolerance=ROUNDED)
def exact(inputs: Inputs) -> Step:
    """Without the filter and with fp32 sums; not in the package's first release."""
    return cce(inputs, "cce_exact")
