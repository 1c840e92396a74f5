"""From the backends' three functions to differentiable ops.

`linear_logprobs` is a pair of custom ops, so that torch.compile keeps it as one node although the number of real rows
depends on the data; `one_pass_loss` is an autograd.Function whose forward already holds the gradients, and
`frozen_logprobs` one whose forward holds dlogprob/dhidden, which under a frozen head is all that any loss can need.

Rows that must cost nothing are dropped here, before any backend sees them: ignored targets on the way forward, rows
whose upstream gradient is exactly zero on the way back.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fused_rlhf import backends
from fused_rlhf.kernels.interface import OUTPUTS, BoundObjective, BoundPolicy, Grads, Head, Needs, Stats, TokenGrads

Maybe = TypeVar("Maybe", bound=Tensor | None)
_EXTRA = tuple(name for name in OUTPUTS if name != "lse")


def linear_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: Tensor,
    ignore_index: int,
    outputs: tuple[str, ...],
    backend: str,
) -> Stats:
    """Statistics of (N, H) rows, (N,) each, zero where the target is `ignore_index`."""
    logprobs, lse, *extra, _mass = torch.ops.fused_rlhf.logprobs(
        hidden,
        head.weight,
        head.bias,
        head.lora_b,
        targets,
        temperature,
        ignore_index,
        head.logit_scale,
        head.softcap,
        head.compute_dtype,
        head.round_logits,
        head.grad_filter,
        ",".join(outputs),
        backend,
    )
    named = dict(zip(_EXTRA, extra))
    return Stats(logprobs, lse, **{name: named[name] for name in outputs if name != "lse"})


def live_rows(targets: Tensor, ignore_index: int, vocabulary: int) -> Tensor | None:
    """Indices of the rows to compute; None for all of them. Refuses a target outside the vocabulary."""
    live = targets != ignore_index
    rows = live.nonzero().squeeze(-1)  # on a GPU this waits for the device: the one sync of the op
    wrong = live & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets must lie in [0, {vocabulary}) or equal ignore_index={ignore_index}, "
            f"got {int(targets[row])} at flat position {row}"
        )
    return None if rows.numel() == targets.numel() else rows


def select(tensor: Maybe, rows: Tensor | None) -> Maybe:
    """These rows, or with None all of them, contiguous as the backends need them."""
    if tensor is None:
        return tensor
    return cast(Maybe, tensor.contiguous() if rows is None else tensor.index_select(0, rows))


def scatter(values: Maybe, rows: Tensor | None, count: int) -> Maybe:
    """The inverse of `select`, zero in the rows that were left out."""
    if values is None or rows is None:
        return values
    return cast(Maybe, values.new_zeros((count, *values.shape[1:])).index_copy_(0, rows, values))


def _no_autocast(tensor: Tensor) -> AbstractContextManager:
    # The compute dtype was read from autocast at the door; from here on a cast would be a second one.
    return torch.autocast(tensor.device.type, enabled=False)


def check_temperature(temperature: Tensor) -> None:
    if not bool((temperature > 0).all() & temperature.isfinite().all()):
        wrong = temperature[~((temperature > 0) & temperature.isfinite())]
        raise ValueError(f"temperature must be positive and finite for every scored token, got {wrong[0]:g}")


@torch.library.custom_op("fused_rlhf::logprobs", mutates_args=())
def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_b: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    round_logits: bool,
    grad_filter: float,
    outputs: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = targets.numel()
    rows = live_rows(targets, ignore_index, weight.shape[0])
    x, y, t = select(hidden, rows), select(targets, rows), select(temperature, rows)
    empty = _empty(hidden, weight, targets, temperature, outputs, grad_filter, backend)
    if y.numel() == 0:
        return empty  # type: ignore[return-value]
    check_temperature(t)
    head = Head(weight, bias, logit_scale, softcap, compute_dtype, round_logits, grad_filter, lora_b)
    names = tuple(outputs.split(",")) if outputs else ()
    with _no_autocast(hidden):
        stats = backends.resolve(backend, hidden).forward(x, head, y, t, names)
    results = [stats.logprobs, stats.lse, *(getattr(stats, name) if name in names else None for name in _EXTRA)]
    results.append(stats.mass)
    full = [scatter(value, rows, count) for value in results]
    return tuple(e if value is None else value for value, e in zip(full, empty))  # type: ignore[return-value]


def _empty(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, outputs: str, grad_filter: float, backend: str
) -> tuple[Tensor, ...]:
    """Zeros of the op's result shapes; what was not asked for has no elements."""
    full: tuple[int, ...] = (targets.numel(),)
    shapes = [full, full, *(full if name in outputs.split(",") else (0,) for name in _EXTRA), (0,)]
    if grad_filter > 0:
        shapes[-1] = (targets.numel(), backends.resolve(backend, hidden).mass_blocks(weight.shape[0], hidden.device))
    dtypes = [torch.bool if name == "is_top1" else temperature.dtype for name in ("logprobs", "lse", *_EXTRA, "mass")]
    return tuple(torch.zeros(s, dtype=d, device=hidden.device) for s, d in zip(shapes, dtypes))


