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

Under a low-rank adapter h W^T is h W^T + scale (h A^T) B^T: hidden carries scale (h A^T), the head B.

This file needs torch alone, so that a machine without triton can import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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
    # (V, r): a low-rank adapter's second factor. The rows of hidden then end in `copies` parts of (h A^T) scale, whose
    # sum is that, each exact in compute_dtype.
    lora_b: Tensor | None = None

    @property
    def copies(self) -> int:
        """Parts in which an adapter's activations come: two where one would round them to half precision."""
        return 0 if self.lora_b is None else 2 if self.compute_dtype.itemsize < 4 else 1

    def rows(self, columns: slice) -> Tensor:
        """(v, H + copies r) rows of [weight, lora_b, ...] in compute_dtype."""
        w = self.weight[columns].to(self.compute_dtype)
        if self.lora_b is None:
            return w
        return torch.cat([w, *[self.lora_b[columns].to(self.compute_dtype)] * self.copies], 1)

    def split(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(n, H + copies r) -> the hidden states (n, H), and the parts of the adapter's activations (n, r)."""
        H = self.weight.shape[1]
        return x[:, :H], x[:, H:].chunk(self.copies, 1) if self.copies else ()


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

    def live(self, like: Tensor) -> Tensor:
        """(N,) bool, on the device of `like` (N,): the rows where any of them is not exactly zero; a NaN is not."""
        live = torch.zeros_like(like, dtype=torch.bool)
        for vector in self:
            if vector is not None:
                live |= vector != 0
        return live


class Needs(NamedTuple):
    """Which gradients are wanted; the work and memory of the others must be absent."""

    hidden: bool
    weight: bool
    bias: bool
    lora: bool = False


class Grads(NamedTuple):
    """Gradients in the dtypes of the tensors they belong to; None where not needed."""

    hidden: Tensor | None  # (N, H), or (N, H + copies r) with an adapter
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)
    lora: Tensor | None = None  # (V, r), of lora_b


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

    Calling it with a slice of rows and their statistics gives contributions to the loss, which is their sum, and the
    derivatives of it. Where it is `tokenwise` the contributions are the rows' own; otherwise the rows must be all.
    """

    @property
    def tokenwise(self) -> bool:
        """Whether a token's loss and gradient depend on that token's statistics alone."""
        ...

    @property
    def needs_entropy(self) -> bool: ...

    def __call__(self, rows: slice, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
        """-> contributions to the loss, and its derivatives by the (n,) log-probs and entropies."""
        ...


@dataclass(kw_only=True)
class BoundPolicy:
    """What a twin needs to know of a policy objective. Where `plain`, the loss is

    sum_n token_weights[n] (surrogate[n] + beta kl[n]) - entropy_weight H[n]
    """

    surrogate: str
    kl: str  # "" without a KL term
    old_logprobs: Tensor | None  # (N,) fp32; None: on-policy, the ratio is exactly 1 and keeps its gradient
    ref_logprobs: Tensor | None  # (N,) fp32, present when kl is
    advantages: Tensor  # (N,) fp32
    token_weights: Tensor  # (N,) fp32
    entropy_weight: Tensor | float  # 0.0: no entropy bonus
    beta: float
    options: dict[str, Any]  # the surrogate's own: epsilon_low, epsilon_high, delta ...
    level: str  # whose ratio: "token", or of the sequence: "sequence" (mean of logprob - old), "sequence_sum" ...
    offsets: Tensor  # (S + 1,) int64: where each sequence starts
    plain: bool  # nothing masks or reweights the surrogate or the KL


@dataclass(kw_only=True)
class BoundPreference:
    """What a twin needs to know of a preference objective over P pairs. Where `plain`, the loss is

    sum_p pair_weight sum_k weights[k] losses[k](pair p)

    of the completions' summed log-probs. The first P sequences are the chosen ones, the others the rejected ones.
    """

    losses: tuple[str, ...]
    weights: tuple[float, ...]
    beta: float
    options: dict[str, Any]
    offsets: Tensor  # (2 P + 1,) int64
    ref_sums: Tensor | None  # (2 P,) fp64, weighted as the policy's sums are; None: no reference
    token_weights: Tensor | None  # (N,) fp32: what a token counts in its sum; None: 1
    pair_weight: Tensor | float
    plain: bool  # pairs, reverse KL, no weighting by the policy
