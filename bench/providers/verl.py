"""verl's Triton kernel (the `verl` package): log-prob and entropy, both always computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fused_rlhf.bench.ops import OPS, Values
from fused_rlhf.bench.provider import ROUNDED, Step, provider

if TYPE_CHECKING:
    from fused_rlhf.bench.inputs import Inputs

LOGPROBS = tuple(op.name for op in OPS.values() if op.values == "logprobs")


@provider("verl", packages=("verl", "torch"), ops=LOGPROBS, tolerance=ROUNDED)
def verl(inputs: Inputs) -> Step:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    if not inputs.hidden.is_cuda:
        raise ValueError("verl's kernel needs a GPU")

    def run() -> Values:
        logprobs, entropy = linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, 1.0, "none")
        return Values(logprobs, entropy)

    return run