@_logprobs.register_fake
def _(hidden, weight, bias, lora_b, targets, temperature, ignore_index, *options):  # type: ignore[no-untyped-def]
    *_, grad_filter, outputs, backend = options
    return _empty(hidden, weight, targets, temperature, outputs, grad_filter, backend)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, lora_b, targets, temperature, ignore_index, *options = inputs
    logprobs, lse, entropy, sum_sq, mean_logit, is_top1, mass = output
    ctx.save_for_backward(hidden, weight, bias, lora_b, targets, temperature, logprobs, lse, entropy, mass)
    ctx.mark_non_differentiable(sum_sq, mean_logit, is_top1, mass)
    ctx.set_materialize_grads(False)
    ctx.ignore_index, ctx.options = ignore_index, options


def _backward(ctx: Any, d_logprobs: Tensor | None, d_lse: Tensor | None, d_entropy: Tensor | None, *_: Any) -> tuple:
    hidden, weight, bias, lora_b, targets, temperature, logprobs, lse, entropy, mass = ctx.saved_tensors
    logit_scale, softcap, compute_dtype, round_logits, grad_filter, _outputs, backend = ctx.options
    grads = torch.ops.fused_rlhf.logprobs_backward(
        d_logprobs,
        d_lse,
        d_entropy if entropy.numel() else None,
        hidden,
        weight,
        bias,
        lora_b,
        targets,
        temperature,
        logprobs,
        lse,
        entropy,
        mass,
        ctx.ignore_index,
        logit_scale,
        softcap,
        compute_dtype,
        round_logits,
        grad_filter,
        backend,
        *(bool(need) for need in ctx.needs_input_grad[:4]),
    )
    kept = [g if need else None for g, need in zip(grads, ctx.needs_input_grad)]
    return (*kept, *[None] * (2 + 1 + len(ctx.options)))


_logprobs.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("fused_rlhf::logprobs_backward", mutates_args=())
def _logprobs_backward(
    d_logprobs: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_b: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    logprobs: Tensor,
    lse: Tensor,
    entropy: Tensor,
    mass: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    round_logits: bool,
    grad_filter: float,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_lora: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    upstream = TokenGrads(d_logprobs, d_entropy, d_lse)
    rows = (upstream.live(targets) & (targets != ignore_index)).nonzero().squeeze(-1)
    needs = Needs(need_hidden, need_weight, need_bias, need_lora)
    tensors = (hidden, weight, bias, lora_b)
    count = rows.numel()
    if count == 0:
        return _materialise(Grads(None, None, None), tensors, needs)
    some = None if count == targets.numel() else rows
    head = Head(weight, bias, logit_scale, softcap, compute_dtype, round_logits, grad_filter, lora_b)
    stats = Stats(
        select(logprobs, some),
        select(lse, some),
        select(entropy, some) if entropy.numel() else None,
        mass=select(mass, some) if mass.numel() else None,
    )
    token_grads = TokenGrads(*(select(g, some) for g in upstream))
    with _no_autocast(hidden):
        grads = backends.resolve(backend, hidden).backward(
            select(hidden, some), head, select(targets, some), select(temperature, some), stats, token_grads, needs
        )
    grads = grads._replace(hidden=scatter(grads.hidden, some, targets.numel()))
    return _materialise(grads, tensors, needs)


def _materialise(
    grads: Grads, tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None], needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Custom ops return tensors: zeros where a needed gradient was not computed, no elements where it is not needed."""
    none = tensors[0].new_empty(0)
    return tuple(  # type: ignore[return-value]
        grad if grad is not None else (like.new_zeros(like.shape) if need and like is not None else none.clone())
        for grad, like, need in zip(grads, tensors, needs)
    )


@_logprobs_backward.register_fake
def _(d_logprobs, d_lse, d_entropy, hidden, weight, bias, lora_b, *rest):  # type: ignore[no-untyped-def]
    return _materialise(Grads(None, None, None), (hidden, weight, bias, lora_b), Needs(*rest[-4:]))


class _LowRank(torch.autograd.Function):
    """(N, H) -> (N, H + copies r): the hidden states and scale (h A^T), in parts that half precision can hold."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, a: Tensor, scale: float, head: Head) -> Tensor:  # type: ignore[override]
        wide = torch.promote_types(head.compute_dtype, torch.float32)
        factor = a.to(head.compute_dtype).to(wide).T
        parts = []
        for some in hidden.split(_LOW_RANK_ROWS):
            t = scale * (some.to(head.compute_dtype).to(wide) @ factor)
            high = t.to(head.compute_dtype)
            parts.append(torch.cat([high, *[t - high] * (head.copies - 1)], 1))
        x = torch.promote_types(hidden.dtype, head.compute_dtype)
        ctx.save_for_backward(hidden, a)
        ctx.scale, ctx.wide = scale, wide
        return torch.cat([hidden.to(x), torch.cat(parts).to(x)], 1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:  # type: ignore[override]
        hidden, a = ctx.saved_tensors
        H, r = hidden.shape[1], len(a)
        d_a = torch.zeros_like(a, dtype=ctx.wide)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, len(hidden), _LOW_RANK_ROWS):
            rows = slice(i, i + _LOW_RANK_ROWS)
            # One part stands for their sum: each has the gradient of the sum.
            d_t = ctx.scale * upstream[rows, H : H + r].to(ctx.wide)
            d_a += d_t.T @ hidden[rows].to(ctx.wide)
            if d_hidden is not None:
                d_hidden[rows] = upstream[rows, :H] + d_t @ a.to(ctx.wide)
        return d_hidden, d_a.to(a.dtype), None, None


_LOW_RANK_ROWS = 8192


def with_adapter(hidden: Tensor, a: Tensor, scale: float, head: Head) -> Tensor:
    """(N, H) hidden states as a head with `lora_b` takes them; a (r, H)."""
    with _no_autocast(hidden):
        return _LowRank.apply(hidden, a, scale, head)


class _Loss(torch.autograd.Function):
    """Sum of an objective over log-probs that are already there; its derivatives come with its value."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logprobs: Tensor, entropy: Tensor | None, objective: BoundObjective, backend: str
    ) -> Tensor:
        loss, grads = backends.resolve(backend, logprobs).evaluate(objective, logprobs, entropy)
        ctx.grads = grads
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:  # type: ignore[override]
        by_logprob, by_entropy = (None if g is None else g * upstream for g in ctx.grads[:2])
        return by_logprob, by_entropy, None, None


def loss_of(logprobs: Tensor, entropy: Tensor | None, objective: BoundObjective, backend: str) -> Tensor:
    """Sum of the objective over (N,) log-probs, differentiable in them and in the entropy."""
    return _Loss.apply(logprobs, entropy, objective, backend)


class _OnePassLoss(torch.autograd.Function):
    """Sum of a token-level objective. The forward leaves gradients for an upstream of 1; the backward scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_b: Tensor | None,
        head: Head,
        targets: Tensor,
        temperature: Tensor,
        outputs: tuple[str, ...],
        objective: BoundObjective,
        backend: str,
    ) -> tuple[Tensor, ...]:
        needs = Needs(*ctx.needs_input_grad[:4])
        with _no_autocast(hidden):
            stats, loss, grads = backends.resolve(backend, hidden).one_pass(
                hidden, head, targets, temperature, outputs, objective, needs
            )
        ctx.grads = grads
        statistics = [s for s in stats if s is not None]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return (loss.sum(), *statistics)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:  # type: ignore[override]
        grads, nothing = ctx.grads, (None,) * 6
        if grads is None:
            raise RuntimeError("one-pass gradients were already handed out; call backward with retain_graph=True first")
        if upstream is None:
            return (None, None, None, None, *nothing)
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return (*(None if g is None else g * upstream for g in grads), *nothing)
        # The last use: the buffers themselves become the gradients, so that no second dW ever exists.
        ctx.grads = None
        return (*(None if g is None else g.mul_(upstream) for g in grads), *nothing)


