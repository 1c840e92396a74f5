"""The public functions: what they take and give. Head, rows and execution are in `op`, the maths in backends and objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rlhf import private
from fused_rlhf.checks import check_count
from fused_rlhf.door import Door
from fused_rlhf.kernels.interface import Kind, Projection, RowPairs, Rows, Stats, pick
from fused_rlhf.kernels.statistics import OUTPUTS
from fused_rlhf.objectives.metrics import policy_metrics, preference_metrics
from fused_rlhf.objectives.policy import PolicyLoss
from fused_rlhf.objectives.preference import PreferenceLoss
from fused_rlhf.objectives.reductions import Metrics
from fused_rlhf.objectives.surrogates import Count
from fused_rlhf.op.adapter import with_adapter
from fused_rlhf.op.divergence import divergence, divergence_block
from fused_rlhf.op.execute import Mode, check_mode, execute, shard_block
from fused_rlhf.op.head import (
    Call,
    Head,
    LoRA,
    check_divergence,
    check_head,
    check_outputs,
    check_reference,
    group_of,
    head_of,
)
from fused_rlhf.op.kept import ADDED, FULL, kept_statistics
from fused_rlhf.op.logprobs import linear_logprobs as logprobs_of_rows
from fused_rlhf.op.logprobs import linear_logprobs_of_ids as logprobs_of_ids
from fused_rlhf.op.parallel import Gate, gate, sharded
from fused_rlhf.op.rows import Tokens, check_id_shape, check_ids, check_temperature, scatter, tokens_of
from fused_rlhf.op.sequences import (
    check_policy,
    check_preference,
    of_sequences,
    reference_logprobs,
    sharded_reference,
)
from fused_rlhf.op.streamed import comparable
from fused_rlhf.op.truncation import ANY, WITHIN, Kept, Truncation


class LogProbs(NamedTuple):
    """Results of `linear_logprobs`, each of the targets' shape; None where not asked for.

    fp32 (fp64 for fp64 inputs), `argmax` int64, `is_top1` and `target_added` bool. Rows with `ignore_index` hold 0 (False).
    All are differentiable but `argmax`, `is_top1`, `margin` and `target_added`; `id_logprobs` has the shape of `ids`.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None
    sum_sq: Tensor | None = None
    mean_logit: Tensor | None = None
    max_logit: Tensor | None = None
    argmax: Tensor | None = None
    is_top1: Tensor | None = None
    margin: Tensor | None = None
    full_logprobs: Tensor | None = None  # of the whole vocabulary, beside those of kept sets
    id_logprobs: Tensor | None = None  # with `ids`
    target_added: Tensor | None = None  # with `truncation`: the target was not in the set that was found


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | Head,
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
    lora: LoRA | tuple[Tensor, Tensor, float] | None = None,
    round_logits: bool = False,
    ids: Tensor | None = None,
    kept: Kept | None = None,
    truncation: Truncation | None = None,
    hidden_grad: str = "sum",
) -> LogProbs:
    """Log-probabilities of `targets` under an LM head, without its logits.

    With u = logit_scale (hidden @ weight.T + bias), the logits are z = u / temperature, or with a softcap
    z = softcap tanh(u / softcap) / temperature. They are accumulated in fp32 and never rounded below it; under autocast
    the operands are cast to its dtype tile by tile, operands of two dtypes are promoted as torch promotes them.

    Args:
        hidden: (N, H) or (B, T, H); bf16, fp16, fp32 or fp64.
        weight: (V, H), of any of these dtypes; or a `Head`, which brings bias, logit_scale, softcap and lora of its own.
        targets: (N,) or (B, T), int64, in [0, V) or `ignore_index`; a row with `ignore_index` costs nothing, whatever
            its hidden state holds.
        bias: (V,) or None.
        temperature: one positive number, or one per token in the shape of `targets`. Not differentiable.
        logit_scale: finite, applied to the product plus bias.
        softcap: positive, or None.
        ignore_index: the target that marks a row to leave out.
        outputs: what else to return, of "entropy" (nats), "lse" (log sum_v exp z_v), "sum_sq" (sum_v p_v^2),
            "mean_logit" (mean_v z_v), "max_logit" (max_v z_v; its gradient is that of the first of the largest), "argmax" (the
            first of the largest), "is_top1" (the target is it), "margin" (the largest logit less the second largest, >= 0;
            infinite where V is 1). With `kept` or `truncation` of "entropy", "lse",
            "sum_sq", all over the kept set, and "full_logprobs" (those of the whole vocabulary).
        grad_filter: in [0, 1): the share of probability mass per token that the backward may leave out; 0 is exact.
            Blocks of the vocabulary that hold next to nothing of a token are not recomputed for it; the target's block
            always is, and a token with a gradient in entropy or mean_logit is exact. With g, k and s the loss gradients of
            logprob, lse and sum_sq, and e = (|k - g| + 2 |s|) grad_filter, the error of dloss/dz has an L1 norm of at most e
            per token, so that of `hidden` a norm of at most e max_v |W_v| logit_scale / temperature, and that of `weight` a
            Frobenius norm of at most sum_n e_n |h_n| logit_scale / temperature_n.
        process_group: of a vocabulary-parallel head: `weight` (with bias and B) is this rank's rows, `Head` may say which;
            every rank gives the same hidden states, targets and options. Ranks may hold different numbers of rows, or none.
            What comes back is of the whole vocabulary, with the same bits on every rank; the gradients of weight, bias and B
            are this rank's own. If one rank refuses its call, all raise. None: that of the `Head`, if
            it has one.
        hidden_grad: with a process_group: "sum" adds the ranks' parts of d_hidden, so that each has the whole; "local" leaves
            that to the caller, as to the backward of a sequence-parallel gather.
        lora: (A, B, scale): a low-rank adapter on the head, A (r, H) and B (V, r): hidden @ weight.T gains
            scale (hidden @ A.T) @ B.T, tile by tile. A and B take gradients, with or without `weight`.
        backend: "auto", "triton", "chunked" or "reference". A name never falls back; the variable `FUSED_RLHF_BACKEND`
            overrides "auto".
        round_logits: allow logits rounded to the operands' dtype where that is faster. Costs accuracy.
        ids: (N, K) or (B, T, K), int64: further tokens whose log-probs are wanted in `id_logprobs`, at the cost of their rows
            of `weight`; repeated ones are fine. One equal to ignore_index gives 0 and takes no gradient.
        kept: (ids (E,), offsets (N + 1,)), int64 or int32: the tokens that a truncated sampler kept for each of the N rows (B T
            of them), as inference engines report them, in any order, each row's target among them. Log-probs are those of
            the distribution over these, z_y - log sum_kept exp z, and nothing else of the vocabulary is touched unless
            "full_logprobs" is asked for. What is told of an ignored row may be anything.
        truncation: how the sampler cut its distribution, as a `Truncation`: the kept sets are found from the logits. The
            target always belongs to its set, as rounding may have moved the border since; `target_added` says where it
            had to be added. Not beside `kept`; neither beside `ids` or grad_filter.

    Returns:
        `LogProbs`, differentiable in hidden, weight, bias, A and B; repeatable to the bit. Rows whose upstream gradient is
        exactly zero are skipped in the backward. torch.compile breaks its graph at `kept` and `truncation`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value, named; before any work.
        RuntimeError: with a process_group: another rank refused the call.
    """
    group = group_of(process_group, weight=weight)
    call = Call(temperature, ignore_index, backend, round_logits, grad_filter, kept, truncation, group is not None)
    if call.samples or ids is not None or grad_filter != 0:
        weight = _whole(weight)
    met_in = _met_in(group, weight)
    if met_in is not None:
        with gate(met_in, hidden_grad) as entered:
            assert entered is not None
            head = head_of(weight, bias, logit_scale, softcap, lora)
            return _of_shards(entered, hidden, head, targets, call, outputs, ids)
    head = head_of(weight, bias, logit_scale, softcap, lora)
    projection, flat_temperature = check_head(hidden, head, targets, call)
    if call.samples:
        _check_no_ids(ids, call)
        names, one = check_outputs(outputs, WITHIN), targets.new_zeros(targets.numel())
        tokens = tokens_of(Door(), targets, None, call, projection, flat_temperature, one, 1)
        return _within_sets(tokens.rows(hidden, head, projection), projection, tokens, targets, call, names)
    names = check_outputs(outputs)
    flat, x = targets.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    if head.lora is not None:
        # A row that is left out may hold anything, and its activations meet those of the others in dA.
        some = x.masked_fill((flat == ignore_index)[:, None], 0.0)
        x = with_adapter(some, head.lora[0], head.lora[2], projection)
    rows, of_ids = Rows(x, flat, flat_temperature), None
    if ids is None:
        stats = logprobs_of_rows(rows, projection, ignore_index, names, backend)
    else:
        check_id_shape(ids, targets)
        some = ids.detach().reshape(len(flat), ids.shape[-1])
        stats, of_ids = logprobs_of_ids(rows, projection, ignore_index, some, names, backend)
        of_ids = of_ids.view(ids.shape)
    found = {name: stats[name].view(targets.shape) for name in names}
    return LogProbs(stats.logprobs.view(targets.shape), **found, id_logprobs=of_ids)


