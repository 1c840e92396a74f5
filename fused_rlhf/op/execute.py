"""An objective over real rows: decides how it is computed, and computes it, for policies and preferences alike.

two_phase   statistics, the loss of them, and in the backward the logits once more        any objective
one_pass    statistics, loss and gradients block by block: nothing is recomputed          token by token
frozen      statistics and dlogprob/dhidden, which under a frozen head is all that a loss
            of log-probs can need                                                          any, without entropy terms
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fused_rlhf import backends, private
from fused_rlhf.kernels.interface import (
    BoundObjective,
    BoundPolicy,
    Cut,
    Grads,
    Needs,
    Projection,
    Rows,
    Stats,
    TokenGrads,
)
from fused_rlhf.kernels.statistics import OUTPUTS
from fused_rlhf.op import parallel
from fused_rlhf.op.adapter import no_autocast
from fused_rlhf.op.head import Call
from fused_rlhf.op.kept import FULL, kept_statistics
from fused_rlhf.op.logprobs import linear_logprobs
from fused_rlhf.op.once import once_differentiable
from fused_rlhf.op.truncation import WITHIN, Sets

Mode = Literal["auto", "one_pass", "two_phase"]


class Objective(BoundObjective, Protocol):
    """A bound objective, and what it needs of the op."""

    @property
    def has_entropy_term(self) -> bool:
        """Whether the loss has a gradient in the entropy."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """Statistics that the loss reads beside the log-probs."""
        ...

    @property
    def needs_full(self) -> bool:
        """Whether it compares with a reference, which is done over the whole vocabulary however a sampler cut it."""
        ...

    def given(self, stats: Stats) -> Objective:
        """With the statistics it reads, for the loss over all rows."""
        ...

    def contributions(self, logprobs: Tensor, entropy: Tensor | None, full: Tensor | None) -> Tensor:
        """To the loss, of all rows; differentiable in the log-probs of kept sets, their entropies, and in `full`, the
        log-probs of the whole vocabulary."""
        ...


def execute(
    rows: Rows,
    head: Projection,
    objective: Objective,
    outputs: tuple[str, ...],
    mode: Mode,
    backend: str,
    sets: Sets | None = None,
) -> tuple[Tensor, Stats]:
    """Sum of the objective over the rows, differentiable, and the statistics asked for and needed, (N,) each.

    Here and below rows are real tokens that a `Door` has let in. With `sets` their log-probs are those of a truncated
    sampler's distribution; what the objective compares with a reference is of the whole one.
    """
    if sets is not None:
        return _within_sets(rows, head, objective, outputs, backend, sets)
    computed = tuple(name for name in OUTPUTS if name in outputs or name in objective.outputs)
    if head.shard is None:
        one_pass = takes_one_pass(rows, head, mode, backend, objective.tokenwise, objective.has_entropy_term)
    else:
        one_pass = head.shard.block > 0
    if one_pass and objective.tokenwise:
        return _one_pass_loss(rows, head, computed, objective, backend)
    if one_pass:
        stats = _frozen_logprobs(rows, head, computed, backend)
    else:
        stats = linear_logprobs(rows, head, None, computed, backend)
    return loss_of(stats, objective, backend), stats


def takes_one_pass(rows: Rows, head: Projection, mode: Mode, backend: str, tokenwise: bool, entropy_term: bool) -> bool:
    if not rows.count or mode == "two_phase":
        return False
    serves = serves_one_pass(tokenwise, entropy_term, trains(head))
    return mode == "one_pass" or (serves and _pays(rows, head, backend))


def shard_block(
    rows: Rows, head: Projection, sets: Sets | None, mode: Mode, backend: str, tokenwise: bool, entropy_term: bool
) -> int:
    """Of a sharded head: rows of a block, as this rank would take them, in one pass or where sets are to be found; 0: none."""
    finds = isinstance(sets, Cut)
    if not finds and (sets is not None or not takes_one_pass(rows, head, mode, backend, tokenwise, entropy_term)):
        return 0
    if not head.vocabulary:
        return rows.count
    if finds:
        return backends.resolve(backend, rows.hidden).truncation_block(rows, head)
    return backends.resolve(backend, rows.hidden).one_pass_block(rows, head, _needs(rows, head))


def _within_sets(
    rows: Rows, head: Projection, objective: Objective, outputs: tuple[str, ...], backend: str, sets: Sets
) -> tuple[Tensor, Stats]:
    wanted = {*outputs, *objective.outputs, *((FULL,) if objective.needs_full else ())}
    stats = kept_statistics(rows, head, sets, tuple(name for name in WITHIN if name in wanted), backend)
    if not objective.needs_full:
        return loss_of(stats, objective, backend), stats
    entropy = stats.entropy if objective.needs_entropy else None
    bound = objective.given(stats.map(torch.Tensor.detach))
    return bound.contributions(stats.logprobs, entropy, stats[FULL]).sum(), stats


def statistics(rows: Rows, head: Projection, outputs: tuple[str, ...], backend: str) -> Stats:
    """For a loss of log-probs alone: those are differentiable, what `outputs` adds is not."""
    if rows.count > 0 and head.shard is None and not trains(head) and _pays(rows, head, backend):
        return _frozen_logprobs(rows, head, outputs, backend)
    stats = linear_logprobs(rows, head, None, outputs, backend)
    return replace(stats, extra={name: value.detach() for name, value in stats.extra.items()})


def loss_of(stats: Stats, objective: Objective, backend: str) -> Tensor:
    """Sum of the objective over all rows, differentiable in their log-probs and entropies."""
    entropy = stats.entropy if objective.needs_entropy else None
    return _Loss.apply(stats.logprobs, entropy, objective.given(stats.map(torch.Tensor.detach)), backend)


def check_mode(mode: Mode, hidden: Tensor, head: Projection, call: Call, tokenwise: bool, entropy_term: bool) -> None:
    """Refuses a mode that is none, and "one_pass" where it does not serve."""
    for given, what in ((call.cuts, "kept or truncation"), (head.stream is not None, "a head that FSDP2 shards")):
        if mode == "one_pass" and given:
            raise ValueError(f"mode='one_pass' must not be used with {what}; use 'auto' or 'two_phase'")
    if mode not in ("auto", "one_pass", "two_phase"):
        raise ValueError(f"mode must be 'auto', 'one_pass' or 'two_phase', got {mode!r}")
    if mode == "one_pass" and torch.float16 in (hidden.dtype, head.weight.dtype):
        raise ValueError("mode='one_pass' must not be used with fp16, whose gradients underflow; use 'two_phase'")
    if mode == "one_pass" and not serves_one_pass(tokenwise, entropy_term, trains(head)):
        raise ValueError(
            "mode='one_pass' needs an objective whose terms are known token by token, or a frozen head and no entropy "
            "bonus; use 'two_phase'"
        )


def serves_one_pass(tokenwise: bool, entropy_term: bool, trained: bool) -> bool:
    """Whether nothing need be computed again, for an objective and a head that is trained or not."""
    return tokenwise or not (trained or entropy_term)


def trains(head: Projection) -> bool:
    return any(t is not None and t.requires_grad for t in (head.weight, head.bias, head.lora_b))


def _pays(rows: Rows, head: Projection, backend: str) -> bool:
    """Whether gradients are wanted at all, can be held (those of fp16 would underflow before a loss scale) and are
    predicted to come sooner."""
    needs = _needs(rows, head)
    half = torch.float16 in (rows.hidden.dtype, head.weight.dtype)
    stops = half or torch.compiler.is_compiling() or head.stream is not None
    if stops or not (torch.is_grad_enabled() and any(needs)):
        return False
    if not head.vocabulary:  # a shard that leaves it to the others
        return True
    return backends.resolve(backend, rows.hidden).one_pass_pays(rows, head, needs)


def _needs(rows: Rows, head: Projection) -> Needs:
    operands = (rows.hidden, head.weight, head.bias, head.lora_b)
    return Needs(*(t is not None and t.requires_grad for t in operands))


class _Loss(torch.autograd.Function):
    """Sum of an objective over log-probs that are already there; its derivatives come with its value."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logprobs: Tensor, entropy: Tensor | None, objective: BoundObjective, backend: str
    ) -> Tensor:
        loss, grads = backends.resolve(backend, logprobs).loss(objective, logprobs, entropy)
        ctx.grads = grads
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:  # type: ignore[override]
        by_logprob, by_entropy = (None if g is None else g * upstream for g in ctx.grads[:2])
        return by_logprob, by_entropy, None, None


