"""TRL: the chunked functions its trainers call, and the objective in torch, as there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.ops import OPS, Values
from fused_rlhf.bench.provider import ROUNDED, Step, provider
from fused_rlhf.bench.providers.plain import LOGPROB_OPS

if TYPE_CHECKING:
    from torch import Tensor

    from fused_rlhf.bench.inputs import Inputs

ROWS, COLUMNS = 4096, 32768


def memory(case: Case, device: str) -> float:
    """One tile of logits, and fp32 sums of both gradients, cast at the end. Without Triton the softmax of a tile takes
    fp32 tiles more: three forward (logits, their distance from the maximum, its exponential), seven backward (scaled
    logits twice, log p, p, the gradient, its two terms), eight with an entropy."""
    tile = float(min(case.N, ROWS) * min(case.V, COLUMNS))
    wide = 4 * (case.N + (0 if case.frozen_head else case.V)) * case.H
    if not OPS[case.op].backward:
        return tile * (case.itemsize + (0 if device == "cuda" else 12))
    if OPS[case.op].values == "kl":
        return tile * (8 if device == "cuda" else 44) + wide
    working = tile * (case.itemsize + (0 if device == "cuda" else 32 if OPS[case.op].entropy else 28)) + wide
    return max(working, wide + case.gradient_bytes) if case.itemsize < 4 else working


WITHOUT_SETS = tuple(op.name for op in OPS.values() if op.values != "sampled")


@provider("trl", packages=("trl", "torch"), ops=WITHOUT_SETS, tolerance=ROUNDED, memory=memory)
def trl(inputs: Inputs) -> Step:
    """Tiles of 4096 rows by 32768 columns; only the completion's rows on a GPU, all of them elsewhere, as its trainers do."""
    op = OPS[inputs.case.op]
    if op.values == "kl":
        return divergence(inputs)
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    options = (1.0, COLUMNS, None, 1.0, ("entropy",) if op.entropy else ())  # temperature, columns, softcap, scale
    mask, compact = inputs.mask, inputs.hidden.is_cuda and inputs.case.density < 1

    def run() -> Values:
        x, y = (inputs.hidden[mask], inputs.targets[mask]) if compact else (inputs.hidden, inputs.targets)
        logprobs, entropy, *_ = ChunkedLogProbFunction.apply(x, inputs.weight, None, y, *options)
        return Values(whole(logprobs), whole(entropy) if op.entropy else None)

    def whole(rows: Tensor) -> Tensor:
        if not compact:
            return rows.masked_fill(~mask, 0.0) if inputs.case.density < 1 else rows
        return rows.new_zeros(mask.shape).masked_scatter(mask, rows)

    return run


@provider("trl-selective", packages=("trl", "torch"), ops=LOGPROB_OPS, tolerance=ROUNDED)
def selective(inputs: Inputs) -> Step:
    """`selective_log_softmax` of the model's own logits, as some of its experimental trainers do."""
    from trl.trainer.utils import selective_log_softmax

    sequences = inputs.sequences
    return lambda: selective_log_softmax(
        sequences(inputs.hidden) @ inputs.weight.T, sequences(inputs.targets)
    ).flatten()


def divergence(inputs: Inputs) -> Step:
    """Its distillation trainer's: 1.0 makes it KL(student || teacher). It computes the entropy along."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run() -> Tensor:
        return ChunkedDivergenceFunction.apply(
            inputs.hidden, inputs.weight, None, inputs.ref_hidden, inputs.weight.detach(), None, 1.0
        )[0]

    return run
