"""The public functions: what they take, what they refuse. The maths is in the backends and in `objectives`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fused_rlhf import autograd, backends
from fused_rlhf.kernels.interface import OUTPUTS, Head
from fused_rlhf.objectives import Count, PolicyLoss, policy_metrics

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
Mode = Literal["auto", "one_pass", "two_phase"]


class LogProbs(NamedTuple):
    """Results of `linear_logprobs`, each of the targets' shape; None where not asked for.

    fp32 (fp64 for fp64 inputs), `is_top1` bool. Rows with `ignore_index` hold 0 (False). `logprobs`, `entropy` and
    `lse` are differentiable.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None
    sum_sq: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    grad_filter: float = 0.0,
    process_group: Any = None,
    backend: str = "auto",
    *,
    round_logits: bool = False,
) -> LogProbs:
    """Log-probabilities of `targets` under an LM head, without its logits.

    With u = logit_scale (hidden @ weight.T + bias), the logits are z = u / temperature, or with a softcap
    z = softcap tanh(u / softcap) / temperature. They are accumulated in fp32 and never rounded below it; under autocast
    the operands are cast to its dtype tile by tile, operands of two dtypes are promoted as torch promotes them.

    Args:
        hidden: (N, H) or (B, T, H); bf16, fp16, fp32 or fp64.
        weight: (V, H), of any of these dtypes.
        targets: (N,) or (B, T), int64, in [0, V) or `ignore_index`; a row with `ignore_index` costs nothing, whatever
            its hidden state holds.
        bias: (V,) or None.
        temperature: one positive number, or one per token in the shape of `targets`. Not differentiable.
        logit_scale: finite, applied to the product plus bias.
        softcap: positive, or None.
        ignore_index: the target that marks a row to leave out.
        outputs: what else to return, of "entropy" (nats), "lse" (log sum_v exp z_v), "sum_sq" (sum_v p_v^2),
            "mean_logit" (mean_v z_v), "is_top1" (the target is the first of the largest logits).
        grad_filter: in [0, 1): the share of probability mass per token that the backward may leave out; 0 is exact.
            Blocks of the vocabulary that hold next to nothing of a token are not recomputed for it; the target's block
            always is, and a token with an entropy gradient is exact. With g and k the loss gradients of logprob and
            lse, the error of dloss/dz has an L1 norm of at most |k - g| grad_filter per token, so that of `hidden` a
            norm of at most |k - g| grad_filter max_v |W_v| logit_scale / temperature, and that of `weight` a Frobenius
            norm of at most sum_n |k_n - g_n| grad_filter |h_n| logit_scale / temperature_n.
        process_group: for a vocabulary-parallel head; only None so far.
        backend: "auto", "triton", "chunked" or "reference". A name never falls back; the variable `FUSED_RLHF_BACKEND`
            overrides "auto".
        round_logits: allow logits rounded to the operands' dtype where that is faster. Costs accuracy.

    Returns:
        `LogProbs`, differentiable in hidden, weight and bias; repeatable to the bit. Rows whose upstream gradient is
        exactly zero are skipped in the backward.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value, named; before any work.
        NotImplementedError: process_group (OP12).
    """
    head, flat_temperature = _check_head(
        hidden,
        weight,
        targets,
        bias,
        temperature,
        logit_scale,
        softcap,
        ignore_index,
        backend,
        round_logits,
        grad_filter,
    )
    names = _check_outputs(outputs)
    if process_group is not None:
        raise NotImplementedError("process_group (row OP12) is not implemented yet; use process_group=None")
    flat = targets.reshape(-1)
    stats = autograd.linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]), head, flat, flat_temperature, ignore_index, names, backend
    )
    shaped = {name: getattr(stats, name).view(targets.shape) for name in ("logprobs", *names)}
    return LogProbs(**shaped)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    objective: PolicyLoss,
    completion_mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_sequences: Count | None = None,
    num_tokens: Count | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    backend: str = "auto",
    mode: Mode = "auto",
    round_logits: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A policy objective of an LM head's log-probabilities, without the logits.

    Args:
        hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index, backend, round_logits: as in
            `linear_logprobs`. hidden[..., t, :] predicts targets[..., t].
        advantages: (B,) one per sequence, or the shape of `targets`.
        objective: e.g. `GRPO(beta=0.04)`.
        completion_mask: bool or 0 / 1 in the shape of `targets`; tokens outside it (and ignored targets) cost nothing.
        old_logprobs: the shape of `targets`, at the last rollout; None means on-policy (ratio 1, with its gradient).
        ref_logprobs: the shape of `targets`; must be given when objective.beta is not 0. Takes no gradient.
        cu_seqlens: (B + 1,) int, offsets of the sequences in a flat (N,) input; None there means one sequence.
        num_sequences, num_tokens: counts that normalise the loss; give the global ones when this is one micro-batch or
            rank of several. Default: those of this call.
        outputs: "entropy" adds it to the metrics.
        mode: "one_pass" computes gradients together with the loss (three matrix products; not for fp16, whose gradients
            would underflow before a loss scale reaches them, nor at sequence level, where a token's gradient waits for
            the last of its sequence); "two_phase" recomputes the logits in the backward (four);
            "auto" takes one_pass where gradients are wanted and it applies.

    Returns:
        loss (scalar, fp32; a differentiable 0 without tokens) and metrics (0-d, see `objectives.policy_metrics`).

    Raises:
        ValueError, TypeError: as `linear_logprobs`; also contradictory arguments.
    """
    head, flat_temperature = _check_head(
        hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index, backend, round_logits
    )
    names = _check_outputs(outputs, allowed=("entropy",))
    if not isinstance(objective, PolicyLoss):
        raise TypeError(f"objective must be a PolicyLoss such as GRPO(), got {type(objective).__name__}")
    if objective.beta != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs must be given when beta is not 0, got None with beta={objective.beta}")
    if mode not in ("auto", "one_pass", "two_phase"):
        raise ValueError(f"mode must be 'auto', 'one_pass' or 'two_phase', got {mode!r}")
    fp16 = torch.float16 in (hidden.dtype, weight.dtype)
    if mode == "one_pass" and fp16:
        raise ValueError("mode='one_pass' must not be used with fp16, whose gradients underflow; use 'two_phase'")
    if mode == "one_pass" and objective.level != "token":
        raise ValueError(
            f"mode='one_pass' needs a token-level objective, got level={objective.level!r}; use 'two_phase'"
        )
    for name, value in (
        ("completion_mask", completion_mask),
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
    ):
        if value is not None and value.shape != targets.shape:
            raise ValueError(f"{name} must have the shape of targets {_shape(targets)}, got {_shape(value)}")
    mask = targets != ignore_index
    if completion_mask is not None:
        mask = mask & completion_mask.bool()
    sequence, count = _sequences(targets, cu_seqlens)
    if advantages.shape not in (targets.shape, (count,)):
        raise ValueError(
            f"advantages must have shape {(count,)} or that of targets {_shape(targets)}, got {_shape(advantages)}"
        )

    flat_mask, flat_targets = mask.reshape(-1), targets.reshape(-1)
    rows = autograd.live_rows(torch.where(flat_mask, flat_targets, ignore_index), ignore_index, weight.shape[0])
    real = autograd.select(sequence, rows)
    lengths = torch.bincount(real, minlength=count)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    wide = flat_temperature.dtype

    def vector(values: Tensor) -> Tensor:
        return autograd.select(values.detach().reshape(-1).to(wide), rows)

    per_token = advantages if advantages.shape == targets.shape else advantages[sequence]
    bound = objective.bind(
        advantages=vector(per_token),
        lengths=lengths[real].to(wide),
        offsets=offsets,
        old_logprobs=None if old_logprobs is None else vector(old_logprobs),
        ref_logprobs=None if ref_logprobs is None else vector(ref_logprobs),
        num_sequences=count if num_sequences is None else num_sequences,
        num_tokens=max(real.numel(), 1) if num_tokens is None else num_tokens,
    )
    if bound.needs_entropy and "entropy" not in names:
        names = (*names, "entropy")

    x = autograd.select(hidden.reshape(-1, hidden.shape[-1]), rows)
    y, t = autograd.select(flat_targets, rows), autograd.select(flat_temperature, rows)
    wants_grad = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (hidden, weight, bias))
    if mode == "auto":
        applies = bound.offsets is None and not fp16 and not torch.compiler.is_compiling()
        mode = "one_pass" if wants_grad and applies else "two_phase"
    if mode == "one_pass" and y.numel() > 0:
        loss, stats = autograd.one_pass_loss(x, head, y, t, names, bound, backend)
    else:
        stats = autograd.linear_logprobs(x, head, y, t, ignore_index, names, backend)
        loss = autograd.loss_of(stats.logprobs, stats.entropy if bound.needs_entropy else None, bound, backend)
    return loss, policy_metrics(bound, stats.logprobs.detach(), stats.entropy)


def _sequences(targets: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """The sequence each flat token belongs to, (N,), and how many sequences there are."""
    if targets.dim() == 2:
        if cu_seqlens is not None:
            raise ValueError(f"cu_seqlens must be None for (B, T) targets, got {_shape(cu_seqlens)}")
        b, t = targets.shape
        return torch.arange(b, device=targets.device).repeat_interleave(t), b
    if cu_seqlens is None:
        return torch.zeros_like(targets), 1
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be (B + 1,) integers, got {_shape(cu_seqlens)} {cu_seqlens.dtype}")
    sizes = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != targets.numel() or bool((sizes < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to N={targets.numel()}, got {cu_seqlens.tolist()}")
    return torch.arange(sizes.numel(), device=targets.device).repeat_interleave(sizes), sizes.numel()


def _check_outputs(outputs: Sequence[str], allowed: tuple[str, ...] = OUTPUTS) -> tuple[str, ...]:
    if isinstance(outputs, str):
        raise TypeError(f"outputs must be a sequence of names such as ('entropy',), got the string {outputs!r}")
    for name in outputs:
        if name not in allowed:
            raise ValueError(f"outputs must be among {list(allowed)}, got {name!r}")
    return tuple(name for name in allowed if name in outputs)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_number(name: str, value: object, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} must be finite{' and positive' if positive else ''}, got {value}")


def _check_head(
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
        raise ValueError(f"hidden must be (N, H) or (B, T, H), got {_shape(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"weight must be (V, H) with H={hidden.shape[-1]} as in hidden, got {_shape(weight)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have shape {_shape(hidden)[:-1]}, as hidden, got {_shape(targets)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) with V={weight.shape[0]}, got {_shape(bias)}")
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
            raise ValueError(f"temperature must have the shape of targets {_shape(targets)}, got {_shape(temperature)}")
        if temperature.device != hidden.device:
            raise ValueError(f"temperature must be on the device of hidden, {hidden.device}, got {temperature.device}")
        if temperature.requires_grad:
            raise ValueError("temperature must not require a gradient: it takes none")
        flat = temperature.reshape(-1).to(wide)
    else:
        _check_number("temperature", temperature, positive=True)
        flat = torch.full((targets.numel(),), float(temperature), dtype=wide, device=hidden.device)
    cap = None if softcap is None else float(softcap)
    return Head(weight, bias, float(logit_scale), cap, compute_dtype, round_logits, float(grad_filter)), flat