class _OnePassLoss(torch.autograd.Function):
    """Sum of a token-level objective. The forward leaves gradients for an upstream of 1; the backward scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_b: Tensor | None,
        rows: Rows,
        head: Projection,
        outputs: tuple[str, ...],
        objective: BoundObjective,
        backend: str,
    ) -> tuple[Tensor, ...]:
        needs = Needs(*ctx.needs_input_grad[:4])
        ctx.backend = backends.resolve(backend, hidden)
        with no_autocast(hidden):
            stats, loss, grads = parallel.one_pass(ctx.backend, rows, head, outputs, objective, needs)
        ctx.grads, ctx.shard = grads, head.shard
        values = stats.flat(outputs)
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)
        return (loss.sum(), *values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:  # type: ignore[override]
        grads: Grads | None = ctx.grads
        nothing = (None,) * 5
        if grads is None:
            raise RuntimeError("one-pass gradients were already handed out; call backward with retain_graph=True first")
        if upstream is None:
            return (None, None, None, None, *nothing)
        if private.keeps_graph():
            grads = Grads(*(None if g is None else g.clone() for g in grads))
        else:  # the last use: the buffers themselves become the gradients, so that no second dW ever exists
            ctx.grads = None
        d_hidden, *d_head = (None if g is None else ctx.backend.scaled(g, upstream) for g in grads)
        return (parallel.summed(d_hidden, ctx.shard), *d_head, *nothing)


def _one_pass_loss(
    rows: Rows, head: Projection, outputs: tuple[str, ...], objective: BoundObjective, backend: str
) -> tuple[Tensor, Stats]:
    total, *values = _OnePassLoss.apply(
        rows.hidden, head.weight, head.bias, head.lora_b, rows, head, outputs, objective, backend
    )
    return total, Stats.named(tuple(values), outputs)


@dataclass(kw_only=True)
class _Unit(BoundPolicy):
    """The sum of the log-probs as an objective: its gradients are those of each token's own log-prob."""

    tokenwise: bool = True
    needs_entropy: bool = False

    def __call__(self, rows: slice, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
        return logprobs, TokenGrads(torch.ones_like(logprobs))

    @staticmethod
    def over(like: Tensor) -> _Unit:
        """For (N,) rows in the dtype of `like`."""
        return _Unit(
            surrogate="reinforce",
            kl="",
            old_logprobs=None,
            ref_logprobs=None,
            advantages=torch.full_like(like, -1.0),
            token_weights=torch.ones_like(like),
            entropy_weight=0.0,
            beta=0.0,
            options={},
            level="token",
            offsets=torch.arange(2, device=like.device) * like.numel(),
            plain=True,
        )


class _FrozenLogprobs(torch.autograd.Function):
    """Log-probs under a head that takes no gradient. Four products in all: none is left for the backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, rows: Rows, head: Projection, outputs: tuple[str, ...], backend: str
    ) -> tuple[Tensor, ...]:
        unit, needs = _Unit.over(rows.temperature), Needs(True, False, False)
        with no_autocast(hidden):
            stats, _, grads = parallel.one_pass(backends.resolve(backend, hidden), rows, head, outputs, unit, needs)
        ctx.save_for_backward(grads.hidden)
        ctx.shard = head.shard
        values = stats.flat(outputs)
        ctx.mark_non_differentiable(*values[1:])
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:  # type: ignore[override]
        (unit,) = ctx.saved_tensors
        d_hidden = None if upstream is None else (unit * upstream[:, None]).to(unit.dtype)
        return parallel.summed(d_hidden, ctx.shard), None, None, None, None


def _frozen_logprobs(rows: Rows, head: Projection, outputs: tuple[str, ...], backend: str) -> Stats:
    """Only the log-probs are differentiable, and only in hidden."""
    return Stats.named(_FrozenLogprobs.apply(rows.hidden, rows, head, outputs, backend), outputs)