def one_pass_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: Tensor,
    outputs: tuple[str, ...],
    objective: BoundObjective,
    backend: str,
) -> tuple[Tensor, Stats]:
    """Sum of the objective over (N, H) real rows, and their statistics (not differentiable, (N,) each)."""
    check_temperature(temperature)
    total, *values = _OnePassLoss.apply(
        hidden, head.weight, head.bias, head.lora_b, head, targets, temperature, outputs, objective, backend
    )
    # lse is always returned; the other statistics only when asked for.
    names = [name for name in Stats._fields if name in ("logprobs", "lse") or name in outputs]
    return total, Stats(**dict(zip(names, values)))


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
            offsets=torch.tensor([0, like.numel()], device=like.device),
            plain=True,
        )


class _FrozenLogprobs(torch.autograd.Function):
    """Log-probs under a head that takes no gradient. Four products in all: none is left for the backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        temperature: Tensor,
        outputs: tuple[str, ...],
        backend: str,
    ) -> tuple[Tensor, ...]:
        with _no_autocast(hidden):
            stats, _, grads = backends.resolve(backend, hidden).one_pass(
                hidden, head, targets, temperature, outputs, _Unit.over(temperature), Needs(True, False, False)
            )
        ctx.save_for_backward(grads.hidden)
        values = [s for s in stats if s is not None]
        ctx.mark_non_differentiable(*values[1:])
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:  # type: ignore[override]
        (unit,) = ctx.saved_tensors
        d_hidden = None if upstream is None else (unit * upstream[:, None]).to(unit.dtype)
        return d_hidden, None, None, None, None, None


def frozen_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor, outputs: tuple[str, ...], backend: str
) -> Stats:
    """Statistics of (N, H) real rows; only the log-probs are differentiable, and only in hidden."""
    check_temperature(temperature)
    values = _FrozenLogprobs.apply(hidden, head, targets, temperature, outputs, backend)
    names = [name for name in Stats._fields if name in ("logprobs", "lse") or name in outputs]
    return Stats(**dict(zip(names, values)))
