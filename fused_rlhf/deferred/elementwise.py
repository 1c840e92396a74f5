"""What is done to every logit alike: scaled, shifted, squashed, made a probability or a logarithm of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.deferred.distribution import Distribution
from fused_rlhf.deferred.dtypes import torch_dtype
from fused_rlhf.deferred.tensor import (
    TABLE,
    Deferred,
    functions,
    handles,
    is_vocabulary,
    like,
    refuse,
    rows_first,
    terms_of,
    width,
    write,
)
from fused_rlhf.deferred.value import (
    ONE,
    Coefficient,
    Terms,
    added,
    logits_of,
    logprobs_of,
    probs_of,
    product,
    scaled,
)

Number = (int, float)


# ------------------------------------------------------------------------------------------------------- one per row


def coefficient(d: Deferred, value: Any, what: str) -> tuple[Coefficient, Tensor | None]:
    """A number, or (n,) of a tensor with one for each row; and the caller's tensor itself. Anything else is refused."""
    if isinstance(value, Number):
        return float(value), None
    if not isinstance(value, Tensor) or value.dtype.is_complex:
        refuse(f"{what} {type(value).__name__}", d)
    if value.dim() == 0:
        if value.device.type == "cpu" and not value.requires_grad:
            return float(value), None
        value = value[None]
    if value.dim() > len(d.row_shape) + 1 or not rows_first(d) or (value.shape[-1] != 1 and width(d) != 1):
        refuse(f"{what} a tensor of shape {tuple(value.shape)}, which is not one number per row", d)
    wide = torch.float64 if d.dtype == torch.float64 else torch.float32
    return value.expand(*d.row_shape, 1).reshape(-1).to(wide), value


def _dtype_with(d: Deferred, value: Any) -> torch.dtype:
    """What torch makes of the two."""
    if isinstance(value, Tensor) and value.dim() > 0:
        dtype: torch.dtype = value.dtype
        return torch.promote_types(d.dtype, dtype)
    return d.dtype


def one_of(d: Deferred, kind: str) -> tuple[Distribution, Coefficient] | None:
    """Of c + the logits, or log-probabilities, of one distribution, this and c; None where `d` is no such thing."""
    terms = terms_of(d)
    rest = [term for term in terms if term != ONE]
    if len(rest) != 1 or rest[0].p is not None or rest[0].kind != kind or not _is_one(terms[rest[0]]):
        return None
    assert rest[0].of is not None
    return rest[0].of, terms.get(ONE, 0.0)


def _is_one(c: Coefficient) -> bool:
    return isinstance(c, float) and c == 1


def distribution_of(d: Deferred, what: str) -> tuple[Distribution, Coefficient, Coefficient]:
    """Of scores = c + k lse + z the distribution over the vocabulary, c and k: 0, or -1 where they are log-probabilities."""
    found = one_of(d, "z")
    if found is not None:
        return *found, 0.0
    found = one_of(d, "logp")
    if found is not None:
        return *found, -1.0
    terms = terms_of(d)
    rest = [term for term in terms if term != ONE]
    if len(rest) == 1 and rest[0].p is None and rest[0].kind == "logp" and isinstance(terms[rest[0]], float):
        # c log p = c z - c lse: the scores of another distribution
        of, c = rest[0].of, terms[rest[0]]
        assert of is not None
        return of.scaled(c), terms.get(ONE, 0.0) - c * of.statistics("lse")["lse"], 0.0  # type: ignore[arg-type]
    refuse(f"{what} of what are no logits or log-probabilities", d)


# ------------------------------------------------------------------------------------------------------ sums and products


def _times(d: Deferred, factor: Coefficient, given: Tensor | None, divide: bool) -> Terms:
    found = one_of(d, "z")
    if found is None:
        return scaled(terms_of(d), 1 / factor if divide else factor)
    of, shift = found
    by = 1 / factor if divide else factor
    if isinstance(factor, float):
        new = of.scaled(1 / factor if divide else factor)
    else:
        assert given is not None
        new = of.divided(factor if divide else 1 / factor, given, divide)
    rest = {ONE: shift * by} if isinstance(shift, Tensor) or shift != 0 else {}
    return added(logits_of(new), rest)