def _of_shards(
    entered: Gate, hidden: Tensor, head: Head, targets: Tensor, call: Call, outputs: Sequence[str], ids: Tensor | None
) -> LogProbs:
    """`linear_logprobs` with a process_group, or a streamed head."""
    projection, temperature = check_head(hidden, head, targets, call)
    names = check_outputs(outputs, WITHIN if call.samples else OUTPUTS)
    door, one = Door(), targets.new_zeros(targets.numel())
    flat_ids = None
    if ids is not None:
        _check_no_ids(ids, call)
        check_id_shape(ids, targets)
        flat_ids = ids.detach().reshape(targets.numel(), ids.shape[-1])
        check_ids(door, flat_ids, targets.reshape(-1) != call.ignore_index, call.ignore_index, ANY)
    tokens = tokens_of(door, targets, None, call, projection, temperature, one, 1)
    some, asked = pick(flat_ids, tokens.index), None
    if some is not None:
        asked = some != call.ignore_index
        some = some.masked_fill(~asked, 0)
    named = tokens.named if some is None else (some,)
    what = "logprobs", call.shared, None if some is None else some.shape
    rows = tokens.rows(hidden, head, projection)
    if head.stream is None:
        block = shard_block(
            rows, projection, tokens.sets, "two_phase", call.backend, tokenwise=False, entropy_term=False
        )
        shard = entered.through(projection, head, rows, what, names, named=named, block=block)
        projection = sharded(projection, shard)
    else:
        entered.together(hidden, projection, what, names)
    if call.samples:
        return _within_sets(rows, projection, tokens, targets, call, names)
    if some is None or asked is None or ids is None:
        stats = logprobs_of_rows(rows, projection, None, names, call.backend)
        return _laid_out(stats, names, tokens, targets)
    stats, of_ids = logprobs_of_ids(rows, projection, None, some, names, call.backend)
    of_ids = scatter(torch.where(asked, of_ids, 0.0), tokens.index, targets.numel())
    return _laid_out(stats, names, tokens, targets)._replace(id_logprobs=of_ids.view(ids.shape))


