"""What computes: values at tokens, sums over the vocabulary, losses, the largest entries; and all, for who asks by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_rlhf.deferred.distribution import Distribution
from fused_rlhf.deferred.dtypes import torch_dtype
from fused_rlhf.deferred.elementwise import check_dim, distribution_of, exponential, logarithm, one_of, product_of
from fused_rlhf.deferred.tensor import Deferred, handles, like, refuse, rows_first, terms_of, width
from fused_rlhf.deferred.value import ONE, Coefficient, at_entries, at_tokens, summed


def _laid_out(d: Deferred, values: Coefficient, keepdim: bool, dtype: torch.dtype) -> Tensor:
    """(n,) in the shape of the rows."""
    if not isinstance(values, Tensor):
        values = torch.full((math.prod(d.row_shape),), values, device=d.device)
    found = values.reshape(d.row_shape)
    return (found.unsqueeze(d.vocabulary_at) if keepdim else found).to(dtype)


# -------------------------------------------------------------------------------------------------------------- at tokens


@handles("gather")
def _gather(d: Deferred, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    check_dim(d, dim, "gather")
    if not rows_first(d) or isinstance(index, Deferred):
        refuse("gather with the vocabulary in the middle", d)
    if index.dim() != len(d.row_shape) + 1 or index.dtype != torch.int64:
        raise ValueError(
            f"index must be int64 of {len(d.row_shape) + 1} dimensions, as the logits, got {tuple(index.shape)} {index.dtype}"
        )
    if index.shape[:-1] != d.row_shape:  # as torch, the first rows
        d = d[tuple(slice(0, n) for n in index.shape[:-1])]  # type: ignore[assignment]
        if index.shape[:-1] != d.row_shape:
            raise ValueError(f"index must have no more rows than the logits, got {tuple(index.shape)}")
    K = index.shape[-1]
    flat = index.reshape(-1)
    if K == 1:
        values = at_tokens(terms_of(d), flat)
    else:
        n = math.prod(d.row_shape)
        rows = torch.arange(n, device=index.device)[:, None].expand(n, K).reshape(-1)
        values = at_entries(terms_of(d), rows, flat)
    return values.view(index.shape).to(d.dtype)


@handles("take_along_dim")
def _take_along_dim(d: Deferred, indices: Tensor, dim: int | None = None) -> Tensor:
    check_dim(d, dim, "take_along_dim")
    return _gather(d, -1, indices.expand(*d.row_shape, indices.shape[-1]))


# --------------------------------------------------------------------------------------------- sums over the vocabulary


@handles("logsumexp")
def _logsumexp(d: Deferred, dim: Any, keepdim: bool = False) -> Tensor:
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    check_dim(d, dims[0] if len(dims) == 1 else None, "logsumexp")
    of, c, k = distribution_of(d, "logsumexp")
    total = c if k != 0 else c + of.statistics("lse")["lse"]
    return _laid_out(d, total, keepdim, torch_dtype("logsumexp", d, lambda z: z.logsumexp(-1)))


def _over(d: Deferred, dim: Any, what: str) -> bool:
    """Whether over all there is, rather than the vocabulary alone."""
    if dim is None:
        return True
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    if len(dims) == len(d.row_shape) + 1 or not dims:
        return True
    check_dim(d, dims[0] if len(dims) == 1 else None, what)
    return False


@handles("sum")
def _sum(d: Deferred, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    whole = _over(d, dim, "sum")
    kind = torch_dtype("sum", d, lambda z: z.sum(-1, dtype=dtype), dtype)
    found = _laid_out(d, summed(terms_of(d), width(d)), keepdim and not whole, torch.promote_types(kind, torch.float32))
    return (found.sum() if whole else found).to(kind)


@handles("mean")
def _mean(d: Deferred, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    whole = _over(d, dim, "mean")
    kind = torch_dtype("mean", d, lambda z: z.mean(-1, dtype=dtype), dtype)
    sums = summed(terms_of(d), width(d))
    found = _laid_out(d, sums / width(d), keepdim and not whole, torch.promote_types(kind, torch.float32))
    return (found.mean() if whole else found).to(kind)


# ----------------------------------------------------------------------------------------------------------------- losses


def _reduced(losses: Tensor, live: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / live.sum()
    raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")


def _checked_labels(d: Deferred, labels: Tensor, what: str) -> None:
    classes = 1 if len(d.row_shape) else 0
    if d.vocabulary_at != classes:
        refuse(f"{what} over any dimension but the vocabulary", d)
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        refuse(f"{what} of class probabilities that are an ordinary tensor", d)
    if labels.shape != d.row_shape:
        raise ValueError(f"target must be {tuple(d.row_shape)}, as the rows of the logits, got {tuple(labels.shape)}")


@handles("cross_entropy", "cross_entropy_loss")
def _cross_entropy(
    d: Deferred, target: Tensor, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    if not isinstance(d, Deferred):
        refuse("cross_entropy against deferred logits", d, target)
    if weight is not None or size_average is not None or reduce is not None:
        refuse("cross_entropy with class weights, size_average or reduce", d)
    kind = torch_dtype(
        "cross_entropy", d, lambda z: F.cross_entropy(z, torch.zeros(1, dtype=torch.int64, device=z.device))
    )
    if isinstance(target, Deferred):
        return _soft_cross_entropy(d, target, reduction, label_smoothing).to(kind)
    _checked_labels(d, target, "cross_entropy")
    of, _, _ = distribution_of(d, "cross_entropy")
    labels = target.reshape(-1).to(torch.int64)
    found = of.of_labels(labels, ignore_index, ("lse", "mean_logit") if label_smoothing else ())
    losses = -found["logprobs"]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (found["lse"] - found["mean_logit"])
    return _reduced(losses.view(d.row_shape), target != ignore_index, reduction).to(kind)


def _soft_cross_entropy(d: Deferred, target: Deferred, reduction: str, label_smoothing: float) -> Tensor:
    """-sum_v p_v log q_v"""
    if label_smoothing or not (rows_first(d) and len(d.row_shape) == 1):
        refuse("cross_entropy of two deferred tensors with label smoothing, or that are not (N, V)", d)
    both = product_of(target, torch.log_softmax(d, -1))  # type: ignore[arg-type]
    losses = -_laid_out(d, summed(terms_of(both), width(d)), False, torch.promote_types(d.dtype, torch.float32))
    return _reduced(losses, torch.ones_like(losses), reduction)


@handles("nll_loss", "nll_loss_nd")
def _nll_loss(
    d: Deferred, target: Tensor, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    if not isinstance(d, Deferred):
        refuse("nll_loss with deferred targets", d, target)
    if weight is not None or size_average is not None or reduce is not None:
        refuse("nll_loss with class weights, size_average or reduce", d)
    _checked_labels(d, target, "nll_loss")
    found = one_of(d, "logp")
    live = target != ignore_index
    kind = torch_dtype("nll_loss", d, lambda z: F.nll_loss(z, torch.zeros(1, dtype=torch.int64, device=z.device)))
    if found is None or found[1] != 0:
        values = at_tokens(terms_of(d), torch.where(live, target, 0).reshape(-1))
        losses = torch.where(live, -values.view(d.row_shape), 0.0)
    else:
        losses = -found[0].of_labels(target.reshape(-1), ignore_index, ())["logprobs"].view(d.row_shape)
    return _reduced(losses, live, reduction).to(kind)


@handles("kl_div")
def _kl_div(
    d: Any, target: Any, size_average: Any = None, reduce: Any = None, reduction: str = "mean", log_target: bool = False
) -> Tensor:
    """sum_v p_v (log p_v - d_v), p the target."""
    if (
        not isinstance(d, Deferred)
        or not isinstance(target, Deferred)
        or size_average is not None
        or reduce is not None
    ):
        refuse("kl_div with an ordinary tensor, size_average or reduce", d, target)
    p, log_p = (exponential(target), target) if log_target else (target, logarithm(target))
    pointwise = product_of(p, log_p - d)  # type: ignore[arg-type]
    kind = torch_dtype("kl_div", d, lambda z: F.kl_div(z, z, reduction="sum"))
    if reduction == "none":
        return like(pointwise, dtype=kind)
    total = _laid_out(d, summed(terms_of(pointwise), width(d)), False, torch.promote_types(kind, torch.float32)).sum()
    by = {"sum": 1, "batchmean": d.shape[0], "mean": d.numel()}
    if reduction not in by:
        raise ValueError(f"reduction must be 'none', 'sum', 'batchmean' or 'mean', got {reduction!r}")
    return (total / by[reduction]).to(kind)


# ------------------------------------------------------------------------------------------------------------ the largest


class _Largest(NamedTuple):
    values: Tensor
    indices: Tensor


def _order_of(d: Deferred, what: str) -> Distribution:
    """By which the entries of each row are ordered."""
    terms = terms_of(d)
    rest = [term for term in terms if term != ONE]
    if len(rest) == 1 and isinstance(terms[rest[0]], float) and terms[rest[0]] > 0:
        term = rest[0]
        one = term.p if term.kind == "one" else term.of if term.p is None else None
        if one is not None:
            return one
    refuse(f"{what} of what is not in the order of logits", d)


def _top(d: Deferred, k: int, what: str) -> _Largest:
    """(..., k) each, the largest first; the values differentiable."""
    if not rows_first(d):
        refuse(f"{what} with the vocabulary in the middle", d)
    n = math.prod(d.row_shape)
    ids = _order_of(d, what).largest(k)
    rows = torch.arange(n, device=ids.device)[:, None].expand(n, k).reshape(-1)
    values = at_entries(terms_of(d), rows, ids.reshape(-1))
    shape = (*d.row_shape, k)
    return _Largest(values.view(shape).to(d.dtype), ids.view(shape))


@handles("argmax")
def _argmax(d: Deferred, dim: int | None = None, keepdim: bool = False) -> Tensor:
    check_dim(d, dim, "argmax")
    if not rows_first(d):
        refuse("argmax with the vocabulary in the middle", d)
    found = _order_of(d, "argmax").largest(1).view(*d.row_shape, 1)
    return found if keepdim else found.squeeze(-1)


@handles("max")
def _max(d: Deferred, dim: int | None = None, keepdim: bool = False) -> Any:
    if not isinstance(dim, int):
        refuse("max over anything but the vocabulary", d)
    check_dim(d, dim, "max")
    top = _top(d, 1, "max")
    values, ids = (t if keepdim else t.squeeze(-1) for t in top)
    return torch.return_types.max((values, ids))


@handles("amax")
def _amax(d: Deferred, dim: Any = (), keepdim: bool = False) -> Tensor:
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    check_dim(d, dims[0] if len(dims) == 1 else None, "amax")
    values = _top(d, 1, "amax").values
    return values if keepdim else values.squeeze(-1)


MOST = 256  # of topk


@handles("topk")
def _topk(d: Deferred, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    check_dim(d, dim, "topk")
    if not largest or not 0 < k <= min(MOST, width(d)):
        refuse(f"topk of the smallest, or of more than {MOST}", d)
    top = _top(d, k, "topk")
    return torch.return_types.topk((top.values, top.indices))


# -------------------------------------------------------------------------------------------------------- all, by name


def materialise(logits: Tensor) -> Tensor:
    """Deferred logits as an ordinary tensor of their shape and dtype, differentiable; all of it is in memory then.

    For what must have them: a sampler, a plot, a function of another library. A slice of rows costs the slice alone:
    `fr.materialise(logits[:, -1])`. An ordinary tensor is returned as it is.

    Args:
        logits: (..., V), what a deferred model returned, or anything made of it.

    Raises:
        TypeError: no tensor.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if not isinstance(logits, Deferred):
        return logits
    n, at = math.prod(logits.row_shape), logits.vocabulary_at
    total: Any = 0.0
    for term, c in terms_of(logits).items():
        value: Any = c[:, None] if isinstance(c, Tensor) else c
        if term.of is not None:
            value = value * _dense(term.of, term.kind)
        if term.p is not None:
            value = value * _dense(term.p, "p")
        total = total + value
    if not isinstance(total, Tensor) or total.shape != (n, width(logits)):
        total = torch.as_tensor(total, device=logits.device).expand(n, width(logits))
    return total.view(*logits.row_shape, width(logits)).movedim(-1, at).to(logits.dtype)


def _dense(of: Distribution, kind: str) -> Tensor:
    """(n, V)"""
    z = of.dense()
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "z": lambda z: z,
        "logp": lambda z: z.log_softmax(-1),
        "p": lambda z: z.softmax(-1),
    }
    return functions[kind](z)
