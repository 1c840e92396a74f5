"""Megatron-Core's GPTModel without its logits: an `output_processor`.

    from fused_rlhf.integrations.megatron import Processing, output_processor

    found = model(input_ids, position_ids, attention_mask, labels=labels, loss_mask=loss_mask,
                  output_processor=output_processor, output_processor_context=Processing(temperature=0.7))

`found` is a `LogProbs` of shape (b, s), on every tensor-parallel rank. The model calls the function by keywords, in the place
of its output layer and loss. Under sequence parallelism the hidden states are gathered, and their gradient is
reduce-scattered; without it, it is summed over the group. Nothing here imports Megatron.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_rlhf import notices
from fused_rlhf.functional import LogProbs, linear_logprobs
from fused_rlhf.op.head import Head
from fused_rlhf.op.parallel import gather_sequence

IGNORED = -100


@dataclass(frozen=True)
class Processing:
    """What `output_processor` is to compute; the context that Megatron hands on.

    Args:
        temperature: positive, or (b, s).
        outputs: as in `linear_logprobs`.
        vocab_size: of the tokenizer, where the columns that Megatron pads the vocabulary with are to count for nothing;
            None: they count, as in Megatron's own loss.
        then: `then(hidden (s, b, H), head, targets (s, b), **{process_group, hidden_grad, temperature})` computes something
            else in its place, a loss of `linear_policy_loss` for example; what it gives is returned as it is.
        backend: as in `linear_logprobs`.
    """

    temperature: float | Tensor = 1.0
    outputs: tuple[str, ...] = ()
    vocab_size: int | None = None
    then: Callable[..., Any] | None = None
    backend: str = "auto"


def output_processor(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None = None,
    labels: Tensor | None,
    loss_mask: Tensor | None = None,
    context: Processing | None = None,
    scale_logits: Callable[[Tensor], Tensor] | None = None,
    runtime_gather_output: bool | None = None,
    inference_context: Any = None,
    **unused: Any,
) -> Any:
    """Log-probabilities of `labels`, which Megatron has shifted already.

    Args:
        hidden_states: (s, b, H), of this rank's share of the sequence under sequence parallelism.
        output_layer: the column-parallel layer, for its weight, bias, group and whether the sequence is parallel.
        output_weight: (V / tp, H) that is used in the place of its weight, as where embeddings are tied.
        labels: (b, s), int64; loss_mask: (b, s), 0 where a token counts for nothing, and costs nothing.
        context: a `Processing`; None: its defaults.
        scale_logits: what the model does to its logits: a factor.
        unused: what Megatron hands over beside these: ids, masks, its own loss, its configuration.

    Returns:
        `LogProbs`, (b, s) each, 0 where left out; or what `context.then` gives.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs`; labels that are None, an inference context.
    """
    if labels is None:
        raise ValueError("labels must be given to the model for output_processor, got None")
    if inference_context is not None:
        raise ValueError(
            "inference_context must be None for output_processor, which scores labels and generates nothing"
        )
    asked = Processing() if context is None else context
    if not isinstance(asked, Processing):
        raise TypeError(f"output_processor_context must be a Processing, got {type(asked).__name__}")
    group = _group(output_layer)
    hidden, how = hidden_states, "sum"
    if getattr(output_layer, "sequence_parallel", False):
        hidden, how = gather_sequence(hidden_states, group), "local"
    weight = output_layer.weight if output_weight is None else output_weight
    bias, scale = getattr(output_layer, "bias", None), 1.0 if scale_logits is None else _factor(scale_logits)
    head = Head(weight, bias, scale, vocab_size=None if group is None else asked.vocab_size)
    targets = labels if loss_mask is None else labels.masked_fill(loss_mask == 0, IGNORED)
    temperature = asked.temperature.T if isinstance(asked.temperature, Tensor) else asked.temperature
    notices.runs("Megatron's log-probs", hidden, head, asked.backend, "tokens of loss_mask 0 are skipped")
    shared: dict[str, Any] = {"process_group": group, "hidden_grad": how, "temperature": temperature}
    if asked.then is not None:
        return asked.then(hidden, head, targets.T, **shared)
    found = linear_logprobs(hidden, head, targets.T, outputs=asked.outputs, backend=asked.backend, **shared)
    asked_for = {name: getattr(found, name).T for name in asked.outputs}
    return LogProbs(found.logprobs.T, **asked_for)


def _group(output_layer: Any) -> Any:
    """The tensor-parallel group, None where it has one rank."""
    group = getattr(output_layer, "tp_group", None)
    if group is None:
        from megatron.core import parallel_state  # type: ignore[import-not-found]  # of versions whose layers keep none

        group = parallel_state.get_tensor_model_parallel_group()
    return group if torch.distributed.get_world_size(group) > 1 else None


def _factor(scale_logits: Callable[[Tensor], Tensor]) -> float:
    """Of a function that multiplies. Raises ValueError where it does something else."""
    one, two = scale_logits(torch.tensor([1.0, 2.0], dtype=torch.float64)).tolist()
    if abs(two - 2 * one) > 1e-12 * abs(one):
        raise ValueError(f"scale_logits must multiply by a number, got {one:g} and {two:g} for 1 and 2")
    return float(one)