def _check_no_ids(ids: Tensor | None, call: Call) -> None:
    if call.samples and ids is not None:
        name = "truncation" if call.kept is None else "kept"
        raise ValueError(f"ids must be None with {name}: their log-probs are of the whole vocabulary; call once more")


def _met_in(group: Any, *weights: Tensor | Head | None) -> Any:
    """Where ranks meet: the group of a vocabulary-parallel head, or that by which a head is streamed; None: there is none."""
    streams = [weight.stream for weight in weights if isinstance(weight, Head) and weight.stream is not None]
    return private.process_group(streams[0].group) if group is None and streams else group


def _whole(weight: Any) -> Any:
    """Of a streamed head all rows, for what is not computed block by block; anything else as it is."""
    return weight.whole() if isinstance(weight, Head) else weight


def _within_sets(
    rows: Rows, head: Projection, tokens: Tokens, targets: Tensor, call: Call, names: tuple[str, ...]
) -> LogProbs:
    """`linear_logprobs` with kept or truncation."""
    if tokens.sets is None:  # a truncation that keeps everything
        inner = tuple(name for name in names if name != FULL)
        stats = logprobs_of_rows(rows, head, None, inner, call.backend)
        stats = Stats(stats.logprobs, stats.lse, {**stats.extra, FULL: stats.logprobs})
    else:
        stats = kept_statistics(rows, head, tokens.sets, names, call.backend)
    wanted = (*names, *((ADDED,) if ADDED in stats.extra else ()))
    return _laid_out(stats, wanted, tokens, targets)


