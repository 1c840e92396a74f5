"""Liger: its chunked GRPO and DPO losses, its fused linear cross entropy, and its scaled one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.ops import DPO_BETA, EPSILON
from fused_rlhf.bench.provider import ROUNDED, Output, Step, provider
from fused_rlhf.bench.providers.plain import LOGPROB_OPS

if TYPE_CHECKING:
    from torch import Tensor

    from fused_rlhf.bench.inputs import Inputs

PACKAGES = ("liger_kernel", "torch")


def memory(case: Case, device: str) -> float:
    """grpo: tiles of 2048 rows by 4096 columns, four fp32 ones at once; dpo: whole rows of a pair of sequences, three fp32
    buffers, and two narrow ones. Both keep the weight's gradient of one sequence (pair) beside the sum."""
    head = 0 if case.frozen_head else case.V * case.H
    if case.op == "grpo":
        rows = min(case.T, 2048)
        return 4 * 4 * rows * min(case.V, 4096) + 4 * head + case.gradient_bytes + 4 * case.T * case.H
    logits = 2 * case.T * case.V
    return logits * (12 + (2 * case.itemsize if case.itemsize < 4 else 0)) + head * case.itemsize + case.gradient_bytes


@provider(
    "liger",
    packages=PACKAGES,
    ops=("grpo", "dpo"),
    where=lambda case: not (case.zero_rows or case.objective),  # it takes one advantage per sequence
    tolerance=ROUNDED,
    memory=memory,
)
def liger(inputs: Inputs) -> Step:
    """Without torch.compile, one sequence (or pair) at a time as by default."""
    return grpo(inputs) if inputs.case.op == "grpo" else dpo(inputs)


def grpo(inputs: Inputs) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    case = inputs.case
    module = LigerFusedLinearGRPOLoss(
        beta=case.beta,
        compiled=False,
        use_ref_model=case.beta != 0,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        loss_type="grpo",
    )
    ref = None if inputs.ref_logprobs is None else inputs.sequences(inputs.ref_logprobs)
    mask = inputs.sequences(inputs.mask).long()

    def run() -> Output:
        loss, _ = module(
            inputs.sequences(inputs.hidden),
            inputs.weight,
            inputs.sequences(inputs.targets),
            mask,
            inputs.sequences(inputs.advantages)[:, 0],
            ref_per_token_logps=ref,
            old_per_token_logps=inputs.sequences(inputs.old_logprobs),
        )
        return Output(loss)

    return run


def dpo(inputs: Inputs) -> Step:
    """It takes no reference log-probs: the reference's hidden states and head, from which it computes them, a product
    more than the op needs."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(beta=DPO_BETA, compiled=False)
    assert inputs.ref_hidden is not None
    labels, ref_hidden = inputs.sequences(inputs.labels), inputs.sequences(inputs.ref_hidden)

    def run() -> Output:
        loss, _ = module(
            inputs.weight,
            inputs.sequences(inputs.hidden),
            labels,
            ref_input=ref_hidden,
            ref_weight=inputs.weight.detach(),
        )
        return Output(loss)

    return run


@provider("liger-flce", packages=PACKAGES, ops=LOGPROB_OPS, tolerance=ROUNDED)
def cross_entropy(inputs: Inputs) -> Step:
    """Its fused linear cross entropy, with a result per token unless the mean is asked for; Triton alone."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if not inputs.hidden.is_cuda:
        raise ValueError("liger-flce is written in Triton alone; it needs a GPU")
    mean, labels = inputs.case.op == "sft", inputs.labels
    module = LigerFusedLinearCrossEntropyLoss(reduction="mean" if mean else "none")

    def run() -> Tensor | Output:
        found = module(inputs.weight, inputs.hidden, labels)
        return Output(found) if mean else -found

    return run


@provider("liger-scaled", packages=PACKAGES, ops=LOGPROB_OPS, tolerance=ROUNDED)
def scaled_cross_entropy(inputs: Inputs) -> Step:
    """What verl calls: a CuTe kernel on Hopper (which needs nvidia-cutlass-dsl), blocks of 512 rows in torch elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    labels = inputs.labels
    return lambda: -LigerFusedLinearScaledCrossEntropyFunction.apply(inputs.hidden, inputs.weight, labels).float()