@handles("mul", "multiply", "__mul__", "__rmul__")
def _mul(d: Any, other: Any) -> Any:
    if isinstance(d, Deferred) and isinstance(other, Deferred):
        return product_of(d, other)
    if not isinstance(d, Deferred):
        d, other = other, d
    c, given = coefficient(d, other, "multiplication by")
    return like(d, _times(d, c, given, divide=False), dtype=_dtype_with(d, other))


def product_of(d: Deferred, other: Deferred) -> Deferred:
    if d.shape != other.shape:
        refuse("the product of two of different shapes", d)
    terms = product(terms_of(d), terms_of(other))
    if terms is None:
        refuse("the product of two, neither of which is a probability", d)
    return like(d, terms, dtype=torch.promote_types(d.dtype, other.dtype), behind=(other,))


@handles("div", "divide", "true_divide", "__truediv__", "__div__")
def _div(d: Any, other: Any, *, rounding_mode: str | None = None) -> Deferred:
    if not isinstance(d, Deferred) or isinstance(other, Deferred) or rounding_mode is not None:
        refuse("division by deferred logits, or with a rounding_mode", d, other)
    c, given = coefficient(d, other, "division by")
    if isinstance(c, float) and c == 0:
        raise ZeroDivisionError("deferred logits must not be divided by 0")
    return like(d, _times(d, c, given, divide=True), dtype=_dtype_with(d, other))


@handles("neg", "negative", "__neg__")
def _neg(d: Deferred) -> Deferred:
    return like(d, _times(d, -1.0, None, divide=False))


@handles("add", "__add__", "__radd__")
def _add(d: Any, other: Any, *, alpha: float = 1) -> Deferred:
    if not isinstance(d, Deferred):
        d, other = other, d
    return _plus(d, other, float(alpha))


@handles("sub", "subtract", "__sub__")
def _sub(d: Any, other: Any, *, alpha: float = 1) -> Deferred:
    if not isinstance(d, Deferred):
        return _plus(_neg(other), d, 1.0)
    return _plus(d, other, -float(alpha))


@handles("rsub", "__rsub__")
def _rsub(d: Deferred, other: Any) -> Deferred:
    return _plus(_neg(d), other, 1.0)


def _plus(d: Deferred, other: Any, sign: float) -> Deferred:
    if isinstance(other, Deferred):
        if d.shape != other.shape:
            refuse("the sum of two of different shapes", d)
        terms = added(terms_of(d), scaled(terms_of(other), sign))
        return like(d, terms, dtype=torch.promote_types(d.dtype, other.dtype), behind=(other,))
    if _is_bias(d, other):
        return like(d, _biased(d, other.reshape(-1) * sign), dtype=_dtype_with(d, other))
    c, _ = coefficient(d, other, "the sum with")
    return like(d, added(terms_of(d), {ONE: sign * c}), dtype=_dtype_with(d, other))


def _is_bias(d: Deferred, value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and rows_first(d)
        and value.dim() > 0
        and value.shape[-1] == width(d) == value.numel()
        and value.dim() <= len(d.row_shape) + 1
    )


def _biased(d: Deferred, bias: Tensor) -> Terms:
    found = one_of(d, "z")
    if found is None or found[0].cap is not None or found[0].temperature is not None or found[0].scale == 0:
        refuse("a bias after a softcap, a temperature per row or a softmax", d)
    of, shift = found
    return added(logits_of(of.biased(bias)), {ONE: shift})


@handles("tanh")
def _tanh(d: Deferred) -> Deferred:
    found = one_of(d, "z")
    if found is None or found[1] != 0 or found[0].cap is not None or found[0].temperature is not None:
        refuse("a tanh of anything but a head's products, scaled by one number", d)
    return like(d, logits_of(found[0].squashed()))


# ---------------------------------------------------------------------------------------------------------------- in place


def _in_place(change: Callable[..., Any]) -> Callable[..., Any]:
    def apply(d: Any, *args: Any, **kwargs: Any) -> Deferred:
        if not isinstance(d, Deferred):
            refuse("a change in place by deferred logits", *args)
        return write(d, change(d, *args, **kwargs))

    return apply


