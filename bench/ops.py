"""What is computed: an op is one `Op` line at the end of this file, and its loss above it.

A provider gives per-token values of `Op.values` ("logprobs", the "kl" of two heads, or "sampled": what the op asks of a token
that a sampler drew) and, where the op asks, the entropy; `Op.loss` maps them to the scalar that is differentiated. The same
function, in fp64, is the truth. A provider with a loss of its own returns that instead.

Operations are counted in matrix products of 2 N V H; those an op cannot do without are one per head forward, one for dX,
and one for dW unless the head is frozen. Rows outside the mask need none, rows without a gradient none backward. An op that
is not `whole` multiplies with the given tokens' rows of the head alone: K columns in the place of V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 0.2  # the clip range of grpo and ppo
ENTROPY_COEF = 0.01  # of ppo
DPO_BETA = 0.1
TOP_P = 0.9  # the nucleus of top_p


class Values(NamedTuple):
    """Per token, (N,): what a provider computed, or the truth in fp64."""

    values: Tensor
    entropy: Tensor | None = None


class Batch(Protocol):
    """What a loss reads of `inputs.Inputs`, (N,) each: a protocol, since a case counts its products by the table below."""

    mask: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    upstream: Tensor

    @property
    def beta(self) -> float: ...

    def sequences(self, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Op:
    """`loss` is None where nothing is differentiated. `vectors`: fp32 numbers per token that are read or written.

    `ids`: how many tokens are given of each row. `whole`: whether its products are with all of the head, or with the rows of
    these tokens.
    """

    name: str
    about: str
    loss: Callable[[Values, Batch], Tensor] | None
    vectors: int
    values: str = "logprobs"
    entropy: bool = False
    ids: int = 0
    whole: bool = True

    @property
    def backward(self) -> bool:
        return self.loss is not None

    @property
    def heads(self) -> int:
        return 2 if self.values == "kl" else 1


def weighted_sum(found: Values, inputs: Batch) -> Tensor:
    return (found.values * inputs.upstream).sum()


def sft(found: Values, inputs: Batch) -> Tensor:
    """Cross entropy, mean over tokens."""
    return -(found.values * inputs.mask).sum() / inputs.mask.sum()


def clipped(logprobs: Tensor, inputs: Batch) -> Tensor:
    ratio = (logprobs - inputs.old_logprobs).exp()
    return -(ratio * inputs.advantages).minimum(ratio.clamp(1 - EPSILON, 1 + EPSILON) * inputs.advantages)


def grpo(found: Values, inputs: Batch) -> Tensor:
    """Clipped surrogate + beta k3, mean over the tokens of each sequence, then over sequences."""
    loss = clipped(found.values, inputs)
    if inputs.ref_logprobs is not None:
        difference = inputs.ref_logprobs - found.values
        loss = loss + inputs.beta * (difference.exp() - difference - 1)
    loss, mask = inputs.sequences(loss), inputs.sequences(inputs.mask)
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def ppo(found: Values, inputs: Batch) -> Tensor:
    """Clipped surrogate with an advantage per token, less an entropy bonus, mean over tokens."""
    assert found.entropy is not None
    loss = clipped(found.values, inputs) - ENTROPY_COEF * found.entropy
    return (loss * inputs.mask).sum() / inputs.mask.sum()


def dpo(found: Values, inputs: Batch) -> Tensor:
    """-log sigmoid(beta d), d the difference of the summed log-ratios; the chosen half of the sequences comes first."""
    from torch.nn.functional import logsigmoid

    assert inputs.ref_logprobs is not None
    ratios = inputs.sequences((found.values - inputs.ref_logprobs) * inputs.mask).sum(1)
    chosen, rejected = ratios.chunk(2)
    return -logsigmoid(DPO_BETA * (chosen - rejected)).mean()


OPS = {
    op.name: op
    for op in (
        Op("logprobs_fwd", "log-probs, no gradient", None, vectors=1),
        Op("logprobs_fwd_bwd", "log-probs and their backward", weighted_sum, vectors=2),
        Op("sft", "mean cross entropy and its gradients, as supervised fine-tuning has it", sft, vectors=2),
        Op("grpo", "GRPO's loss and gradients", grpo, vectors=5),
        Op("dpo", "DPO's loss and gradients, reference log-probs given", dpo, vectors=3),
        Op("ppo", "PPO's loss with an entropy bonus, and gradients", ppo, vectors=5, entropy=True),
        Op("kl", "exact KL(policy || reference) of two heads, and gradients", weighted_sum, vectors=2, values="kl"),
        Op(
            "kept",
            "log-probs over given sets of 20 tokens a row, and their backward",
            weighted_sum,
            vectors=2,
            values="sampled",
            ids=20,
            whole=False,
        ),
        Op(
            "top_p",
            f"log-probs over the nucleus {TOP_P}, found from the logits, and their backward",
            weighted_sum,
            vectors=2,
            values="sampled",
        ),
        Op(
            "ids",
            "log-probs plus the mean log-prob of 64 given tokens of the row, and their backward",
            weighted_sum,
            vectors=2,
            values="sampled",
            ids=64,
        ),
    )
}
