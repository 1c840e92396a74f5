"""What the public functions refuse, and how padded and packed batches become flat rows of real tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from fused_rlhf import backends
from fused_rlhf.kernels.interface import OUTPUTS, Head, Stats
from fused_rlhf.op import autograd
from fused_rlhf.op.autograd import Maybe
from fused_rlhf.op.divergence import KINDS, Comparison, Kind
from fused_rlhf.preferences import PreferenceLoss
from fused_rlhf.segments import Sequences

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
Mode = Literal["auto", "one_pass", "two_phase"]


class LoRA(NamedTuple):
    """A low-rank adapter on a head: h W^T becomes h W^T + scale (h A^T) B^T."""

    a: Tensor  # (r, H)
    b: Tensor  # (V, r)
    scale: float


@dataclass(frozen=True)
class Rows:
    """The real tokens of a padded or packed batch: N rows, and the sequences they belong to."""

    rows: Tensor | None  # (N,) their flat positions; None: all
    targets: Tensor
    temperature: Tensor
    sequences: Sequences
    ignore_index: int

    @staticmethod
    def of(
        targets: Tensor,
        completion_mask: Tensor | None,
        ignore_index: int,
        head: Head,
        temperature: Tensor,
        index: Tensor,
        count: int,
    ) -> Rows:
        flat = targets.reshape(-1)
        if completion_mask is not None:
            flat = flat.masked_fill(~completion_mask.reshape(-1).bool(), ignore_index)
        rows = autograd.live_rows(flat, ignore_index, head.weight.shape[0])
        pick = partial(autograd.select, rows=rows)
        return Rows(rows, pick(flat), pick(temperature), Sequences.of(pick(index), count), ignore_index)

    @property
    def count(self) -> int:
        return self.targets.numel()

    def hidden(self, hidden: Tensor, head: Head, lora: tuple[Tensor, Tensor, float] | None) -> Tensor:
        """(N, H), with its graph; with an adapter's activations where the head has one."""
        x = autograd.select(hidden.reshape(-1, hidden.shape[-1]), self.rows)
        return x if lora is None else autograd.with_adapter(x, lora[0], lora[2], head)

    def vector(self, values: Maybe) -> Maybe:
        """(N,) of a tensor in the shape of the targets, without its graph; None of None."""
        if values is None:
            return values
        flat = values.detach().reshape(-1).to(self.temperature.dtype)
        return cast(Maybe, autograd.select(flat, self.rows))

    def statistics(self, x: Tensor, head: Head, names: tuple[str, ...], backend: str, mode: Mode) -> Stats:
        if mode == "one_pass" and self.count > 0:
            return autograd.frozen_logprobs(x, head, self.targets, self.temperature, names, backend)
        return autograd.linear_logprobs(x, head, self.targets, self.temperature, self.ignore_index, names, backend)

    def reference(self, reference: Reference, backend: str) -> Tensor:
        """(N,) the reference's log-probs, computed here."""
        with torch.no_grad():
            x = self.hidden(reference.hidden, reference.head, None)
            return self.statistics(x, reference.head, (), backend, "two_phase").logprobs


class Reference(NamedTuple):
    """A reference that is to be computed in the same call."""

    hidden: Tensor
    head: Head


def reference_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    ref_logprobs: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> Reference | None:
    """The reference that is to be computed in the same call; None where there is none."""
    if ref_hidden is None:
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                raise ValueError(f"{name} must be None without ref_hidden, got {shape(value)}")
        return None
    if ref_logprobs is not None:
        raise ValueError("ref_logprobs must be None where ref_hidden is given: the reference would be there twice")
    own = ref_weight is None
    if own and ref_bias is not None:
        raise ValueError(f"ref_bias must be None without ref_weight, got {shape(ref_bias)}")
    ref_weight = weight if ref_weight is None else ref_weight
    ref_bias = bias if own else ref_bias
    expected = {"ref_hidden": (*hidden.shape[:-1], ref_weight.shape[-1]), "ref_weight": (len(weight), None)}
    if ref_hidden.shape != expected["ref_hidden"]:
        raise ValueError(f"ref_hidden must be {expected['ref_hidden']}, got {shape(ref_hidden)}")
    if ref_weight.dim() != 2 or len(ref_weight) != len(weight):
        raise ValueError(f"ref_weight must be (V, H) with V={len(weight)} as weight has, got {shape(ref_weight)}")
    if ref_bias is not None and ref_bias.shape != (len(weight),):
        raise ValueError(f"ref_bias must be (V,) = ({len(weight)},), got {shape(ref_bias)}")
    ref_bias = None if ref_bias is None else ref_bias.contiguous()
    return Reference(ref_hidden, replace(head, weight=ref_weight.contiguous(), bias=ref_bias, lora_b=None))


