"""What a case differentiates: the loss of its op, or any objective of the library in its place.

    --op grpo --objective cispo        --op dpo --objective simpo

The library's registries say which there are, so that an objective added to them can be measured at once. The loss that
the other methods and the fp64 truth get is the library's own, on the log-probs they computed: what is compared is the
head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.ops import OPS, Values

if TYPE_CHECKING:
    from torch import Tensor

    from fused_rlhf.bench.inputs import Inputs
    from fused_rlhf.objectives import PolicyLoss
    from fused_rlhf.preferences import PreferenceLoss


def names(op: str) -> list[str]:
    """What `Case.objective` may be beside "": presets for policies, and for pairs presets and single losses."""
    from fused_rlhf import objectives, preferences

    if op == "grpo":
        return sorted(objectives.PRESETS)
    pairs = {name for name, make in preferences.PRESETS.items() if make().paired}
    return (
        sorted(pairs | {name for name, loss in preferences.PREFERENCES.items() if loss.paired}) if op == "dpo" else []
    )


def of(case: Case) -> PolicyLoss | PreferenceLoss:
    """The objective that a case names."""
    from fused_rlhf import objectives, preferences

    if case.op == "grpo":
        length = {"max_completion_length": case.T} if case.objective == "dr_grpo" else {}
        return objectives.PRESETS[case.objective](beta=case.beta, **length)
    if case.objective in preferences.PRESETS:
        return preferences.PRESETS[case.objective]()
    return preferences.DPO(case.objective)


def loss_of(case: Case) -> Callable[[Values, Inputs], Tensor] | None:
    """Of a provider's values and of the fp64 truth alike; None where nothing is differentiated."""
    return named_loss if case.objective else OPS[case.op].loss


def named_loss(found: Values, inputs: Inputs) -> Tensor:
    """The objective that the case names, differentiable in the log-probs."""
    import torch

    from fused_rlhf.objectives import PolicyLoss
    from fused_rlhf.segments import Sequences

    objective, mask, count = of(inputs.case), inputs.mask.bool(), inputs.case.N // inputs.case.T
    index = torch.arange(count, device=mask.device).repeat_interleave(inputs.case.T)[mask]
    sequences, lp = Sequences.of(index, count), found.values[mask]
    ref = None if inputs.ref_logprobs is None else inputs.ref_logprobs[mask].to(lp.dtype)
    if isinstance(objective, PolicyLoss):
        policy = objective.bind(
            advantages=inputs.advantages[mask].to(lp.dtype),
            sequences=sequences,
            old_logprobs=inputs.old_logprobs[mask].to(lp.dtype),
            ref_logprobs=ref,
            num_sequences=count,
            num_tokens=lp.numel(),
        )
        return policy.per_token(slice(0, lp.numel()), lp, None).sum()
    pairs = objective.bind(
        sequences=sequences,
        ref_logprobs=ref if objective.needs_reference else None,
        ref_sums=None,
        labels=None,
        kl=None,
        num_pairs=count // 2,
        num_tokens=sequences.lengths[: count // 2].sum(),
        dtype=lp.dtype,
    )
    return (pairs.pair_weight * pairs.per_sequence(lp)).sum().to(lp.dtype)
