"""torchtitan's cross entropy and log-probs from hidden states, in the places of components/loss.py's:

    from fused_rlhf.integrations.torchtitan import FusedLoss

    loss_fn = FusedLoss()                     # in the place of ChunkedLossWrapper(CrossEntropyLoss)
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True

    loss, metrics = loss_fn(model(tokens), labels, global_valid_tokens)

There is one call instead of one per chunk, and its gradient is an ordinary one. Nothing here imports torchtitan.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from fused_rlhf import notices
from fused_rlhf.functional import linear_logprobs
from fused_rlhf.op.head import Head

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
        lm_head: a linear layer. Its weight may be a DTensor of FSDP2, which is gathered whole for the call as torchtitan's own
            head is; not of a tensor-parallel plan.
        return_entropy: the entropies, too, without a gradient as in torchtitan.

    Returns:
        Log-probs, or log-probs and entropies, of the shape of labels; fp32.

    Raises:
        ValueError, TypeError: as `linear_logprobs`; a head that is sharded over a mesh dimension named "tp"; sharded rows.
    """
    head = Head(_whole("weight", lm_head.weight), _whole("bias", getattr(lm_head, "bias", None)))  # type: ignore[arg-type]
    notices.runs("torchtitan's log-probs", hidden, head, "auto", "labels of -100 are skipped")
    outputs = ("entropy",) if return_entropy else ()
    found = linear_logprobs(_local(hidden), head, _local(labels), ignore_index=IGNORE_INDEX, outputs=outputs)
    if found.entropy is None:
        return found.logprobs
    return found.logprobs, found.entropy.detach()


def _whole(name: str, value: Any) -> Tensor | None:
    if not isinstance(value, DTensor):
        return value
    names = value.device_mesh.mesh_dim_names or ()
    parallel = [p for dim, p in zip(names, value.placements) if dim == "tp"]
    if any(not isinstance(p, Replicate) for p in parallel):
        raise ValueError(
            f"lm_head.{name} must not be sharded over 'tp', got {value.placements}; give its to_local() and the mesh's group "
            "to linear_logprobs(process_group=)"
        )
    return value.full_tensor()


def _local(value: Tensor) -> Tensor:
    """Rows of this rank."""
    if not isinstance(value, DTensor):
        return value
    if any(not isinstance(p, Replicate) for p in value.placements):
        raise ValueError(f"pred and labels must be local tensors, or replicated, got placements {value.placements}")
    return value.to_local()
