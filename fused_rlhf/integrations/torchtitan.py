"""torchtitan's cross entropy and log-probs from hidden states, in the places of components/loss.py's:

    from fused_rlhf.integrations.torchtitan import FusedLoss

    loss_fn = FusedLoss()                     # in the place of ChunkedLossWrapper(CrossEntropyLoss)
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True

    loss, metrics = loss_fn(model(tokens), labels, global_valid_tokens)

There is one call instead of one per chunk, and its gradient is an ordinary one. A head that FSDP2 or tensor parallelism has
sharded is taken as it is. Nothing here imports torchtitan.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from fused_rlhf import notices
from fused_rlhf.fsdp import Shards, forward_replaced
from fused_rlhf.functional import linear_logprobs
from fused_rlhf.op.head import Head
from fused_rlhf.private import fsdp_alone
from fused_rlhf.tensor_parallel import shard_of

IGNORE_INDEX = -100


class FusedLoss:
    """Called as torchtitan's ChunkedLossWrapper around CrossEntropyLoss is."""

    def __init__(self) -> None:
        self.lm_head: nn.Module | None = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Must be called before the first loss."""
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the tokens' cross entropy, over global_valid_tokens where they are given.

        Args:
            pred: (T, H) or (B, T, H), hidden states of a forward with `_skip_lm_head`. labels: of their rows; -100 is left out.

        Returns:
            fp32, 0-d, and no metrics.

        Raises:
            RuntimeError: there is no head yet.
            ValueError, TypeError: as `compute_logprobs`; loss_inputs, which are for other losses.
        """
        if self.lm_head is None:
            raise RuntimeError("set_lm_head must be called before the loss is")
        if loss_inputs:
            raise TypeError(f"loss_inputs must be empty for a cross entropy, got {sorted(loss_inputs)}")
        logprobs = compute_logprobs(pred, labels, self.lm_head)
        assert isinstance(logprobs, Tensor)
        loss = -logprobs.sum()
        return (loss if global_valid_tokens is None else loss / global_valid_tokens), {}


def compute_logprobs(
    hidden: Tensor, labels: Tensor, lm_head: nn.Module, *, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """As torchtitan's function of that name, of hidden states and head in the place of logits.

    Args:
        hidden: (T, H) or (B, T, H). labels: of its rows, int64; -100 is left out, and gives 0.
        lm_head: a linear layer. In an FSDP2 group of its own and sharded now, it is streamed; in a group with other modules it
            is whole for the call, as FSDP2 makes it. Rows over a mesh dimension named "tp" stay where they are, of a module
            that `fully_shard` was called for as well. Every rank must call. Gradients are FSDP2's own, averages or sums.
        return_entropy: the entropies, too, without a gradient as in torchtitan.

    Returns:
        Log-probs, or log-probs and entropies, of the shape of labels; fp32.

    Raises:
        ValueError, TypeError: as `linear_logprobs`; a head that is sharded otherwise; sharded rows.
    """
    module: Any = lm_head
    rows, targets = _local(hidden), _local(labels)

    def of(rows: Tensor, head: Head) -> tuple[Tensor, ...]:
        notices.runs("torchtitan's log-probs", rows, head, "auto", "labels of -100 are skipped")
        outputs = ("entropy",) if return_entropy else ()
        found = linear_logprobs(rows, head, targets, ignore_index=IGNORE_INDEX, outputs=outputs)
        return (found.logprobs,) if found.entropy is None else (found.logprobs, found.entropy.detach())

    if not isinstance(lm_head, FSDPModule):
        found = of(rows, _head(module))
    elif (shards := _shards(module)) is not None:
        weight, bias = module.weight, shards.whole(getattr(module, "bias", None))
        found = of(shards.cast(rows), Head(weight.to_local(), bias, stream=shards.stream(weight)))
    else:

        def forward(rows: Tensor) -> tuple[Tensor, ...]:
            return tuple(value.clone() for value in of(rows, _head(module)))  # of a view FSDP2 warns

        with fsdp_alone(module), forward_replaced(module, forward):
            found = module(rows)  # between FSDP2's hooks, which make the weight whole and take its gradient
    return (found[0], found[1]) if return_entropy else found[0]


def _shards(module: Any) -> Shards | None:
    """Of a head to stream: ranks of a "tp" dimension have the same rows of hidden states, and nothing to average."""
    weight = module.weight
    parallel = isinstance(weight, DTensor) and "tp" in (weight.device_mesh.mesh_dim_names or ())
    return None if parallel else Shards.of(module, weight)


def _head(module: Any) -> Head:
    """What the module holds now: a whole head, or its rows over "tp"."""
    weight, bias = module.weight, getattr(module, "bias", None)
    if not isinstance(weight, DTensor):
        if isinstance(module, nn.Linear) and len(weight) != module.out_features:
            raise ValueError(
                f"lm_head.weight must have all {module.out_features} rows or be a DTensor, got a plain tensor of {len(weight)}"
                "; give the tensor-parallel group to linear_logprobs(process_group=)"
            )
        return Head(weight, bias)
    names, placements = weight.device_mesh.mesh_dim_names, weight.placements
    if all(type(p) is Replicate for p in placements):
        return Head(weight.to_local(), None if bias is None else bias.to_local())
    if names != ("tp",) or type(placements[0]) is not Shard or placements[0].dim != 0:
        raise ValueError(
            "lm_head.weight must be sharded by fully_shard(lm_head), or by rows over one mesh dimension named 'tp', got "
            f"{placements} over {names}; a head in the root's group must be whole now (reshard_after_forward=False)"
        )
    weight, bias, over = shard_of(module)
    return Head(weight, bias, vocab_size=over.vocabulary, process_group=over.process_group)


def _local(value: Tensor) -> Tensor:
    """Rows of this rank."""
    if not isinstance(value, DTensor):
        return value
    if any(not isinstance(p, Replicate) for p in value.placements):
        raise ValueError(f"pred and labels must be local tensors, or replicated, got placements {value.placements}")
    return value.to_local()
