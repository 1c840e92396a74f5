"""The LM head a caller gives, and the checks that turn it into what backends multiply by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rlhf import backends
from fused_rlhf.checks import check_tensor, shape
from fused_rlhf.door import Door
from fused_rlhf.kernels.interface import KINDS, Comparison, Kind, Projection, Stream
from fused_rlhf.kernels.statistics import OUTPUTS
from fused_rlhf.kernels.transforms import CURVES, Transform
from fused_rlhf.op.streams import gathered
from fused_rlhf.op.truncation import RULES, Kept, Truncation, check_sampling

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class LoRA(NamedTuple):
    """A low-rank adapter on a head: h W^T becomes h W^T + scale (h A^T) B^T."""

    a: Tensor  # (r, H)
    b: Tensor  # (V, r)
    scale: float


@dataclass(frozen=True, eq=False)
class Head:
    """An LM head and what is done to its logits: what every public function takes in the place of a weight.

    z = curve(logit_scale (h W^T + b)) / temperature, the curve by default none; with `softcap` it is
    softcap tanh(u / softcap). Formulas, shapes and errors are those of `linear_logprobs`.

    Args:
        weight: (V, H).
        bias: (V,) or None.
        logit_scale, softcap: as in `linear_logprobs`.
        lora: (A, B, scale), a low-rank adapter on the head, or None.
        vocab_start, vocab_size: with a process_group, where weight holds this rank's rows of a vocabulary-parallel head: the
            first of them, and how many there are in all, beyond which rows are padding. None: after those of the ranks
            before, and as many as all ranks hold.
        process_group: of a vocabulary-parallel head, for functions that are not given theirs: see `linear_logprobs`.
        curve: the name of a registered curve (`fused_rlhf.kernels.transforms.CURVES`) and its parameter; not together
            with `softcap`, which is short for ("softcap", softcap).
        stream: of a head that FSDP2 shards, as `lm_head.forward` gives it: weight holds this rank's rows, bias and lora are
            whole, and the functions that take the head fetch the others' rows block by block.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    lora: LoRA | tuple[Tensor, Tensor, float] | None = None
    curve: tuple[str, float] | None = None
    vocab_start: int | None = None
    vocab_size: int | None = None
    process_group: Any = None
    stream: Stream | None = None

    @property
    def vocabulary(self) -> int:
        """Columns: of a vocabulary-parallel head, those here."""
        return len(self.weight) if self.stream is None else self.stream.length

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, as it is multiplied by."""
        return self.weight.dtype if self.stream is None else self.stream.dtype

    def whole(self) -> Head:
        """With all rows of a streamed weight, gathered with its graph; every rank must call. Any other head is as it is."""
        if self.stream is None:
            return self
        return replace(self, weight=gathered(self.weight, self.stream), stream=None)

    def kwargs(self) -> dict[str, Any]:
        """All but the weight, for a function that takes the parts."""
        if self.stream is not None:
            raise ValueError("stream must be None to be told in keywords; pass the Head itself, or its whole()")
        if self.curve is not None:
            raise ValueError(f"curve must be None to be told in keywords, got {self.curve}; pass the Head itself")
        if self.process_group is not None:
            raise ValueError("process_group must be None to be told in keywords, got one; pass the Head itself")
        transform = {"logit_scale": self.logit_scale, "softcap": self.softcap}
        return {"bias": self.bias, "lora": self.lora, **transform}

    @property
    def transform(self) -> Transform:
        """Raises ValueError, TypeError for a transform that is none."""
        check_number("logit_scale", self.logit_scale, positive=False)
        if self.softcap is not None:
            if self.curve is not None:
                raise ValueError(f"curve must be None where there is a softcap, got {self.curve!r}")
            check_number("softcap", self.softcap, positive=True)
            return Transform(float(self.logit_scale), "softcap", float(self.softcap))
        if self.curve is None:
            return Transform(float(self.logit_scale))
        name, parameter = self.curve
        if name not in CURVES:
            raise ValueError(f"curve must be one of {sorted(CURVES)}, got {name!r}")
        check_number(f"the parameter of the curve {name!r}", parameter, positive=False)
        return Transform(float(self.logit_scale), name, float(parameter))


def head_of(
    weight: Tensor | Head,
    bias: Tensor | None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: LoRA | tuple[Tensor, Tensor, float] | None = None,
    *,
    prefix: str = "",
) -> Head:
    """The head that a public function's arguments mean: a `Head` as it is, or a weight with all that goes with it.

    Raises ValueError where a Head comes with a second bias, scale, softcap or adapter; `prefix` goes before their names.
    """
    if not isinstance(weight, Head):
        return Head(weight, bias, logit_scale, softcap, lora)
    scale = None if isinstance(logit_scale, int | float) and logit_scale == 1 else logit_scale
    for name, value in (("bias", bias), ("logit_scale", scale), ("softcap", softcap), ("lora", lora)):
        if value is not None:
            left, got = 1.0 if name == "logit_scale" else None, shape(value) if isinstance(value, Tensor) else value
            raise ValueError(
                f"{prefix}{name} must be left at {left} where {prefix}weight is a Head, which has its own; "
                f"got {'an adapter' if name == 'lora' else got}"
            )
    return weight


def group_of(process_group: Any, **heads: Tensor | Head | None) -> Any:
    """The group that is given, or that the heads bring; None: they are whole.

    Raises ValueError where they do not agree.
    """
    for name, head in heads.items():
        own = head.process_group if isinstance(head, Head) else None
        if own is not None and process_group is not None and own is not process_group:
            raise ValueError(f"process_group must be that of the Head given as {name}, got another")
        process_group = own if process_group is None else process_group
    return process_group


class Call(NamedTuple):
    """How a public function was asked to compute, beside head and rows."""

    temperature: float | Tensor = 1.0
    ignore_index: int = -100
    backend: str = "auto"
    round_logits: bool = False
    grad_filter: float = 0.0
    kept: Kept | None = None
    truncation: Truncation | None = None
    sharded: bool = False  # the head is one rank's part of it

    @property
    def shared(self) -> tuple[Any, ...]:
        """What the ranks of a group must agree on, beside what `samples` are told by tensors."""
        temperature = None if isinstance(self.temperature, Tensor) else self.temperature
        rules = None
        if self.truncation is not None:
            values = [getattr(self.truncation, rule) for rule in RULES]
            rules = self.truncation.order, [None if isinstance(value, Tensor) else value for value in values]
        return temperature, self.backend, self.kept is None, rules

    @property
    def samples(self) -> bool:
        """Whether the distribution is told to be a sampler's."""
        return self.kept is not None or self.truncation is not None

    @property
    def cuts(self) -> bool:
        """Whether that may keep less than all."""
        return self.kept is not None or (self.truncation is not None and not self.truncation.keeps_all)


