"""A tensor without memory of its own, for code that takes logits.

It has shape, dtype and device, and a sum of terms (`value.py`) for what its numbers would be. torch hands every function that
is called with one to `Deferred.__torch_function__`, which looks it up in one table: `rows.py`, `elementwise.py` and
`results.py` fill it. What is not in there would need all the logits, and is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_rlhf.deferred.distribution import Distribution, Source
from fused_rlhf.deferred.graphs import outside_of_graphs
from fused_rlhf.deferred.value import Terms, changed

TABLE: dict[Callable[..., Any], Callable[..., Any]] = {}

INSTEAD = (
    "ask for log_softmax, softmax and gather, logsumexp, entropies, cross_entropy, kl_div, max, argmax or topk, or take "
    "fused_rlhf.materialise(logits)"
)


class Memory:
    """What a tensor and its views would share: how often it was written to."""

    def __init__(self) -> None:
        self.writes = 0


class Deferred(torch.Tensor):
    """(..., V): rows in `row_shape`, in their order those of the distributions that `terms` name."""

    terms: Terms
    row_shape: torch.Size
    vocabulary_at: int  # which dimension the vocabulary is
    memory: Memory
    writes: int  # to the memory, that this one knows of
    hooked: bool  # by somebody who wants to see a backward pass here
    anchored: bool  # so that it does
    apart: (
        bool  # made where gradients are off: by a user, or inside of an autograd function, which may add its graph yet
    )

    @staticmethod
    def __new__(
        cls,
        terms: Terms,
        row_shape: Sequence[int],
        vocabulary: int,
        dtype: torch.dtype,
        device: torch.device,
        vocabulary_at: int = -1,
        memory: Memory | None = None,
    ) -> Deferred:
        at = vocabulary_at % (len(row_shape) + 1)
        shape = (*row_shape[:at], vocabulary, *row_shape[at:])
        made: Deferred = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        made.terms, made.row_shape, made.vocabulary_at = terms, torch.Size(row_shape), at
        made.memory = Memory() if memory is None else memory
        made.writes, made.hooked, made.anchored, made.apart = made.memory.writes, False, False, False
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = tuple(self.shape)
        return f"Deferred({shape}, {self.dtype}, never computed as a whole)"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # What autograd does to a tensor that passes through a function unchanged.
        if func in (torch.ops.aten.view.default, torch.ops.aten.alias.default, torch.ops.aten.detach.default):
            one = args[0]
            if func is not torch.ops.aten.view.default or tuple(args[1]) == tuple(one.shape):
                return like(one)
        refuse(str(func), *args, *(kwargs or {}).values())


@outside_of_graphs
def _called(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if "input" in kwargs and not args:
        args = (kwargs.pop("input"),)
    handler = TABLE.get(func)
    if handler is None or not _fits(handler, args, kwargs):
        refuse(name_of(func), *args, *kwargs.values())
    return handler(*args, **kwargs)


def plain(function: Callable[..., Any], *args: Any) -> Any:
    """Of what torch knows of the tensor without its numbers."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args)


