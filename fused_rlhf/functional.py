"""The public functions: what they take, what they refuse. The maths is in the backends and in `objectives`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fused_rlhf import autograd, backends
from fused_rlhf.autograd import Maybe
from fused_rlhf.kernels.interface import OUTPUTS, Head, Stats
from fused_rlhf.objectives import Count, PolicyLoss, policy_metrics
from fused_rlhf.preferences import PreferenceLoss, preference_metrics
from fused_rlhf.segments import Sequences

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
    sampling_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
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
        ref_logprobs: the shape of `targets`. They, or ref_hidden, must be given when objective.beta is not 0.
        sampling_logprobs: the shape of `targets`, as the sampler reported them, NaN where it did not; for
            objective.importance_sampling and objective.off_policy_mask_threshold.
        ref_hidden: the shape of `hidden`, of the reference model: its log-probs are computed here, without gradient,
            from ref_weight (V, H) and ref_bias (V,), by default `weight` and `bias`, under the same transform.
        cu_seqlens: (B + 1,) int, offsets of the sequences in a flat (N,) input; None there means one sequence.
        num_sequences, num_tokens: counts that normalise the loss; give the global ones when this is one micro-batch or
            rank of several. Default: those of this call.
        outputs: "entropy" adds it to the metrics.
        mode: "one_pass" computes gradients together with the loss (three matrix products instead of four; under a
            frozen head two more than the forward, and any objective without entropy terms). It does not serve fp16,
            whose gradients would underflow before a loss scale reaches them, nor a trainable head with an objective
            that looks beyond a token (sequence level, entropy quantile ...). "two_phase" recomputes the logits in the
            backward; "auto" takes one_pass where gradients are wanted and it applies.

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
    per_token = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampling_logprobs": sampling_logprobs}
    _check_shapes(targets, completion_mask=completion_mask, **per_token)
    reference = _reference_head(hidden, weight, bias, head, ref_logprobs, ref_hidden, ref_weight, ref_bias)
    if objective.beta != 0 and ref_logprobs is None and ref_hidden is None:
        raise ValueError(
            f"ref_logprobs or ref_hidden must be given when beta is not 0, got neither with beta={objective.beta}"
        )
    entropy_term = objective.entropy_coef != 0
    mode = _check_mode(mode, hidden, head, tokenwise=objective.tokenwise, entropy_term=entropy_term)
    index, count = _sequences(targets, cu_seqlens)
    if advantages.shape not in (targets.shape, (count,)):
        raise ValueError(
            f"advantages must have shape {(count,)} or that of targets {_shape(targets)}, got {_shape(advantages)}"
        )

    rows = _Rows.of(targets, completion_mask, ignore_index, head, flat_temperature, index, count)
    per_sequence = advantages.shape != targets.shape
    bound = objective.bind(
        advantages=rows.vector(advantages[index] if per_sequence else advantages),
        sequences=rows.sequences,
        old_logprobs=rows.vector(old_logprobs),
        ref_logprobs=rows.reference(reference, ref_hidden, backend) if reference else rows.vector(ref_logprobs),
        sampling_logprobs=rows.vector(sampling_logprobs),
        num_sequences=count if num_sequences is None else num_sequences,
        num_tokens=max(rows.count, 1) if num_tokens is None else num_tokens,
        per_sequence=per_sequence,
    )
    if bound.needs_entropy and "entropy" not in names:
        names = (*names, "entropy")
    x = rows.hidden(hidden)
    if mode == "one_pass" and objective.tokenwise and rows.count > 0:
        loss, stats = autograd.one_pass_loss(x, head, rows.targets, rows.temperature, names, bound, backend)
    else:
        stats = rows.statistics(x, head, names, backend, mode)
        loss = autograd.loss_of(stats.logprobs, stats.entropy if bound.needs_entropy else None, bound, backend)
    return loss, policy_metrics(bound, stats.logprobs.detach(), stats.entropy)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    objective: PreferenceLoss,
    completion_mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    labels: Tensor | None = None,
    kl: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_pairs: Count | None = None,
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
    """A preference objective of an LM head's log-probabilities, without the logits.

    The S sequences are P chosen completions followed by the P rejected ones in the same order (S = 2 P), or single
    completions with `labels` for an unpaired objective such as KTO.

    Args:
        hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index, backend, round_logits: as in
            `linear_logprobs`; (S, T, H), (V, H) and (S, T), or (N, H) and (N,) with cu_seqlens.
        objective: e.g. `DPO(beta=0.1)`.
        completion_mask: bool or 0 / 1 in the shape of `targets`; tokens outside it (and ignored targets) cost nothing.
        ref_logprobs: the reference's, in the shape of `targets`; or (S,), already summed over each completion, with the
            weights of objective.ld_alpha if it has one. They, or ref_hidden, must be given where the objective compares
            with a reference, and must not be where it does not.
        ref_hidden, ref_weight, ref_bias: as in `linear_policy_loss`: the reference is computed here.
        labels: (S,) bool or 0 / 1, for unpaired objectives alone: whether a completion is desirable.
        kl: 0-d, >= 0, for KTO alone: the batch's KL to the reference; None is 0.
        cu_seqlens: (S + 1,) int, offsets of the sequences in a flat (N,) input, where it must be given.
        num_pairs: pairs (examples, where unpaired) that the mean is over; num_tokens: chosen tokens that the NLL is a
            mean over. Give the global counts when this is one micro-batch or rank of several. Default: of this call.
        outputs: of "entropy", "mean_logit", "is_top1": adds them to the metrics.
        mode: as in `linear_policy_loss`; "one_pass" needs a frozen head.

    Returns:
        loss (scalar, fp32) and metrics (0-d, see `preferences.preference_metrics`).

    Raises:
        ValueError, TypeError: as `linear_logprobs`; also contradictory arguments.
    """
    head, flat_temperature = _check_head(
        hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index, backend, round_logits
    )
    names = _check_outputs(outputs, allowed=("entropy", "mean_logit", "is_top1"))
    if not isinstance(objective, PreferenceLoss):
        raise TypeError(f"objective must be a PreferenceLoss such as DPO(), got {type(objective).__name__}")
    if targets.dim() == 1 and cu_seqlens is None:
        raise ValueError("cu_seqlens must be given for flat (N,) targets, got None")
    index, count = _sequences(targets, cu_seqlens)
    sums = ref_logprobs if ref_logprobs is not None and ref_logprobs.shape == (count,) != targets.shape else None
    _check_shapes(targets, completion_mask=completion_mask, ref_logprobs=None if sums is not None else ref_logprobs)
    reference = _reference_head(hidden, weight, bias, head, ref_logprobs, ref_hidden, ref_weight, ref_bias)
    _check_preference(objective, count, ref_logprobs, ref_hidden, labels, kl)
    mode = _check_mode(mode, hidden, head, tokenwise=False, entropy_term=False)

    rows = _Rows.of(targets, completion_mask, ignore_index, head, flat_temperature, index, count)
    wide = flat_temperature.dtype
    per_token = None
    if reference is not None:
        per_token = rows.reference(reference, ref_hidden, backend)
    elif sums is None:
        per_token = rows.vector(ref_logprobs)
    lengths = rows.sequences.lengths
    bound = objective.bind(
        sequences=rows.sequences,
        ref_logprobs=per_token,
        ref_sums=None if sums is None else sums.detach().to(wide),
        labels=None if labels is None else labels.bool(),
        kl=None if kl is None else kl.detach().to(wide),
        num_pairs=(max(count // 2, 1) if objective.paired else max(count, 1)) if num_pairs is None else num_pairs,
        num_tokens=lengths[: count // 2].sum().clamp(min=1) if num_tokens is None else num_tokens,
        dtype=wide,
    )
    computed = (*names, *(name for name in objective.outputs if name not in names))
    stats = rows.statistics(rows.hidden(hidden), head, computed, backend, mode)
    if stats.sum_sq is not None:
        bound.log_sum_sq = stats.sum_sq.log()
    loss = autograd.loss_of(stats.logprobs, None, bound, backend)
    metrics = preference_metrics(bound, stats.logprobs.detach(), stats.entropy, stats.mean_logit, stats.is_top1)
    return loss, metrics


@dataclass(frozen=True)
class _Rows:
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
    ) -> _Rows:
        flat = targets.reshape(-1)
        if completion_mask is not None:
            flat = flat.masked_fill(~completion_mask.reshape(-1).bool(), ignore_index)
        rows = autograd.live_rows(flat, ignore_index, head.weight.shape[0])
        pick = partial(autograd.select, rows=rows)
        return _Rows(rows, pick(flat), pick(temperature), Sequences.of(pick(index), count), ignore_index)

    @property
    def count(self) -> int:
        return self.targets.numel()

    def hidden(self, hidden: Tensor) -> Tensor:
        """(N, H), with its graph."""
        return autograd.select(hidden.reshape(-1, hidden.shape[-1]), self.rows)

    def vector(self, values: Maybe) -> Maybe:
        """(N,) of a tensor in the shape of the targets, without its graph."""
        if values is None:
            return values
        return autograd.select(values.detach().reshape(-1).to(self.temperature.dtype), self.rows)

    def statistics(self, x: Tensor, head: Head, names: tuple[str, ...], backend: str, mode: Mode) -> Stats:
        if mode == "one_pass" and self.count > 0:
            return autograd.frozen_logprobs(x, head, self.targets, self.temperature, names, backend)
        return autograd.linear_logprobs(x, head, self.targets, self.temperature, self.ignore_index, names, backend)

    def reference(self, head: Head, hidden: Tensor, backend: str) -> Tensor:
        with torch.no_grad():
            return self.statistics(self.hidden(hidden), head, (), backend, "two_phase").logprobs


def _reference_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    ref_logprobs: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> Head | None:
    """The head of a reference that is to be computed in the same call; None where it is not."""
    if ref_hidden is None:
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                raise ValueError(f"{name} must be None without ref_hidden, got {_shape(value)}")
        return None
    if ref_logprobs is not None:
        raise ValueError("ref_logprobs must be None where ref_hidden is given: the reference would be there twice")
    own = ref_weight is None
    if own and ref_bias is not None:
        raise ValueError(f"ref_bias must be None without ref_weight, got {_shape(ref_bias)}")
    ref_weight = weight if ref_weight is None else ref_weight
    ref_bias = bias if own else ref_bias
    expected = {"ref_hidden": (*hidden.shape[:-1], ref_weight.shape[-1]), "ref_weight": (len(weight), None)}
    if ref_hidden.shape != expected["ref_hidden"]:
        raise ValueError(f"ref_hidden must be {expected['ref_hidden']}, got {_shape(ref_hidden)}")
    if ref_weight.dim() != 2 or len(ref_weight) != len(weight):
        raise ValueError(f"ref_weight must be (V, H) with V={len(weight)} as weight has, got {_shape(ref_weight)}")
    if ref_bias is not None and ref_bias.shape != (len(weight),):
        raise ValueError(f"ref_bias must be (V,) = ({len(weight)},), got {_shape(ref_bias)}")
    return replace(head, weight=ref_weight, bias=ref_bias)


def _check_preference(
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
        got = "None" if labels is None else _shape(labels)
        raise ValueError(f"labels must be ({count},), one for each sequence, for {objective.losses}; got {got}")
    if kl is not None and ("kto" not in objective.losses or kl.dim() != 0):
        raise ValueError(f"kl must be a 0-d tensor, and given for kto alone; got {_shape(kl)} with {objective.losses}")


def _check_mode(mode: Mode, hidden: Tensor, head: Head, tokenwise: bool, entropy_term: bool) -> Mode:
    """The route to take. One pass serves what is known token by token; under a frozen head, any loss of log-probs."""
    if mode not in ("auto", "one_pass", "two_phase"):
        raise ValueError(f"mode must be 'auto', 'one_pass' or 'two_phase', got {mode!r}")
    fp16 = torch.float16 in (hidden.dtype, head.weight.dtype)
    trains_head = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
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


def _check_shapes(targets: Tensor, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.shape != targets.shape:
            raise ValueError(f"{name} must have the shape of targets {_shape(targets)}, got {_shape(value)}")


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