def check_preference(
    objective: PreferenceLoss,
    count: int,
    ref_logprobs: Tensor | None,
    ref_hidden: Tensor | None,
    labels: Tensor | None,
    kl: Tensor | None,
) -> None:
    given = ref_logprobs is not None or ref_hidden is not None
    if objective.needs_reference and not given:
        raise ValueError(f"ref_logprobs or ref_hidden must be given for {objective.losses}, got neither")
    if given and not objective.needs_reference:
        name = "ref_hidden" if ref_logprobs is None else "ref_logprobs"
        raise ValueError(f"{name} must be None for {objective.losses}, which have no reference")
    if objective.paired:
        if count % 2:
            raise ValueError(f"targets must hold as many rejected as chosen sequences, got {count} in all")
        if labels is not None:
            raise ValueError(f"labels must be None for {objective.losses}, which compare pairs")
    elif labels is None or labels.shape != (count,):
        got = "None" if labels is None else shape(labels)
        raise ValueError(f"labels must be ({count},), one for each sequence, for {objective.losses}; got {got}")
    if kl is not None and ("kto" not in objective.losses or kl.dim() != 0):
        raise ValueError(f"kl must be a 0-d tensor, and given for kto alone; got {shape(kl)} with {objective.losses}")


def check_mode(mode: Mode, hidden: Tensor, head: Head, tokenwise: bool, entropy_term: bool) -> Mode:
    """The route to take. One pass serves what is known token by token; under a frozen head, any loss of log-probs."""
    if mode not in ("auto", "one_pass", "two_phase"):
        raise ValueError(f"mode must be 'auto', 'one_pass' or 'two_phase', got {mode!r}")
    fp16 = torch.float16 in (hidden.dtype, head.weight.dtype)
    trains_head = any(t is not None and t.requires_grad for t in (head.weight, head.bias, head.lora_b))
    serves = tokenwise or not (trains_head or entropy_term)
    if mode == "one_pass" and fp16:
        raise ValueError("mode='one_pass' must not be used with fp16, whose gradients underflow; use 'two_phase'")
    if mode == "one_pass" and not serves:
        raise ValueError(
            "mode='one_pass' needs an objective whose terms are known token by token, or a frozen head and no entropy "
            "bonus; use 'two_phase'"
        )
    if mode != "auto":
        return mode
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or trains_head)
    return "one_pass" if wanted and serves and not fp16 and not torch.compiler.is_compiling() else "two_phase"


