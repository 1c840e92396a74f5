"""NeMo-RL's log-probs from hidden states, in its Megatron path: put the function in the place of its own,

    import nemo_rl.distributed.model_utils as theirs
    from fused_rlhf.integrations.nemo_rl import from_parallel_hidden_states_to_logprobs

    theirs.from_parallel_hidden_states_to_logprobs = from_parallel_hidden_states_to_logprobs

before the policy is built. The model's patched forward looks it up there at each call. Nothing here imports NeMo-RL.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from fused_rlhf import notices
from fused_rlhf.functional import linear_logprobs
from fused_rlhf.op.head import Head
from fused_rlhf.op.parallel import gather_sequence


def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: Tensor,
    output_weight_layer: Tensor,
    runtime_gather_output: bool,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: dist.ProcessGroup,
    inference_only: bool = False,
    cp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probabilities of the tokens after the first.

    Args:
        tensor_parallel_hidden_states: (s / tp, b, H): this rank's share of the sequence.
        output_weight_layer: (V / tp, H), the rows from vocab_start_index on.
        target: (b, s) ids, not shifted.
        tp_group: the tensor-parallel group. cp_group: of one rank, or None.
        inference_only: no graph is kept.
        runtime_gather_output, vocab_end_index, chunk_size: change nothing: results are on every rank, the weight says how many
            rows there are, and no logits are held whatever the length.

    Returns:
        (b, s - 1) fp32, the same bits on every rank; differentiable in hidden states, whose gradient is reduce-scattered, and
        weight.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs`; a cp_group of several ranks.
    """
    if cp_group is not None and dist.get_world_size(cp_group) > 1:
        raise ValueError(f"cp_group must have one rank, as in NeMo-RL's own, got {dist.get_world_size(cp_group)}")
    several = dist.get_world_size(tp_group) > 1
    hidden = gather_sequence(tensor_parallel_hidden_states, tp_group)
    head = Head(output_weight_layer, vocab_start=vocab_start_index if several else None)
    shared: dict[str, Any] = {"process_group": tp_group if several else None, "hidden_grad": "local"}
    notices.runs("NeMo-RL's log-probs", hidden, head, "auto", "no logits whatever chunk_size is")
    weight_and_hidden = (hidden.detach(), Head(output_weight_layer.detach(), vocab_start=head.vocab_start))
    hidden, head = weight_and_hidden if inference_only else (hidden, head)
    return linear_logprobs(hidden[:-1], head, target.T[1:], **shared).logprobs.T