def _laid_out(stats: Stats, names: tuple[str, ...], tokens: Tokens, targets: Tensor) -> LogProbs:
    """Statistics of tokens, in the shape of the targets."""
    some = {"logprobs": stats.logprobs} | {name: stats[name] for name in names}
    found = {name: scatter(values, tokens.index, targets.numel()) for name, values in some.items()}
    return LogProbs(**{name: values.view(targets.shape) for name, values in found.items()})


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor | Head,
    targets: Tensor,
    *,
    advantages: Tensor,
    objective: PolicyLoss,
    completion_mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | Head | None = None,
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
    lora: LoRA | tuple[Tensor, Tensor, float] | None = None,
    round_logits: bool = False,
    kept: Kept | None = None,
    truncation: Truncation | None = None,
    process_group: Any = None,
    hidden_grad: str = "sum",
) -> tuple[Tensor, Metrics]:
    """A policy objective of an LM head's log-probabilities, without the logits.

    Args:
        hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index, backend, lora, round_logits: as
            in `linear_logprobs`. hidden[..., t, :] predicts targets[..., t].
        advantages: (B,) one per sequence, or the shape of `targets`. Where a packed batch has as many tokens as
            sequences, such a vector is one per sequence.
        objective: e.g. `GRPO(beta=0.04)`.
        completion_mask: bool or 0 / 1 in the shape of `targets`; tokens outside it (and ignored targets) cost nothing.
        old_logprobs: the shape of `targets`, at the last rollout; None means on-policy (ratio 1, with its gradient).
        ref_logprobs: the shape of `targets`. They, or ref_hidden, must be given when objective.beta is not 0.
        sampling_logprobs: the shape of `targets`, as the sampler reported them, NaN where it did not; for
            objective.importance_sampling and objective.off_policy_mask_threshold.
        ref_hidden: the shape of `hidden`, of the reference model: its log-probs are computed here, without gradient,
            from ref_weight (V, H) and ref_bias (V,), by default `weight` and `bias` without `lora`, under the same
            transform; or from ref_weight as a `Head` of its own.
        cu_seqlens: (B + 1,) int, offsets of the sequences in a flat (N,) input; None there means one sequence.
        num_sequences, num_tokens: counts that normalise the loss; give the global ones when this is one micro-batch or
            rank of several. Default: those of this call.
        outputs: "entropy" adds it to the metrics; "full_logprobs", with kept or truncation, those of the untruncated ratio.
        mode: "one_pass" computes gradients together with the loss (three matrix products instead of four; under a
            frozen head two more than the forward, and any objective without entropy terms). It does not serve fp16,
            whose gradients would underflow before a loss scale reaches them, nor a trainable head with an objective
            that looks beyond a token (sequence level, entropy quantile ...). "two_phase" recomputes the logits in the
            backward; "auto" takes one_pass where gradients are wanted and it applies.
        kept, truncation: as in `linear_logprobs`: how the sampler cut its distribution. The ratio and the entropy are then
            those of what it kept, as old_logprobs must be; the KL compares whole distributions, as ref_logprobs must be.
        process_group, hidden_grad: as in `linear_logprobs`: `weight`, and `ref_weight`, are this rank's rows. Everything else
            must be the same on every rank. "one_pass" exchanges statistics once for each of its blocks of rows.

    Returns:
        loss (scalar, fp32; a differentiable 0 without tokens) and metrics (0-d, see `objectives.metrics.policy_metrics`;
        `fr.combine_metrics` merges those of several calls).

    Raises:
        ValueError, TypeError: as `linear_logprobs`; also contradictory arguments.
    """
    group = group_of(process_group, weight=weight, ref_weight=ref_weight)
    call = Call(temperature, ignore_index, backend, round_logits, 0.0, kept, truncation, group is not None)
    per_token = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampling_logprobs": sampling_logprobs}
    if call.samples:
        weight, ref_weight = _whole(weight), _whole(ref_weight)
    with gate(_met_in(group, weight, ref_weight), hidden_grad) as entered:
        head, door = head_of(weight, bias, logit_scale, softcap, lora), Door()
        projection, flat_temperature = check_head(hidden, head, targets, call)
        names = check_outputs(outputs, allowed=("entropy", *((FULL,) if call.samples else ())))
        reference = check_reference(hidden, head, projection, ref_logprobs, ref_hidden, ref_weight, ref_bias)
        sequence_of, count = check_policy(
            door, targets, objective, completion_mask, per_token, reference, advantages, cu_seqlens
        )
        check_mode(mode, hidden, projection, call, objective.tokenwise, objective.entropy_coef != 0)
        tokens = tokens_of(door, targets, completion_mask, call, projection, flat_temperature, sequence_of, count)
        num_sequences = check_count(
            "num_sequences", max(count, 1) if num_sequences is None else num_sequences, tokens.count
        )
        num_tokens = check_count("num_tokens", max(tokens.count, 1) if num_tokens is None else num_tokens, tokens.count)
        rows = tokens.rows(hidden, head, projection)
        given = [name for name, values in per_token.items() if values is not None]
        what = "policy", call.shared, objective, mode, given, reference is None
        if entered is not None and group is None:
            entered.together(hidden, projection, what, names)
        elif entered is not None:
            block = shard_block(
                rows, projection, tokens.sets, mode, backend, objective.tokenwise, objective.entropy_coef != 0
            )
            shard = entered.through(projection, head, rows, what, names, named=tokens.named, block=block)
            projection, reference = sharded(projection, shard), sharded_reference(reference, shard)
    vectors = {name: tokens.vector(values) for name, values in per_token.items()}
    if reference is not None:
        vectors["ref_logprobs"] = reference_logprobs(reference, tokens, backend)
    per_sequence = of_sequences(advantages, count)
    bound = objective.bind(
        advantages=tokens.of_sequences(advantages) if per_sequence else tokens.vector(advantages),
        sequences=tokens.sequences,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        per_sequence=per_sequence,
        **vectors,
    )
    loss, stats = execute(rows, projection, bound, names, mode, backend, tokens.sets)
    return loss, policy_metrics(
        bound, stats.logprobs.detach(), stats.entropy, stats.extra.get(FULL), stats.extra.get(ADDED)
    )


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor | Head,
    targets: Tensor,
    *,
    objective: PreferenceLoss,
    completion_mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | Head | None = None,
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
    lora: LoRA | tuple[Tensor, Tensor, float] | None = None,
    round_logits: bool = False,
    kept: Kept | None = None,
    truncation: Truncation | None = None,
    process_group: Any = None,
    hidden_grad: str = "sum",
) -> tuple[Tensor, Metrics]:
    """A preference objective of an LM head's log-probabilities, without the logits.

    The S sequences are P chosen completions followed by the P rejected ones in the same order (S = 2 P), or single
    completions with `labels` for an unpaired objective such as KTO.

    Args:
        hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index, backend, round_logits: as in
            `linear_logprobs`; (S, T, H), (V, H) and (S, T), or (N, H) and (N,) with cu_seqlens.
        objective: e.g. `DPO(beta=0.1)`.
        completion_mask: bool or 0 / 1 in the shape of `targets`; tokens outside it (and ignored targets) cost nothing.
        ref_logprobs: the reference's, in the shape of `targets`; or (S,), already summed over each completion, with the
            weights of objective.ld_alpha if it has one; where a packed batch has as many tokens as sequences they are
            sums. They, or ref_hidden, must be given where the objective compares with a reference, and must not be where
            it does not.
        ref_hidden, ref_weight, ref_bias: as in `linear_policy_loss`: the reference is computed here.
        labels: (S,) bool or 0 / 1, for unpaired objectives alone: whether a completion is desirable.
        kl: 0-d, >= 0, for KTO alone: the batch's KL to the reference; None is 0.
        cu_seqlens: (S + 1,) int, offsets of the sequences in a flat (N,) input, where it must be given.
        num_pairs: pairs (examples, where unpaired) that the mean is over; num_tokens: chosen tokens that the NLL is a
            mean over. Give the global counts when this is one micro-batch or rank of several. Default: of this call.
        outputs: of "entropy", "mean_logit", "is_top1": adds them to the metrics; "entropy" alone with kept or truncation.
        mode: as in `linear_policy_loss`; "one_pass" needs a frozen head.
        process_group, hidden_grad: as in `linear_policy_loss`.
        kept, truncation: as in `linear_logprobs`: how the completions' sampler cut its distribution. Log-probs are then those
            of what it kept, but for what is compared with a reference: both sides of that are of the whole vocabulary.

    Returns:
        loss (scalar, fp32) and metrics (0-d, see `objectives.metrics.preference_metrics`).

    Raises:
        ValueError, TypeError: as `linear_logprobs`; also contradictory arguments.
    """
    group = group_of(process_group, weight=weight, ref_weight=ref_weight)
    call = Call(temperature, ignore_index, backend, round_logits, 0.0, kept, truncation, group is not None)
    if call.samples:
        weight, ref_weight = _whole(weight), _whole(ref_weight)
    with gate(_met_in(group, weight, ref_weight), hidden_grad) as entered:
        head, door = head_of(weight, bias, logit_scale, softcap, lora), Door()
        projection, flat_temperature = check_head(hidden, head, targets, call)
        names = check_outputs(outputs, allowed=("entropy",) if call.samples else ("entropy", "mean_logit", "is_top1"))
        sequence_of, count, sums = check_preference(
            door, targets, objective, completion_mask, ref_logprobs, ref_hidden is not None, labels, kl, cu_seqlens
        )
        reference = check_reference(hidden, head, projection, ref_logprobs, ref_hidden, ref_weight, ref_bias)
        check_mode(mode, hidden, projection, call, tokenwise=False, entropy_term=False)
        tokens = tokens_of(door, targets, completion_mask, call, projection, flat_temperature, sequence_of, count)
        num_pairs = None if num_pairs is None else check_count("num_pairs", num_pairs, count)
        num_tokens = None if num_tokens is None else check_count("num_tokens", num_tokens, tokens.count)
        rows = tokens.rows(hidden, head, projection)
        what = "preference", call.shared, objective, mode, reference is None
        if entered is not None and group is None:
            entered.together(hidden, projection, what, names)
        elif entered is not None:
            block = shard_block(rows, projection, tokens.sets, mode, backend, tokenwise=False, entropy_term=False)
            shard = entered.through(projection, head, rows, what, names, named=tokens.named, block=block)
            projection, reference = sharded(projection, shard), sharded_reference(reference, shard)
    if reference is None:
        per_token = tokens.vector(ref_logprobs) if sums is None else None
    else:
        per_token = reference_logprobs(reference, tokens, backend)
    bound = objective.bind(
        sequences=tokens.sequences,
        ref_logprobs=per_token,
        ref_sums=sums,
        labels=None if labels is None else labels.bool(),
        kl=None if kl is None else kl.detach().to(tokens.temperature.dtype),
        num_pairs=num_pairs,
        num_tokens=num_tokens,
        dtype=tokens.temperature.dtype,
    )
    loss, stats = execute(rows, projection, bound, names, mode, backend, tokens.sets)
    extra = {name: stats.extra.get(name) for name in ("entropy", "mean_logit", "is_top1")}
    full, added = stats.extra.get(FULL), stats.extra.get(ADDED)
    return loss, preference_metrics(bound, stats.logprobs.detach(), **extra, full=full, added=added)