def check_shapes(targets: Tensor, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.shape != targets.shape:
            raise ValueError(f"{name} must have the shape of targets {shape(targets)}, got {shape(value)}")


def flat_sequences(targets: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """The sequence each flat token belongs to, (N,), and how many sequences there are."""
    if targets.dim() == 2:
        if cu_seqlens is not None:
            raise ValueError(f"cu_seqlens must be None for (B, T) targets, got {shape(cu_seqlens)}")
        b, t = targets.shape
        return torch.arange(b, device=targets.device).repeat_interleave(t), b
    if cu_seqlens is None:
        return torch.zeros_like(targets), 1
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be (B + 1,) integers, got {shape(cu_seqlens)} {cu_seqlens.dtype}")
    sizes = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != targets.numel() or bool((sizes < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to N={targets.numel()}, got {cu_seqlens.tolist()}")
    return torch.arange(sizes.numel(), device=targets.device).repeat_interleave(sizes), sizes.numel()


def check_outputs(outputs: Sequence[str], allowed: tuple[str, ...] = OUTPUTS) -> tuple[str, ...]:
    if isinstance(outputs, str):
        raise TypeError(f"outputs must be a sequence of names such as ('entropy',), got the string {outputs!r}")
    for name in outputs:
        if name not in allowed:
            raise ValueError(f"outputs must be among {list(allowed)}, got {name!r}")
    return tuple(name for name in allowed if name in outputs)


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_number(name: str, value: object, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} must be finite{' and positive' if positive else ''}, got {value}")


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
    round_logits: bool,
    grad_filter: float = 0.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Head, Tensor]:
    """Everything that can be refused without reading a tensor's values; -> head and (N,) temperatures."""
    for name, value in (("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias)):
        if value is None and name == "bias":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {value.device}")
        if name != "targets" and value.dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {[str(d) for d in DTYPES]}, got {value.dtype}")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must be (N, H) or (B, T, H), got {shape(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"weight must be (V, H) with H={hidden.shape[-1]} as in hidden, got {shape(weight)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have shape {shape(hidden)[:-1]}, as hidden, got {shape(targets)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) with V={weight.shape[0]}, got {shape(bias)}")
    if lora is not None:
        _check_lora(lora, hidden, weight)
    _check_number("logit_scale", logit_scale, positive=False)
    if softcap is not None:
        _check_number("softcap", softcap, positive=True)
    _check_number("grad_filter", grad_filter, positive=False)
    if not 0 <= grad_filter < 1:
        raise ValueError(f"grad_filter must lie in [0, 1), got {grad_filter}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    backends.choose(backend, hidden)  # refuses what cannot run before any work

    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype):
        compute_dtype = torch.get_autocast_dtype(device_type)
    else:
        compute_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    wide = torch.promote_types(compute_dtype, torch.float32)
    if isinstance(temperature, Tensor):
        if temperature.shape != targets.shape:
            raise ValueError(f"temperature must have the shape of targets {shape(targets)}, got {shape(temperature)}")
        if temperature.device != hidden.device:
            raise ValueError(f"temperature must be on the device of hidden, {hidden.device}, got {temperature.device}")
        if temperature.requires_grad:
            raise ValueError("temperature must not require a gradient: it takes none")
        flat = temperature.reshape(-1).to(wide)
    else:
        _check_number("temperature", temperature, positive=True)
        flat = torch.full((targets.numel(),), float(temperature), dtype=wide, device=hidden.device)
    cap = None if softcap is None else float(softcap)
    lora_b = None if lora is None else lora[1].contiguous()
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return Head(weight, bias, float(logit_scale), cap, compute_dtype, round_logits, float(grad_filter), lora_b), flat


def _check_lora(lora: tuple[Tensor, Tensor, float], hidden: Tensor, weight: Tensor) -> None:
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise TypeError(f"lora must be (A, B, scale), got {type(lora).__name__}")
    a, b, scale = lora
    for name, value in (("lora A", a), ("lora B", b)):
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a tensor of one of {[str(d) for d in DTYPES]}, got {got}")
        if value.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {value.device}")
    if a.dim() != 2 or a.shape[1] != weight.shape[1] or b.shape != (len(weight), len(a)):
        raise ValueError(
            f"lora must be A (r, H) and B (V, r) with H={weight.shape[1]} and V={len(weight)}, got {shape(a)} and "
            f"{shape(b)}"
        )
    _check_number("lora scale", scale, positive=False)


def check_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    kind: Kind,
    mask: Tensor | None,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    ref_logit_scale: float,
    ref_softcap: float | None,
    beta: float,
    backend: str,
) -> tuple[Comparison, Tensor]:
    """As `check_head`, for two heads; -> what to compare and (N,) temperatures."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    _check_number("beta", beta, positive=False)
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must lie in (0, 1), got {beta}; its ends are kind='forward' and kind='reverse'")
    if kind != "jsd" and beta != 0.5:
        raise ValueError(f"beta must be left at 0.5 for kind={kind!r}, which has none; got {beta}")
    for name, value in (("hidden", hidden), ("ref_hidden", ref_hidden), ("ref_weight", ref_weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    for name, of_rows in (("mask", mask), ("temperature", temperature)):
        if isinstance(of_rows, Tensor) and of_rows.shape != hidden.shape[:-1]:
            raise ValueError(f"{name} must have the shape of the rows {shape(hidden)[:-1]}, got {shape(of_rows)}")
    anything = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    head, flat = check_head(
        hidden, weight, anything, bias, temperature, logit_scale, softcap, -100, backend, round_logits=False
    )
    for name, given in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight), ("ref_bias", ref_bias)):
        if given is not None and given.dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {[str(d) for d in DTYPES]}, got {given.dtype}")
        if given is not None and given.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {given.device}")
    reference_head(hidden, weight, bias, head, None, ref_hidden, ref_weight, ref_bias)
    ref, _ = check_head(ref_hidden, ref_weight, anything, ref_bias, 1.0, 1.0, None, -100, backend, round_logits=False)
    _check_number("ref_logit_scale", ref_logit_scale, positive=False)
    if ref_softcap is not None:
        _check_number("ref_softcap", ref_softcap, positive=True)
    ref = replace(ref, logit_scale=float(ref_logit_scale), softcap=None if ref_softcap is None else float(ref_softcap))
    if torch.float64 in (head.compute_dtype, ref.compute_dtype):
        head, ref = (replace(h, compute_dtype=torch.float64) for h in (head, ref))
    return Comparison(head, ref, kind, float(beta)), flat.to(torch.promote_types(head.compute_dtype, torch.float32))
