"""What the losses over sequences refuse, and the reference's log-probs where it is computed in the same call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fused_rlhf.checks import check_tensor, shape
from fused_rlhf.door import Door
from fused_rlhf.kernels.interface import Shard
from fused_rlhf.objectives.policy import PolicyLoss
from fused_rlhf.objectives.preference import PreferenceLoss
from fused_rlhf.op.head import Reference
from fused_rlhf.op.logprobs import linear_logprobs
from fused_rlhf.op.parallel import sharded
from fused_rlhf.op.rows import Tokens, check_shapes, flat_sequences
from fused_rlhf.segments import precise


def check_policy(
    door: Door,
    targets: Tensor,
    objective: PolicyLoss,
    completion_mask: Tensor | None,
    per_token: Mapping[str, Tensor | None],
    reference: Reference | None,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, int]:
    """-> the sequence of each flat position, (B T,), and the number of sequences. Values are checked by the door."""
    if not isinstance(objective, PolicyLoss):
        raise TypeError(f"objective must be a PolicyLoss such as GRPO(), got {type(objective).__name__}")
    check_shapes(targets, completion_mask=completion_mask, **per_token)
    if objective.beta != 0 and per_token["ref_logprobs"] is None and reference is None:
        raise ValueError(
            f"ref_logprobs or ref_hidden must be given when beta is not 0, got neither with beta={objective.beta}"
        )
    sequence_of, count = flat_sequences(door, targets, cu_seqlens)
    door.zero_or_one("completion_mask", completion_mask)
    check_tensor("advantages", advantages, targets.device)
    if advantages.shape not in (targets.shape, (count,)):
        raise ValueError(
            f"advantages must have shape {(count,)} or that of targets {shape(targets)}, got {shape(advantages)}"
        )
    return sequence_of, count


def check_preference(
    door: Door,
    targets: Tensor,
    objective: PreferenceLoss,
    completion_mask: Tensor | None,
    ref_logprobs: Tensor | None,
    ref_computed: bool,
    labels: Tensor | None,
    kl: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, int, Tensor | None]:
    """As `check_policy`; and the reference's sums (S,) in fp64, where ref_logprobs are such."""
    if not isinstance(objective, PreferenceLoss):
        raise TypeError(f"objective must be a PreferenceLoss such as DPO(), got {type(objective).__name__}")
    if targets.dim() == 1 and cu_seqlens is None:
        raise ValueError("cu_seqlens must be given for flat (N,) targets, got None")
    sequence_of, count = flat_sequences(door, targets, cu_seqlens)
    if ref_logprobs is not None:
        check_tensor("ref_logprobs", ref_logprobs, targets.device)
    summed = ref_logprobs is not None and of_sequences(ref_logprobs, count)
    check_shapes(targets, completion_mask=completion_mask, ref_logprobs=None if summed else ref_logprobs)
    door.zero_or_one("completion_mask", completion_mask)
    given = ref_logprobs is not None or ref_computed
    if objective.needs_reference and not given:
        raise ValueError(f"ref_logprobs or ref_hidden must be given for {objective.losses}, got neither")
    if given and not objective.needs_reference:
        name = "ref_hidden" if ref_logprobs is None else "ref_logprobs"
        raise ValueError(f"{name} must be None for {objective.losses}, which have no reference")
    if objective.paired:
        if count % 2:
            raise ValueError(f"targets must hold as many rejected as chosen sequences, got {count} in all")
        if labels is not None:
            raise ValueError(f"labels must be None for {objective.losses}, which compare pairs")
    else:
        if labels is not None:
            check_tensor("labels", labels, targets.device)
        if labels is None or labels.shape != (count,):
            got = "None" if labels is None else shape(labels)
            raise ValueError(f"labels must be ({count},), one for each sequence, for {objective.losses}; got {got}")
        door.zero_or_one("labels", labels)
    if kl is not None:
        check_tensor("kl", kl, targets.device)
        if "kto" not in objective.losses or kl.dim() != 0:
            raise ValueError(
                f"kl must be a 0-d tensor, and given for kto alone; got {shape(kl)} with {objective.losses}"
            )
        value = kl.detach()
        door.refuse(~(value >= 0), lambda _: ValueError(f"kl must be at least 0, got {value.item():g}"))
    sums = precise(ref_logprobs.detach()).contiguous() if summed and ref_logprobs is not None else None
    return sequence_of, count, sums


def of_sequences(values: Tensor, count: int) -> bool:
    """Whether a vector has one number for each of `count` sequences.

    A packed batch may have as many tokens as sequences, some of which are empty: what could be either is taken as one
    number for each sequence, as it would be beside a padded batch.
    """
    return values.shape == (count,)


def sharded_reference(reference: Reference | None, shard: Shard) -> Reference | None:
    """The reference's head as the same shard."""
    return None if reference is None else replace(reference, projection=sharded(reference.projection, shard))


def reference_logprobs(reference: Reference, tokens: Tokens, backend: str) -> Tensor:
    """(N,), without a graph."""
    with torch.no_grad():
        rows = tokens.rows(reference.hidden, reference.head, reference.projection)
        return linear_logprobs(rows, reference.projection, None, (), backend).logprobs