def linear_kl(
    hidden: Tensor,
    weight: Tensor | Head,
    ref_hidden: Tensor,
    ref_weight: Tensor | Head,
    kind: Kind = "forward",
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    beta: float = 0.5,
    backend: str = "auto",
    process_group: Any = None,
    hidden_grad: str = "sum",
) -> Tensor:
    """Divergence of a policy from a reference over the whole vocabulary, token by token, without the logits of either.

    With p the policy's probabilities and q the reference's: "forward" is KL(q || p), "reverse" KL(p || q), "jsd"
    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p, in nats (arXiv:2306.13649). Liger and TRL call
    forward beta = 0 and reverse beta = 1 of that family, a convention: "jsd" itself tends to 0 at both ends. 0 log 0 is 0,
    as in the columns of a vocabulary padded by a bias of -inf. Values are accurate where p is close to q, never negative
    beyond rounding, and exactly 0 where both heads get the same input.

    Args:
        hidden: (N, H) or (B, T, H); bf16, fp16, fp32 or fp64. weight: (V, H). The policy's.
        ref_hidden: (N, H') or (B, T, H'), of the same rows. ref_weight: (V, H'). They take no gradient, whatever they are.
            Either weight may be a `Head`, which brings its own bias, scale, softcap and adapter.
        mask: bool or 0 / 1, (N,) or (B, T): rows outside it cost nothing, whatever they hold, and give 0.
        bias, ref_bias: (V,) or None.
        temperature: of both, one positive number or one per row. Not differentiable.
        logit_scale, softcap; ref_logit_scale, ref_softcap: as in `linear_logprobs`, of each head its own.
        beta: in (0, 1), weight of the reference in "jsd"; for no other kind.
        backend: as in `linear_logprobs`. "triton" and "chunked" hold fp32 logits of both heads for a block of rows, of
            1 GiB and 320 MiB together; "reference" holds them all.
        process_group, hidden_grad: as in `linear_logprobs`: both weights are this rank's rows, of the same columns.

    Returns:
        fp32 (fp64 for fp64 inputs), of the rows' shape; differentiable in hidden, weight and bias, once. Repeatable to the
        bit. Rows whose upstream gradient is exactly zero are skipped in the backward. torch.compile breaks its graph here.

    Raises:
        ValueError, TypeError: as `linear_logprobs`; heads whose vocabularies differ.
        RuntimeError: backend "triton" where it cannot run: without a GPU, or on fp64 operands.
    """
    group = group_of(process_group, weight=weight, ref_weight=ref_weight)
    call = Call(temperature, backend=backend, sharded=group is not None)
    with gate(_met_in(group, weight, ref_weight), hidden_grad) as entered:
        head = head_of(weight, bias, logit_scale, softcap)
        ref = head_of(ref_weight, ref_bias, ref_logit_scale, ref_softcap, prefix="ref_")
        door = Door()
        of, flat_temperature = check_divergence(door, hidden, head, ref_hidden, ref, kind, beta, mask, call)
        live = None if mask is None else mask.reshape(-1).bool()
        if isinstance(temperature, Tensor):
            check_temperature(door, flat_temperature, live)
        index = door.rows(live)
        x, y = (pick(h.reshape(-1, h.shape[-1]), index) for h in (hidden, ref_hidden))
        if head.lora is not None:
            x = with_adapter(x, head.lora[0], head.lora[2], of.policy)
        if ref.lora is not None:
            y = with_adapter(y, ref.lora[0], ref.lora[2], of.ref)
        pairs = RowPairs(x, y.detach(), pick(flat_temperature, index))
        what = "kl", call.shared, kind, beta, of.ref.transform, of.ref.compute_dtype
        if entered is not None and group is None:
            entered.together(hidden, of.policy, *what)
            of = comparable(of)
        elif entered is not None:
            anything = torch.zeros(pairs.count, dtype=torch.int64, device=hidden.device)
            rows = Rows(x, anything, pairs.temperature)
            shard = entered.through(of.policy, head, rows, what, block=divergence_block(pairs, of, backend))
            of = replace(of, policy=sharded(of.policy, shard), ref=sharded(of.ref, shard))
    values = divergence(pairs, of, backend)
    return scatter(values, index, flat_temperature.numel()).view(hidden.shape[:-1])
