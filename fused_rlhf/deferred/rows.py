"""Which rows: everything that torch does to the dimensions of logits other than the vocabulary, and their dtype.

A stand-in of the rows' flat positions, with a last dimension of 1, goes through torch's own function: what it selects, and
every error, is what torch makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.deferred.distribution import Distribution
from fused_rlhf.deferred.tensor import (
    TABLE,
    Deferred,
    detached,
    functions,
    handles,
    is_vocabulary,
    like,
    linked,
    refuse,
    rows_first,
    terms_of,
    width,
)
from fused_rlhf.deferred.value import Terms, at_entries, changed, joined

ENTRIES = 64  # tokens per row that indexing the vocabulary may name one by one


# ------------------------------------------------------------------------------------------------------- some of the rows


def _positions(d: Deferred) -> Tensor:
    """(*rows, 1)"""
    count = math.prod(d.row_shape)
    return torch.arange(count, device=d.device).view(*d.row_shape, 1)


def _selected(
    d: Deferred,
    positions: Tensor,
    key: Hashable,
    keeps: tuple[Tensor, ...] = (),
    view: bool = True,
    covered: bool = False,
) -> Deferred:
    """The rows at flat positions (*rows,)."""
    flat = positions.reshape(-1)

    def some(one: Distribution) -> Distribution:
        return one.select(flat, (tuple(d.row_shape), key), keeps, covered)

    terms = changed(terms_of(d), some, lambda c: c[flat])
    return like(d, terms, positions.shape, view=view)


def _hashable(value: Any) -> tuple[Hashable, tuple[Tensor, ...]]:
    """What a selection is known again by, and the tensors whose identity is part of that."""
    if isinstance(value, Tensor):
        return ("tensor", id(value), 0 if value.is_inference() else value._version), (value,)
    if isinstance(value, slice):
        value = ("slice", value.start, value.stop, value.step)
    if isinstance(value, tuple | list):
        parts = [_hashable(part) for part in value]
        return tuple(key for key, _ in parts), tuple(kept for _, some in parts for kept in some)
    return (value if isinstance(value, Hashable) else repr(value)), ()


# name: where the dimension is among the arguments after the tensor, its default, and whether the parts cover the whole
_SELECTIONS: dict[str, tuple[int, int | None, bool]] = {
    "chunk": (1, 0, True),
    "split": (1, 0, True),
    "tensor_split": (1, 0, True),
    "unbind": (0, 0, True),
    "select": (0, None, False),
    "narrow": (0, None, False),
    "index_select": (0, None, False),
    "flip": (0, None, False),
    "roll": (1, None, False),
    "repeat_interleave": (1, None, False),
}
_VIEWS = ("chunk", "split", "tensor_split", "unbind", "select", "narrow")


def _selection(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    place, default, covered = _SELECTIONS[name]

    def select(d: Deferred, *args: Any, **kwargs: Any) -> Any:
        dim = kwargs.get("dim", kwargs.get("dims", args[place] if len(args) > place else default))
        dims = dim if isinstance(dim, tuple | list) else (dim,)
        if not rows_first(d) or any(one is None or is_vocabulary(d, one) for one in dims):
            refuse(f"{name} over the vocabulary", d)
        found = function(_positions(d), *args, **kwargs)
        key, keeps = _hashable((name, args, tuple(sorted(kwargs.items()))))
        if isinstance(found, Tensor):
            return _selected(d, found.squeeze(-1), key, keeps, view=name in _VIEWS)
        parts = enumerate(found)
        return tuple(_selected(d, part.squeeze(-1), (key, i), keeps, covered=covered) for i, part in parts)

    return select


for _name in _SELECTIONS:
    for _function in functions(_name):
        TABLE[_function] = _selection(_function, _name)


@handles("__iter__")
def _iterate(d: Deferred) -> Iterator[Deferred]:
    return iter(torch.unbind(d, 0))  # type: ignore[arg-type]


def _consumed(index: tuple[Any, ...]) -> int:
    """Dimensions that an index speaks of, without an Ellipsis."""
    return sum(
        i.dim() if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) else 1
        for i in index
        if i is not None and i is not Ellipsis and not isinstance(i, bool)
    )


@handles("__getitem__")
def _getitem(d: Deferred, index: Any) -> Any:
    if not rows_first(d):
        refuse("indexing with the vocabulary in the middle", d)
    parts = tuple(index) if isinstance(index, tuple) else (index,)
    parts = tuple(torch.as_tensor(i, device=d.device) if isinstance(i, list | range) else i for i in parts)
    if any(isinstance(i, bool) for i in parts):
        refuse("an index that is True or False", d)
    whole = len(d.row_shape) + 1
    at = next((n for n, i in enumerate(parts) if i is Ellipsis), None)
    if at is not None:
        missing = whole - _consumed(parts)
        parts = (*parts[:at], *[slice(None)] * missing, *parts[at + 1 :])
    key, keeps = _hashable(parts)
    last = parts[-1] if parts and _consumed(parts) == whole else slice(None)
    if last is None:
        refuse("a new dimension after the vocabulary", d)
    if isinstance(last, slice) and last.step in (None, 1):
        start, stop, _ = last.indices(width(d))
        rows = parts[:-1] if _consumed(parts) == whole else parts
        at_rows = _positions(d).squeeze(-1)
        # A copy where torch makes one: with a tensor among the indices.
        view = not any(isinstance(i, Tensor) for i in parts)
        positions = at_rows[rows]
        untouched = positions.shape == d.row_shape and all(isinstance(i, slice) for i in rows)
        some = like(d, view=view) if untouched else _selected(d, positions, key, keeps, view)
        if (start, stop) == (0, width(d)):
            return some
        if start == 0 and stop > 0 and all(t.p is None and t.kind == "z" for t in terms_of(some)):
            terms = changed(terms_of(some), lambda one: one.cut(stop), lambda c: c)
            return like(some, terms, vocabulary=stop, view=True, row_shape=some.row_shape)
    return _entries(d, parts)


def _entries(d: Deferred, index: tuple[Any, ...]) -> Tensor:
    """Single values, an ordinary tensor: logits[rows, ids]."""
    if any(
        isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) and i.dim() > len(d.row_shape) for i in index
    ):
        refuse("a mask over the vocabulary", d)
    full = (*d.row_shape, width(d))
    with_rows = _positions(d).expand(full)
    with_ids = torch.arange(width(d), device=d.device).expand(full)
    rows, ids = with_rows[index], with_ids[index]
    if rows.numel() > ENTRIES * max(math.prod(d.row_shape), 1):
        refuse("indexing of so many tokens of the vocabulary", d)
    value = at_entries(terms_of(d), rows.reshape(-1), ids.reshape(-1))
    return value.view(rows.shape).to(d.dtype)


# ------------------------------------------------------------------------------------------------------ the rows' shape


def _reshaping(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def reshape(d: Deferred, *args: Any, **kwargs: Any) -> Deferred:
        args = tuple(tuple(a.shape) if isinstance(a, Deferred) else a for a in args)
        if args and isinstance(args[0], torch.dtype):
            refuse("view as another dtype", d)
        if not rows_first(d):
            refuse(f"{name} with the vocabulary in the middle", d)
        shape = function(torch.empty((*d.row_shape, width(d)), device="meta"), *args, **kwargs).shape
        if not shape or shape[-1] != width(d):
            refuse(f"{name} that does not leave the vocabulary the last dimension", d)
        return like(d, row_shape=shape[:-1], view=True)

    return reshape


for _name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"):
    for _function in functions(_name):
        TABLE[_function] = _reshaping(_function, _name)


@handles("view_as", "reshape_as")
def _view_as(d: Deferred, other: Tensor) -> Deferred:
    return torch.reshape(d, tuple(other.shape))  # type: ignore[return-value]


@handles("expand")
def _expand(d: Deferred, *sizes: Any) -> Deferred:
    shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if not rows_first(d) or not shape or shape[-1] not in (-1, width(d)):
        refuse("expand of the vocabulary", d)
    positions = _positions(d).expand(*shape[:-1], 1).squeeze(-1)
    if positions.shape == d.row_shape:
        return like(d, view=True)
    return _selected(d, positions, ("expand", tuple(positions.shape)))


@handles("broadcast_tensors")
def _broadcast_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], list | tuple) else tensors
    shape = torch.broadcast_shapes(*(tuple(t.shape) for t in given))
    return tuple(t.expand(shape) for t in given)


def _permuting(function: Callable[..., Any]) -> Callable[..., Any]:
    def permute(d: Deferred, *args: Any, **kwargs: Any) -> Deferred:
        shape = d.shape
        ranks = [2**i for i in range(len(shape))]  # strides, by which dimensions are known again
        stand_in = torch.empty_strided((1,) * len(shape), ranks, device="meta")
        order = [ranks.index(stride) for stride in function(stand_in, *args, **kwargs).stride()]
        at = order.index(d.vocabulary_at)
        rows = [i - (i > d.vocabulary_at) for i in order if i != d.vocabulary_at]
        if rows == sorted(rows):
            return like(d, row_shape=d.row_shape, view=True, vocabulary_at=at)
        positions = _positions(d).squeeze(-1).permute(rows)
        found = _selected(d, positions, ("permute", tuple(rows)))
        return like(found, row_shape=found.row_shape, view=True, vocabulary_at=at)

    return permute


for _name in ("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t"):
    for _function in functions(_name):
        TABLE[_function] = _permuting(_function)


# ------------------------------------------------------------------------------------------------------------ joined rows


@handles("cat", "concat", "concatenate")
def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Deferred:
    parts = [t for t in tensors if isinstance(t, Deferred)]
    first = parts[0]
    same = all(p.dtype == first.dtype and width(p) == width(first) and rows_first(p) for p in parts)
    if len(parts) < len(tensors) or not same or is_vocabulary(first, dim):
        refuse("cat with anything but deferred logits of one vocabulary and dtype, along their rows", first)
    if len(parts) == 1:
        return like(first)
    counts = [math.prod(p.row_shape) for p in parts]
    try:
        terms = joined([terms_of(p) for p in parts], counts)
    except ValueError as error:
        refuse("cat", first, why=str(error))
    if terms is None:
        refuse("cat of different things", first)
    edges = [sum(counts[:i]) for i in range(len(parts))]
    positions = torch.cat([_positions(p) + edge for p, edge in zip(parts, edges)], dim).squeeze(-1)

    def made(terms: Terms) -> Deferred:
        return Deferred(terms, (sum(counts),), width(first), first.dtype, first.device)

    flat = linked(made, terms, *parts)
    if dim % (len(first.row_shape) + 1) == 0:
        return like(flat, row_shape=positions.shape)
    return _selected(flat, positions, ("cat", dim), view=False)


@handles("stack")
def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat([t.unsqueeze(dim) for t in tensors], dim)


# -------------------------------------------------------------------------------------------------------- dtype and memory


@handles("contiguous", "positive", "resolve_conj", "resolve_neg")
def _same(d: Deferred, *, memory_format: torch.memory_format = torch.contiguous_format) -> Deferred:
    terms_of(d)
    return d


@handles("clone")
def _clone(d: Deferred, *, memory_format: torch.memory_format = torch.preserve_format) -> Deferred:
    return like(d)


@handles("detach")
def _detach(d: Deferred) -> Deferred:
    at = d.vocabulary_at
    return Deferred(detached(terms_of(d)), d.row_shape, width(d), d.dtype, d.device, at, d.memory)


TABLE[Tensor.data.__get__] = _detach  # type: ignore[attr-defined]


def _as(d: Deferred, dtype: torch.dtype | None, device: Any = None, copy: bool = False) -> Deferred:
    if device is not None:
        want = torch.device(device) if not isinstance(device, int) else torch.device(d.device.type, device)
        if want.type != d.device.type or want.index not in (None, d.device.index):
            refuse(f"a copy to {want}", d)
    if dtype is not None and not dtype.is_floating_point:
        refuse(f"conversion to {dtype}", d)
    if not copy and dtype in (None, d.dtype):
        terms_of(d)
        return d
    return like(d, dtype=dtype)


@handles("to")
def _to(
    d: Deferred, *args: Any, dtype: torch.dtype | None = None, device: Any = None, non_blocking: bool = False,
    copy: bool = False, memory_format: Any = None,
) -> Deferred:  # fmt: skip
    for one in args:
        if isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, Tensor):
            dtype, device = one.dtype, one.device
        elif isinstance(one, str | torch.device) or (isinstance(one, int) and not isinstance(one, bool)):
            device = one
    return _as(d, dtype, device, copy)


@handles("type_as")
def _type_as(d: Deferred, other: Tensor) -> Deferred:
    return _to(d, other)


@handles("type")
def _type(d: Deferred, dtype: Any = None) -> Any:
    if dtype is None:
        return torch.empty(0, dtype=d.dtype, device=d.device).type()
    if not isinstance(dtype, torch.dtype):
        refuse(f"type({dtype!r})", d)
    return _as(d, dtype)


@handles("cpu")
def _cpu(d: Deferred) -> Deferred:
    return _as(d, None, "cpu")


@handles("cuda")
def _cuda(d: Deferred, device: Any = "cuda", non_blocking: bool = False) -> Deferred:
    return _as(d, None, device)


def _casting(dtype: torch.dtype) -> Callable[[Deferred], Deferred]:
    def cast(d: Deferred) -> Deferred:
        return _as(d, dtype)

    return cast


for _dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    _of = {torch.float32: "float", torch.float64: "double", torch.float16: "half", torch.bfloat16: "bfloat16"}
    TABLE[getattr(Tensor, _of[_dtype])] = _casting(_dtype)