def check_number(name: str, value: object, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} must be finite{' and positive' if positive else ''}, got {value}")


def check_outputs(outputs: Sequence[str], allowed: tuple[str, ...] = OUTPUTS) -> tuple[str, ...]:
    """The names in the order of the records."""
    if isinstance(outputs, str):
        raise TypeError(f"outputs must be a sequence of names such as ('entropy',), got the string {outputs!r}")
    for name in outputs:
        if name not in allowed:
            raise ValueError(f"outputs must be among {list(allowed)}, got {name!r}")
    return tuple(name for name in allowed if name in outputs)


def check_head(hidden: Tensor, head: Head, targets: Tensor, call: Call) -> tuple[Projection, Tensor]:
    """Everything that can be refused without reading a tensor's values; -> projection and (N,) temperatures."""
    if call.sharded and head.stream is not None:
        raise ValueError("process_group must be None with a head that FSDP2 shards, which is streamed by its own group")
    _check_operands(hidden, head, targets, call.sharded or head.stream is not None)
    check_vocab(head, call.sharded)
    if head.lora is not None:
        _check_lora(head.lora, hidden, head)
    transform = head.transform
    check_number("grad_filter", call.grad_filter, positive=False)
    if not 0 <= call.grad_filter < 1:
        raise ValueError(f"grad_filter must lie in [0, 1), got {call.grad_filter}")
    check_sampling(call.kept, call.truncation, targets, call.grad_filter)
    if isinstance(call.ignore_index, bool) or not isinstance(call.ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(call.ignore_index).__name__}")
    backends.choose(call.backend, hidden)  # refuses what cannot run before any work

    compute_dtype, adapter_dtype = _dtypes(hidden, head)
    wide = torch.promote_types(compute_dtype, torch.float32)
    projection = Projection(
        head.weight.contiguous(),
        None if head.bias is None else head.bias.contiguous(),
        transform,
        compute_dtype,
        call.round_logits,
        float(call.grad_filter),
        None if head.lora is None else head.lora[1].contiguous(),
        adapter_dtype,
        stream=head.stream,
    )
    return projection, _temperatures(call.temperature, targets, wide)


