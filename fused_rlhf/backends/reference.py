"""The definition of correct: dense, obvious, any floating dtype (fp64 too).

Everything is written on the whole `[N, V]` matrix of logits. Operands are rounded to `head.compute_dtype`, products and
logits are fp32 (fp64 when that is the compute dtype); gradients are the closed forms in `kernels/interface.py` and
`fused_rlhf.op.divergence`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_rlhf.backends.truncation import outside
from fused_rlhf.kernels.interface import (
    BlockGrads,
    Border,
    BoundObjective,
    Comparison,
    Cut,
    Entries,
    EntryGrads,
    Grads,
    KeptSets,
    Merge,
    MergeTotals,
    Needs,
    Projection,
    RowPairs,
    Rows,
    ShardStats,
    Stats,
    Sums,
    TokenGrads,
    Work,
)
from fused_rlhf.kernels.statistics import STATISTICS, Partials, reference_of

EVERYTHING = slice(None)


def _logits(hidden: Tensor, head: Projection, temperature: Tensor) -> Tensor:
    """(N, V)"""
    u = hidden.to(head.compute_dtype).to(head.wide) @ head.rows(EVERYTHING).to(head.wide).T
    if head.bias is not None:
        u = u + head.bias.to(head.wide)
    return head.transform.apply(u * head.transform.logit_scale, temperature.to(head.wide))


def logits(rows: Rows, head: Projection) -> Tensor:
    return _logits(rows.hidden, head, rows.temperature)


def truncation_block(rows: Rows, head: Projection) -> int:
    return rows.count


def log_softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """(N, V) log-probabilities, whatever offset the logits have in common, and (N,) lse."""
    maximum = z.amax(-1)
    depth = z - reference_of(maximum)[:, None]
    log_total = depth.exp().sum(-1).log()
    return depth - log_total[:, None], reference_of(maximum) + log_total


def partials(rows: Rows, head: Projection, outputs: tuple[str, ...]) -> ShardStats:
    return ShardStats(Partials.of(_logits(rows.hidden, head, rows.temperature), rows.targets, outputs))


def filter_columns(device: torch.device) -> int:
    return 0  # nothing is left out here, whatever the filter


def statistics(rows: Rows, head: Projection, outputs: tuple[str, ...]) -> Stats:
    z = _logits(rows.hidden, head, rows.temperature)
    log_p, lse = log_softmax(z)
    found = {name: STATISTICS[name].define(z, log_p, lse, rows.targets) for name in ("lse", *outputs)}
    return Stats.of(log_p.gather(-1, rows.targets[:, None]).squeeze(-1), found)


def gradients(
    rows: Rows,
    head: Projection,
    stats: Stats,
    upstream: TokenGrads,
    needs: Needs,
    filtered: tuple[Tensor, ...] | None = None,
    entries: EntryGrads | None = None,
) -> Grads:
    z = _logits(rows.hidden, head, rows.temperature)
    temperature = rows.temperature.to(z.dtype)
    log_p = z - stats.lse[:, None]
    if rows.border is not None:
        log_p = log_p.masked_fill(outside(z, slice(0, z.shape[1]), rows.targets, rows.border), -torch.inf)
    p = log_p.exp()
    zero = torch.zeros_like(stats.lse)
    g, h, k, s, m = ((zero if grad is None else grad.to(z.dtype))[:, None] for grad in upstream)
    dz = (k - g) * p + m / head.all_columns
    here = ((rows.targets >= 0) & (rows.targets < z.shape[1]))[:, None]  # of a shard's rows, some targets lie elsewhere
    dz.scatter_add_(1, rows.targets.clamp(0, z.shape[1] - 1)[:, None], torch.where(here, g, 0.0))
    if upstream.entropy is not None:
        assert stats.entropy is not None
        dz = dz - h * p * torch.where(p == 0, 0.0, log_p + stats.entropy[:, None])
    if upstream.sum_sq is not None:
        dz = dz + 2 * s * p * (p - stats["sum_sq"][:, None])
    return _through_head(dz, z, rows.hidden, temperature, head, needs, entries)


def _through_head(
    dz: Tensor,
    z: Tensor,
    hidden: Tensor,
    temperature: Tensor,
    head: Projection,
    needs: Needs,
    entries: EntryGrads | None = None,
) -> Grads:
    """From (N, V): dloss / dlogits."""
    du = dz / temperature[:, None]
    slope = head.transform.slope(z, temperature)
    if slope is not None:
        du = du * slope
    du = du * head.transform.logit_scale

    sink = head.sink(needs, head.vocabulary, direct=False)
    block = sink.open(slice(0, head.vocabulary))
    x, parts = head.split(hidden.to(head.compute_dtype).to(z.dtype))
    if block.weight is not None:
        block.weight.copy_(du.T @ x)
    if block.bias is not None:
        block.bias += du.sum(0)
    if block.lora is not None:
        block.lora += du.T @ sum(parts)
    block.fresh = False
    if entries is not None:
        _add_entries(block, entries, head)
    sink.close(block)
    d_hidden = (du @ head.rows(EVERYTHING).to(z.dtype)).to(hidden.dtype) if needs.hidden else None
    return sink.grads(d_hidden)


def _dense(grads: EntryGrads, head: Projection) -> Tensor:
    """(N, V): dloss by the products."""
    entries = grads.entries
    du = torch.zeros(len(entries.hidden), head.vocabulary, dtype=head.wide, device=entries.ids.device)
    return du.index_put_((entries.rows, entries.ids), grads.products(head), accumulate=True)


def _add_entries(block: BlockGrads, grads: EntryGrads, head: Projection) -> None:
    du = _dense(grads, head)
    x, parts = head.split(grads.entries.hidden.to(head.compute_dtype).to(head.wide))
    if block.weight is not None:
        block.weight += du.T @ x
    if block.bias is not None:
        block.bias += du.sum(0)
    if block.lora is not None:
        block.lora += du.T @ sum(parts)


def gathered(entries: Entries, head: Projection) -> Tensor:
    return _logits(entries.hidden, head, entries.temperature)[entries.rows, entries.ids]


def gathered_hidden(grads: EntryGrads, head: Projection) -> Tensor:
    return (_dense(grads, head) @ head.rows(EVERYTHING).to(head.wide)).to(grads.entries.hidden.dtype)


def truncated(rows: Rows, head: Projection, cut: Cut, outputs: tuple[str, ...], whole: bool) -> KeptSets:
    """Every set by its tokens, from whole rows in order."""
    z = _logits(rows.hidden, head, rows.temperature)
    kept = kept_columns(z, cut)
    at = torch.arange(rows.count, device=z.device), rows.targets
    added = ~kept[at]
    kept[at] = True
    row, ids = kept.nonzero(as_tuple=True)
    none = rows.pick(slice(0, 0))
    border = Border(none.temperature, none.targets)
    stats = Stats.of(none.temperature, dict.fromkeys(("lse", *outputs), none.temperature))
    of_all = statistics(rows, head, ()) if whole else None
    return KeptSets(row, ids, none.targets, border, stats, added, of_all)


def kept_columns(z: Tensor, cut: Cut) -> Tensor:
    """(N, V) bool, by the definitions, from sorted rows."""
    order = z.sort(dim=1, stable=True).indices  # ascending, of equals the earlier column first
    place = torch.arange(z.shape[1], device=z.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)

    def by_count(kept: Tensor) -> Tensor:
        if cut.top_k is None:
            return kept
        k = torch.where(cut.top_k > 0, cut.top_k, z.shape[1]).clamp(max=z.shape[1])[:, None]
        within = z.masked_fill(~kept, -torch.inf)
        return kept & (within >= within.sort(dim=1).values.gather(1, z.shape[1] - k))

    def by_peak(kept: Tensor) -> Tensor:
        if cut.min_p is None:
            return kept
        return kept & ((z - z.amax(1, keepdim=True)).exp() >= cut.min_p[:, None])

    def by_mass(kept: Tensor) -> Tensor:
        if cut.top_p is None:
            return kept
        p = z.masked_fill(~kept, -torch.inf).softmax(1)
        upto = p.gather(1, order).cumsum(1).gather(1, rank)  # from the smallest upwards, this one included
        beyond = (upto <= (1 - cut.top_p)[:, None]) & (cut.top_p < 1)[:, None]
        return kept & ~(beyond & (rank < z.shape[1] - 1))

    everything = torch.ones_like(z, dtype=torch.bool)
    if cut.min_p_first:
        return by_mass(by_count(by_peak(everything)))
    return by_peak(by_mass(by_count(everything)))


def loss(objective: BoundObjective, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
    return objective(slice(0, logprobs.numel()), logprobs, entropy)


def one_pass(
    rows: Rows,
    head: Projection,
    outputs: tuple[str, ...],
    objective: BoundObjective,
    needs: Needs,
    merge: Merge | None = None,
) -> tuple[Stats, Tensor, Grads]:
    if merge is None:
        stats = statistics(rows, head, outputs)
    else:
        stats = merge(partials(rows, head, outputs), slice(0, rows.count), outputs)
    contributions, upstream = loss(objective, stats.logprobs, stats.entropy)
    return stats, contributions, gradients(rows, head, stats, upstream, needs)


def one_pass_block(rows: Rows, head: Projection, needs: Needs) -> int:
    return rows.count


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    return gradient.mul_(factor)


def has_normaliser() -> bool:
    return False


def divergence(rows: RowPairs, of: Comparison, merge: MergeTotals | None = None) -> tuple[Tensor, Sums]:
    z, r = _both_logits(rows, of)
    totals = torch.stack([*_total(z), *_total(r)], 1)
    maximum, total, ref_maximum, ref_total = (totals if merge is None else merge(totals)).unbind(1)
    log_p, log_q = (z - maximum[:, None]) - total.log()[:, None], (r - ref_maximum[:, None]) - ref_total.log()[:, None]
    shift = (maximum - ref_maximum) + (total.log() - ref_total.log())
    sums = Sums(maximum + total.log(), ref_maximum + ref_total.log(), shift, torch.zeros_like(shift))
    if of.kind == "forward":
        return _kl(log_q, log_p), sums
    if of.kind == "reverse":
        value = _kl(log_p, log_q)
        return value, sums._replace(mean=value)
    log_m = _mixture(log_p, log_q, of.beta)
    of_p = (1 - of.beta) * _kl(log_p, log_m)
    return of.beta * _kl(log_q, log_m) + of_p, sums._replace(mean=of_p)


def divergence_block(rows: RowPairs, of: Comparison) -> int:
    return len(rows.hidden)


def divergence_gradients(rows: RowPairs, of: Comparison, sums: Sums, upstream: Tensor, needs: Needs) -> Grads:
    z, r = _both_logits(rows, of)
    log_p, log_q = z - sums.lse[:, None], r - sums.ref_lse[:, None]
    p = log_p.exp()
    if of.kind == "forward":
        dz = p - log_q.exp()
    else:
        over = log_q if of.kind == "reverse" else _mixture(log_p, log_q, of.beta)
        score = (log_p - over) * (1 if of.kind == "reverse" else 1 - of.beta)
        dz = p * (score - sums.mean[:, None]).masked_fill(p == 0, 0.0)
    dz = dz * upstream.to(z.dtype)[:, None]
    return _through_head(dz, z, rows.hidden, rows.temperature.to(z.dtype), of.policy, needs)


def _both_logits(rows: RowPairs, of: Comparison) -> tuple[Tensor, Tensor]:
    return _logits(rows.hidden, of.policy, rows.temperature), _logits(rows.ref_hidden, of.ref, rows.temperature)


def _total(z: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum exp(z - maximum), (N,)."""
    maximum = z.amax(1)
    return maximum, (z - reference_of(maximum)[:, None]).exp().sum(1)


def _mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log m, -inf where both are."""
    return torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    return (a * (log_a - log_b).masked_fill(a == 0, 0.0)).sum(-1)


def one_pass_pays(rows: Rows, head: Projection, needs: Needs) -> bool:
    return True


def memory(work: Work) -> float:
    """Logits, probabilities and their gradient, whole."""
    heads = 2 if work.route == "divergence" else 1
    copies = heads * (2 if work.route == "forward" else 3)
    itemsize = max(work.dtype.itemsize, 4)
    return copies * float(itemsize) * work.rows * work.vocabulary + work.gradients
