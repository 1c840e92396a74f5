"""What every backend is: five functions over flat rows, with the same arguments and results.

    mass_blocks(vocabulary, device)                                                  -> int
    forward(hidden, head, targets, temperature, outputs)                             -> Stats
    backward(hidden, head, targets, temperature, stats, grads, needs)                -> Grads
    evaluate(objective, logprobs, entropy)                                           -> loss, TokenGrads
    one_pass(hidden, head, targets, temperature, outputs, objective, needs)          -> Stats, loss, Grads

`fused_rlhf.reference`, `fused_rlhf.chunked` and `fused_rlhf.kernels.ops` (Triton) are backends. The rows they get are
real tokens only: arguments are checked, padding is dropped and tensors are contiguous before they are called.

N tokens, H hidden, V vocabulary. With u = logit_scale (h W^T + b), the logits are

    z = u / temperature                                  without softcap
    z = softcap tanh(u / softcap) / temperature          with it

This file needs torch alone, so that a machine without triton can import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

OUTPUTS = ("entropy", "lse", "sum_sq", "mean_logit", "is_top1")


@dataclass(frozen=True)
class Head:
    """The LM head and how it turns products into logits."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    # Operands of the products are cast to this tile by tile; accumulation and logits are fp32 (fp64 for fp64).
    compute_dtype: torch.dtype = torch.float32
    # Logits may be rounded to compute_dtype before the softmax where that is faster. Off by default: it costs accuracy.
    round_logits: bool = False
    # Share of probability mass per token that the backward may leave out, block by block; 0 is exact.
    grad_filter: float = 0.0


class Stats(NamedTuple):
    """Per-row results, fp32 (fp64 for fp64 inputs), (N,) each; None where not asked for. `lse` is always there."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    sum_sq: Tensor | None = None  # sum_v p_v^2
    mean_logit: Tensor | None = None  # mean_v z_v
    is_top1: Tensor | None = None  # bool: the target is the first of the largest logits
    # (N, mass_blocks), only under head.grad_filter > 0: probability mass of each vocabulary block of the backward.
    mass: Tensor | None = None


class TokenGrads(NamedTuple):
    """dloss / d(statistic) per row, (N,); None means zero everywhere.

    dloss/dz_v = logprobs (1[v = y] - p_v) + lse p_v - entropy p_v (log p_v + H)
    """

    logprobs: Tensor | None
    entropy: Tensor | None = None
    lse: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are wanted; the work and memory of the others must be absent."""

    hidden: bool
    weight: bool
    bias: bool


class Grads(NamedTuple):
    """Gradients in the dtypes of the tensors they belong to; None where not needed."""

    hidden: Tensor | None  # (N, H)
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)


def kept_blocks(mass: Tensor, grad_filter: float, targets: Tensor, columns: int, exact: Tensor | None) -> Tensor:
    """(N, blocks) bool: the vocabulary blocks of `columns` columns that each row needs in the backward.

    A row leaves out its lightest blocks as long as their masses sum to at most grad_filter, but never the block of its
    target, and nothing where `exact` (N,) is set. With a loss gradient g for the log-prob and k for the lse, what is
    dropped of dz then has an L1 norm of at most |k - g| grad_filter per row.
    """
    ordered, order = mass.sort(dim=1)
    keep = torch.empty_like(order, dtype=torch.bool).scatter_(1, order, ~(ordered.cumsum(1) <= grad_filter))
    keep.scatter_(1, (targets // columns)[:, None], True)
    return keep if exact is None else keep | exact[:, None]


class BoundObjective(Protocol):
    """An objective with everything but the log-probs known, so that the backward can follow at once.

    Calling it with a slice of rows and their statistics gives each row's contribution to the (summed) loss and the
    derivatives of it; at sequence level the rows must be all of them. A backend that has a twin of `surrogate` and `kl`
    may read the fields instead of calling.
    """

    surrogate: str
    kl: str  # "" without a KL term
    old_logprobs: Tensor | None  # (N,) fp32; None: on-policy, the ratio is exactly 1 and keeps its gradient
    ref_logprobs: Tensor | None  # (N,) fp32, present when kl is
    advantages: Tensor  # (N,) fp32
    # The loss is sum_n token_weights[n] (surrogate[n] + beta kl[n]) - entropy_weight H[n].
    token_weights: Tensor  # (N,) fp32
    entropy_weight: Tensor | float  # 0.0: no entropy bonus, and no entropy needed
    beta: float
    options: dict[str, float | None]  # the surrogate's own: epsilon_low, epsilon_high, delta ...
    # (S + 1,) int64: where each sequence starts, when a sequence has one ratio, exp(mean of logprob - old); else None.
    offsets: Tensor | None

    def __call__(self, rows: slice, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
        """-> loss (n,) of these rows, and its derivatives by their log-probs and entropies."""
        ...