@functools.cache
def _signature(handler: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(handler)


def _fits(handler: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    try:
        _signature(handler).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def name_of(func: Any) -> str:
    """As a user writes it."""
    if isinstance(func, str):
        return func
    own = getattr(func, "__self__", None)
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__") and own is not None:
        return f".{getattr(own, '__name__', own)}{' =' if name == '__set__' else ''}"
    return str(torch.overrides.resolve_name(func) or name)


def refuse(what: str, *args: Any, why: str = "") -> NoReturn:
    """Raises NotImplementedError: the operation, what it would need, and what to do."""
    one = next((a for a in args if isinstance(a, Deferred)), None)
    if one is None:
        flat = [b for a in args if isinstance(a, list | tuple) for b in a]
        one = next((a for a in flat if isinstance(a, Deferred)), None)
    needs = "all of them"
    if one is not None:
        shape, dtype = tuple(one.shape), one.dtype
        size = one.numel() * dtype.itemsize / 1e9
        needs = f"the whole {shape} tensor of {dtype}, {size:.3g} GB"
    raise NotImplementedError(
        f"{what} is not for deferred logits{': ' + why if why else ''}: it would need {needs}, which is never in memory; "
        f"{INSTEAD}"
    )


# ------------------------------------------------------------------------------------------------------- for the handlers


def functions(*names: str) -> list[Callable[..., Any]]:
    """Every function of torch of these names."""
    places = (torch, Tensor, F, torch.special, torch._C._nn)
    found = [vars(place).get(name, getattr(place, name, None)) for name in names for place in places]
    return [function for function in found if callable(function)]


def handles(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def enter(handler: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions(*names):
            TABLE[function] = handler
        return handler

    return enter


def terms_of(d: Deferred) -> Terms:
    """Its terms, once it is known that they still hold. A backward from them passes through `d` where somebody waits there."""
    if d.writes != d.memory.writes:
        refuse("a tensor whose memory was changed in place through another one", d, why="use the one that was changed")
    node = d.grad_fn
    if d.apart and node is None:
        d.terms, d.apart = detached(d.terms), False
    foreign = node is not None and node.name() != "_LinkBackward"  # a function of others has returned it
    if d.hooked or (foreign and not d.anchored):
        d.terms, d.hooked, d.anchored = _anchored(d), False, True
    return d.terms


def _anchored(d: Deferred) -> Terms:
    """On sources of their own, which a backward reaches through `d`."""
    with torch.enable_grad():
        anchor = _Anchor.apply(d)
    made: dict[int, Source] = {}

    def on(one: Distribution) -> Distribution:
        if id(one.source) not in made:
            made[id(one.source)] = replace(one.source, anchor=anchor, found={})
        return one.on(made[id(one.source)])

    return changed(d.terms, on, lambda c: c)


class _Anchor(torch.autograd.Function):
    """A zero, of which a backward gives zeros to a deferred tensor, without memory for them."""

    @staticmethod
    def forward(ctx: Any, d: Deferred) -> Tensor:  # type: ignore[override]
        ctx.of = _kind(d)
        return torch.zeros((), device=d.device)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # type: ignore[override]
        return _zeros(ctx.of)


class _Link(torch.autograd.Function):
    """A deferred tensor in the graph behind others (a head's empty product, or deferred tensors), for who looks for
    parameters there. Gradients take another way: zeros alone come by here, for who has hooked a tensor on it."""

    @staticmethod
    def forward(ctx: Any, made: Callable[[], Deferred], *others: Tensor) -> Deferred:  # type: ignore[override]
        ctx.of = [_kind(other) if isinstance(other, Deferred) else None for other in others]
        return made()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:  # type: ignore[override]
        return (None, *(None if kind is None else _zeros(kind) for kind in ctx.of))


def _kind(d: Deferred) -> tuple[Any, ...]:
    return tuple(d.shape), d.dtype, d.device


def _zeros(kind: tuple[Any, ...]) -> Tensor:
    shape, dtype, device = kind
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def linked(made: Callable[[Terms], Deferred], terms: Terms, *others: Tensor) -> Deferred:
    """A tensor made of the terms, with the others behind it; apart from them where gradients are off."""
    if not torch.is_grad_enabled():
        found = made(terms)
        found.apart = True
        return found
    return _Link.apply(lambda: made(terms), *others)  # type: ignore[no-any-return]


def detached(terms: Terms) -> Terms:
    return changed(terms, Distribution.detach, Tensor.detach)


def like(
    d: Deferred,
    terms: Terms | None = None,
    row_shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    view: bool = False,
    vocabulary: int | None = None,
    vocabulary_at: int = -1,
    behind: Sequence[Deferred] = (),
) -> Deferred:
    """Another tensor from `d` (and those `behind` it); `view`: with its memory."""
    own = terms_of(d)
    shape, at = (d.row_shape, d.vocabulary_at) if row_shape is None else (torch.Size(row_shape), vocabulary_at)
    memory, V = d.memory if view else None, width(d) if vocabulary is None else vocabulary
    kind = d.dtype if dtype is None else dtype

    def made(terms: Terms) -> Deferred:
        return Deferred(terms, shape, V, kind, d.device, at, memory)

    return linked(made, own if terms is None else terms, d, *behind)


def write(d: Deferred, to: Deferred) -> Deferred:
    """In place: `d` is from now on what `to` is, but for its dtype."""
    if d.requires_grad and not torch.is_grad_enabled():
        refuse("a change in place without gradients of a tensor that has them", d)
    d.terms = terms_of(to)
    d.memory.writes += 1
    d.writes = d.memory.writes
    return d


def width(d: Deferred) -> int:
    """V"""
    size: int = d.shape[d.vocabulary_at]
    return size


def is_vocabulary(d: Deferred, dim: int) -> bool:
    return isinstance(dim, int) and dim % (len(d.row_shape) + 1) == d.vocabulary_at


def rows_first(d: Deferred) -> bool:
    """Whether the vocabulary is the last dimension, as everything but a loss over classes wants it."""
    return d.vocabulary_at == len(d.row_shape)


# ------------------------------------------------------------------------------------------- what is known without numbers

_PROPERTIES = """shape dtype device layout ndim requires_grad grad grad_fn is_leaf output_nr names itemsize nbytes
_version _base is_cpu is_cuda is_hpu is_ipu is_maia is_meta is_mkldnn is_mps is_mtia is_nested is_quantized is_sparse
is_vulkan is_xla is_xpu"""
_METHODS = """size dim ndimension numel nelement stride element_size get_device has_names is_contiguous is_floating_point
is_complex is_signed is_inference is_conj is_neg is_same_size __hash__"""


def _known() -> None:
    for name in _PROPERTIES.split():
        getter = getattr(getattr(Tensor, name, None), "__get__", None)
        if getter is not None:
            TABLE[getter] = functools.partial(plain, getter)
    for name in _METHODS.split():
        for function in functions(name):
            TABLE[function] = functools.partial(plain, function)


_known()
TABLE[Tensor.__repr__] = Deferred.__repr__


@handles("register_hook")
def _register_hook(d: Deferred, hook: Callable[..., Any]) -> Any:
    handle = plain(Tensor.register_hook, d, hook)
    d.hooked = True
    return handle


@handles("__len__")
def _length(d: Deferred) -> int:
    return int(d.shape[0])


@handles("__format__", "__str__")
def _format(d: Deferred, spec: str = "") -> str:
    return repr(d)


def _new_by(name: str) -> Callable[..., Tensor]:
    def new(d: Deferred, *args: Any, **kwargs: Any) -> Tensor:
        """An ordinary tensor of its dtype and device."""
        like_it: Tensor = torch.empty(0, dtype=d.dtype, device=d.device)
        made: Tensor = getattr(like_it, name)(*args, **kwargs)
        return made

    return new


for _name in ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"):
    TABLE[getattr(Tensor, _name)] = _new_by(_name)