_IN_PLACE = {
    "mul": _mul, "multiply": _mul, "div": _div, "divide": _div, "true_divide": _div, "add": _add, "sub": _sub,
    "subtract": _sub, "tanh": _tanh, "neg": _neg,
}  # fmt: skip
for _name, _change in _IN_PLACE.items():
    for _function in functions(f"{_name}_"):
        TABLE[_function] = _in_place(_change)
for _name, _change in {"imul": _mul, "itruediv": _div, "idiv": _div, "iadd": _add, "isub": _sub}.items():
    for _function in functions(f"__{_name}__"):
        TABLE[_function] = _in_place(_change)


# --------------------------------------------------------------------------------------------------- softmax and logarithms


def check_dim(d: Deferred, dim: int | None, what: str) -> None:
    if dim is None or not is_vocabulary(d, dim):
        refuse(f"{what} over any dimension but the vocabulary", d)


@handles("log_softmax")
def log_softmax(
    d: Deferred, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Deferred:
    check_dim(d, dim, "log_softmax")
    of, _, _ = distribution_of(d, "log_softmax")
    kind = torch_dtype("log_softmax", d, lambda z: torch.log_softmax(z, -1, dtype=dtype), dtype)
    return like(d, logprobs_of(of), dtype=kind)


@handles("softmax")
def softmax(d: Deferred, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Deferred:
    check_dim(d, dim, "softmax")
    of, _, _ = distribution_of(d, "softmax")
    kind = torch_dtype("softmax", d, lambda z: torch.softmax(z, -1, dtype=dtype), dtype)
    return like(d, probs_of(of), dtype=kind)


@handles("exp", "exp_")
def exponential(d: Deferred) -> Deferred:
    """exp(c + z) = p exp(c + lse)"""
    of, c, k = distribution_of(d, "exp")
    if k == 0:
        c = c + of.statistics("lse")["lse"]
    factor = c.exp() if isinstance(c, Tensor) else float(torch.tensor(c, dtype=torch.float64).exp())
    return like(d, scaled(probs_of(of), factor), dtype=torch_dtype("exp", d, torch.exp))


@handles("log")
def logarithm(d: Deferred) -> Deferred:
    terms = terms_of(d)
    (term, c), *more = terms.items()
    if more or term.p is None or term.kind != "one":
        refuse("log of anything but probabilities", d)
    shift = c.log() if isinstance(c, Tensor) else float(torch.tensor(c, dtype=torch.float64).log())
    rest = {ONE: shift} if isinstance(shift, Tensor) or shift != 0 else {}
    return like(d, added(logprobs_of(term.p), rest), dtype=torch_dtype("log", d, torch.log))


@handles("entr")
def _entr(d: Deferred) -> Deferred:
    return _neg(product_of(d, logarithm(d)))


@handles("square")
def _square(d: Deferred) -> Deferred:
    return product_of(d, d)


@handles("pow", "__pow__")
def _pow(d: Any, exponent: Any) -> Deferred:
    if not isinstance(d, Deferred) or exponent not in (1, 2):
        refuse(f"a power other than the square, {exponent!r},", d, exponent)
    return product_of(d, d) if exponent == 2 else like(d)


@handles("clamp", "clip", "clamp_min")
def _clamp(d: Deferred, min: Any = None, max: Any = None) -> Deferred:
    """Within what the dtype can hold: it changes nothing."""
    limits = torch.finfo(d.dtype)
    low = min is None or (isinstance(min, Number) and min <= limits.min)
    high = max is None or (isinstance(max, Number) and max >= limits.max)
    if not (low and high):
        refuse("clamp", d)
    return like(d)


@handles("eq", "__eq__")
def _eq(d: Any, other: Any) -> Tensor:
    """Of a tensor with itself, as validation asks whether it is a number: by its rows, one NaN in which makes them all NaN."""
    if not isinstance(d, Deferred) or d is not other:
        refuse("comparison", d, other)
    with torch.no_grad():
        of, _, _ = distribution_of(d, "comparison")
        lse = of.statistics("lse")["lse"]
    return (lse == lse).view(*d.row_shape, 1).expand(d.shape)
