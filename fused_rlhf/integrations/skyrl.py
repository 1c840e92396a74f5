"""SkyRL's fused log-probs of its Megatron workers: put the function in the place of its own,

    import skyrl.backends.skyrl_train.distributed.megatron.model_utils as theirs
    from fused_rlhf.integrations.skyrl import fused_lm_head_logprob_apply

    theirs._fused_lm_head_logprob_apply = fused_lm_head_logprob_apply

in every worker, whichever backend its configuration names. Nothing here imports SkyRL.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fused_rlhf import notices
from fused_rlhf.functional import linear_logprobs
from fused_rlhf.op.head import Head


def fused_lm_head_logprob_apply(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    chunk_size: int,
    tp_group: dist.ProcessGroup,
    inference_only: bool = False,
) -> Tensor:
    """Log-probabilities of `target`.

    Args:
        hidden: (B, S, H). weight: (V / tp, H), the rows from vocab_start_index on, divided by the temperature.
        target: (B, S), shifted by the caller.
        tp_group: the tensor-parallel group.
        inference_only: no graph is kept.
        backend, vocab_end_index, chunk_size: change nothing.

    Returns:
        (B, S) fp32, the same bits on every rank. The gradient of `hidden` is this rank's own part, as in SkyRL, whose gather of
        the sequence sums it.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs`.
    """
    several = dist.get_world_size(tp_group) > 1
    if inference_only:
        hidden, weight = hidden.detach(), weight.detach()
    head = Head(weight, vocab_start=vocab_start_index if several else None)
    notices.runs("SkyRL's log-probs", hidden, head, "auto", "no logits whatever chunk_size is")
    group = tp_group if several else None
    return linear_logprobs(hidden, head, target, process_group=group, hidden_grad="local").logprobs