def _dtypes(hidden: Tensor, head: Head) -> tuple[torch.dtype, torch.dtype]:
    """Of the operands of h W^T, and of those of an adapter: what torch makes of theirs, under autocast or not."""
    operands = [hidden.dtype, head.dtype]
    adapter = [] if head.lora is None else [factor.dtype for factor in head.lora[:2]]
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (*operands, *adapter):
        dtype = torch.get_autocast_dtype(device_type)
        return dtype, dtype
    if torch.float64 in adapter:
        operands.append(torch.float64)
    compute_dtype = torch.promote_types(*operands[-2:]) if len(operands) == 2 else torch.float64
    return compute_dtype, torch.promote_types(*adapter) if adapter else compute_dtype


def check_vocab(head: Head, sharded: bool) -> None:
    """What the head says of its place in a vocabulary-parallel one."""
    for name, least in (("vocab_start", 0), ("vocab_size", 1)):
        value = getattr(head, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if not sharded:
            raise ValueError(f"{name} must be None without a process_group, got {value}")


def _check_operands(hidden: Tensor, head: Head, targets: Tensor, sharded: bool = False) -> None:
    weight, bias = head.weight, head.bias
    for name, value in (("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias)):
        if value is None and name == "bias":
            continue
        check_tensor(name, value, hidden.device if name != "hidden" else None)
        if name != "targets" and value.dtype not in DTYPES:  # type: ignore[union-attr]
            raise TypeError(f"{name} must be one of {[str(d) for d in DTYPES]}, got {value.dtype}")  # type: ignore[union-attr]
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must be (N, H) or (B, T, H), got {shape(hidden)}")
    if hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have a last dimension H of at least 1, got {shape(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or (weight.shape[0] == 0 and not sharded):
        raise ValueError(f"weight must be (V, H) with H={hidden.shape[-1]} as in hidden, got {shape(weight)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have shape {shape(hidden)[:-1]}, as hidden, got {shape(targets)}")
    if bias is not None and bias.shape != (head.vocabulary,):
        raise ValueError(f"bias must be (V,) with V={head.vocabulary}, got {shape(bias)}")


def _check_lora(lora: tuple[Tensor, Tensor, float], hidden: Tensor, head: Head) -> None:
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise TypeError(f"lora must be (A, B, scale), got {type(lora).__name__}")
    a, b, scale = lora
    for name, value in (("lora A", a), ("lora B", b)):
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a tensor of one of {[str(d) for d in DTYPES]}, got {got}")
        check_tensor(name, value, hidden.device)
    H, V = head.weight.shape[1], head.vocabulary
    if a.dim() != 2 or a.shape[1] != H or b.shape != (V, len(a)):
        raise ValueError(f"lora must be A (r, H) and B (V, r) with H={H} and V={V}, got {shape(a)} and {shape(b)}")
    check_number("lora scale", scale, positive=False)


def _temperatures(temperature: float | Tensor, targets: Tensor, wide: torch.dtype) -> Tensor:
    """(N,) of one number or of a tensor in the shape of the targets."""
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature)
        if temperature.shape != targets.shape:
            raise ValueError(f"temperature must have the shape of targets {shape(targets)}, got {shape(temperature)}")
        if temperature.device != targets.device:
            raise ValueError(f"temperature must be on the device of hidden, {targets.device}, got {temperature.device}")
        if temperature.requires_grad:
            raise ValueError("temperature must not require a gradient: it takes none")
        return temperature.reshape(-1).to(wide)
    check_number("temperature", temperature, positive=True)
    limits = torch.finfo(wide)
    if not limits.tiny <= temperature <= limits.max:
        raise ValueError(
            f"temperature must lie in [{limits.tiny:g}, {limits.max:g}], as {wide} does, got {temperature}"
        )
    return torch.full((targets.numel(),), float(temperature), dtype=wide, device=targets.device)


@dataclass(frozen=True)
class Reference:
    """A reference whose log-probs are to be computed in the same call."""

    hidden: Tensor
    head: Head
    projection: Projection


def check_reference(
    hidden: Tensor,
    head: Head,
    projection: Projection,
    ref_logprobs: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | Head | None,
    ref_bias: Tensor | None,
) -> Reference | None:
    """The reference that is to be computed in the same call; None where there is none."""
    if ref_hidden is None:
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                got = "a Head" if isinstance(value, Head) else shape(value)
                raise ValueError(f"{name} must be None without ref_hidden, got {got}")
        return None
    if ref_logprobs is not None:
        raise ValueError("ref_logprobs must be None where ref_hidden is given: the reference would be there twice")
    if ref_weight is None and ref_bias is not None:
        raise ValueError(f"ref_bias must be None without ref_weight, got {shape(ref_bias)}")
    if isinstance(ref_weight, Head):
        ref = head_of(ref_weight, ref_bias, prefix="ref_")
    elif ref_weight is None:
        ref = replace(head, lora=None)
    else:
        ref = replace(head, weight=ref_weight, bias=ref_bias, lora=None, stream=None)
    _check_ref_operands(hidden, head, ref_hidden, ref)
    if ref.lora is not None:
        _check_lora(ref.lora, ref_hidden, ref)
    of_ref = replace(
        projection,
        weight=ref.weight.contiguous(),
        bias=None if ref.bias is None else ref.bias.contiguous(),
        transform=ref.transform,
        lora_b=None if ref.lora is None else ref.lora[1].contiguous(),
        lora_dtype=_dtypes(ref_hidden, ref)[1],
        stream=ref.stream,
    )
    return Reference(ref_hidden, ref, of_ref)


def _check_ref_operands(hidden: Tensor, head: Head, ref_hidden: Tensor, ref: Head) -> None:
    for name, value in (("ref_hidden", ref_hidden), ("ref_weight", ref.weight), ("ref_bias", ref.bias)):
        if value is not None:
            check_tensor(name, value, hidden.device)
    expected = (*hidden.shape[:-1], ref.weight.shape[-1])
    if ref_hidden.shape != expected:
        raise ValueError(f"ref_hidden must be {expected}, got {shape(ref_hidden)}")
    V = head.vocabulary
    if ref.weight.dim() != 2 or ref.vocabulary != V:
        raise ValueError(f"ref_weight must be (V, H) with V={V} as weight has, got {shape(ref.weight)}")
    if ref.bias is not None and ref.bias.shape != (V,):
        raise ValueError(f"ref_bias must be (V,) = ({V},), got {shape(ref.bias)}")


def check_divergence(
    door: Door,
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor,
    ref: Head,
    kind: Kind,
    beta: float,
    mask: Tensor | None,
    call: Call,
) -> tuple[Comparison, Tensor]:
    """As `check_head`, for two heads; -> what to compare and (N,) temperatures."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    check_number("beta", beta, positive=False)
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must lie in (0, 1), got {beta}; its ends are kind='forward' and kind='reverse'")
    if kind != "jsd" and beta != 0.5:
        raise ValueError(f"beta must be left at 0.5 for kind={kind!r}, which has none; got {beta}")
    for name, value in (("hidden", hidden), ("ref_hidden", ref_hidden), ("ref_weight", ref.weight)):
        check_tensor(name, value, hidden.device if name != "hidden" else None)
    if mask is not None:
        check_tensor("mask", mask, hidden.device)
    for name, of_rows in (("mask", mask), ("temperature", call.temperature)):
        if isinstance(of_rows, Tensor) and of_rows.shape != hidden.shape[:-1]:
            raise ValueError(f"{name} must have the shape of the rows {shape(hidden)[:-1]}, got {shape(of_rows)}")
    door.zero_or_one("mask", mask)
    anything = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    projection, flat = check_head(hidden, head, anything, call)
    for name, given in (("ref_hidden", ref_hidden), ("ref_weight", ref.weight), ("ref_bias", ref.bias)):
        if given is not None and given.dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {[str(d) for d in DTYPES]}, got {given.dtype}")
        if given is not None and given.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {given.device}")
    _check_ref_operands(hidden, head, ref_hidden, ref)
    check_number("ref_logit_scale", ref.logit_scale, positive=False)
    if ref.softcap is not None:
        check_number("ref_softcap", ref.softcap, positive=True)
    of_ref, _ = check_head(ref_hidden, ref, anything, call._replace(temperature=1.0))
    if torch.float64 in (projection.compute_dtype, of_ref.compute_dtype):
        projection, of_ref = (replace(p, compute_dtype=torch.float64) for p in (projection, of_ref))
    return Comparison(projection, of_ref, kind, float(beta)), flat.to(projection.wide)
