"""The definition of correct: dense, obvious, any floating dtype (fp64 too).

Everything is written on the whole `[N, V]` matrix of logits. Operands are rounded to `head.compute_dtype`, products and
logits are fp32 (fp64 when that is the compute dtype); gradients are the closed forms in `kernels/interface.py`, those of a
divergence autograd's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

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


def logits(hidden: Tensor, head: Projection, temperature: Tensor) -> Tensor:
    """(N, V)"""
    u = hidden.to(head.compute_dtype).to(head.wide) @ head.rows(EVERYTHING).to(head.wide).T
    if head.bias is not None:
        u = u + head.bias.to(head.wide)
    return head.transform.apply(u * head.transform.logit_scale, temperature.to(head.wide))


def log_softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """(N, V) log-probabilities, whatever offset the logits have in common, and (N,) lse."""
    maximum = z.amax(-1)
    depth = z - reference_of(maximum)[:, None]
    log_total = depth.exp().sum(-1).log()
    return depth - log_total[:, None], reference_of(maximum) + log_total


def partials(rows: Rows, head: Projection, outputs: tuple[str, ...]) -> ShardStats:
    return ShardStats(Partials.of(logits(rows.hidden, head, rows.temperature), rows.targets, outputs))


def filter_columns(device: torch.device) -> int:
    return 0  # nothing is left out here, whatever the filter


def statistics(rows: Rows, head: Projection, outputs: tuple[str, ...]) -> Stats:
    z = logits(rows.hidden, head, rows.temperature)
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
    z = logits(rows.hidden, head, rows.temperature)
    temperature = rows.temperature.to(z.dtype)
    log_p = z - stats.lse[:, None]
    p = log_p.exp()
    zero = torch.zeros_like(stats.lse)
    g, h, k = ((zero if grad is None else grad.to(z.dtype))[:, None] for grad in upstream)
    dz = (k - g) * p
    here = ((rows.targets >= 0) & (rows.targets < z.shape[1]))[:, None]  # of a shard's rows, some targets lie elsewhere
    dz.scatter_add_(1, rows.targets.clamp(0, z.shape[1] - 1)[:, None], torch.where(here, g, 0.0))
    if upstream.entropy is not None:
        assert stats.entropy is not None
        dz = dz - h * p * torch.where(p == 0, 0.0, log_p + stats.entropy[:, None])
    du = dz / temperature[:, None]
    slope = head.transform.slope(z, temperature)
    if slope is not None:
        du = du * slope
    du = du * head.transform.logit_scale

    sink = head.sink(needs, head.vocabulary, direct=False)
    block = sink.open(slice(0, head.vocabulary))
    x, parts = head.split(rows.hidden.to(head.compute_dtype).to(z.dtype))
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
    d_hidden = (du @ head.rows(EVERYTHING).to(z.dtype)).to(rows.hidden.dtype) if needs.hidden else None
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
    return logits(entries.hidden, head, entries.temperature)[entries.rows, entries.ids]


def gathered_hidden(grads: EntryGrads, head: Projection) -> Tensor:
    return (_dense(grads, head) @ head.rows(EVERYTHING).to(head.wide)).to(grads.entries.hidden.dtype)


def truncated(rows: Rows, head: Projection, cut: Cut, outputs: tuple[str, ...], whole: bool) -> KeptSets:
    """Every set by its tokens, from whole rows in order."""
    z = logits(rows.hidden, head, rows.temperature)
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
    rows: Rows, head: Projection, outputs: tuple[str, ...], objective: BoundObjective, needs: Needs
) -> tuple[Stats, Tensor, Grads]:
    stats = statistics(rows, head, outputs)
    contributions, upstream = loss(objective, stats.logprobs, stats.entropy)
    return stats, contributions, gradients(rows, head, stats, upstream, needs)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    return (a * (log_a - log_b).masked_fill(a == 0, 0.0)).sum(-1)


def _divergence(rows: RowPairs, of: Comparison) -> Tensor:
    """(N,), on both heads' whole logits."""
    log_p = torch.log_softmax(logits(rows.hidden, of.policy, rows.temperature), -1)
    with torch.no_grad():
        log_q = torch.log_softmax(logits(rows.ref_hidden, of.ref, rows.temperature), -1)
    if of.kind == "forward":
        return _kl(log_q, log_p)
    if of.kind == "reverse":
        return _kl(log_p, log_q)
    beta = log_p.new_full((), of.beta)
    floor = torch.finfo(log_p.dtype).min / 4  # -inf in both would make the gradient of logaddexp a NaN
    log_m = torch.logaddexp(log_q.clamp(min=floor) + beta.log(), log_p.clamp(min=floor) + (1 - beta).log())
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    on_cpu = factor.device.type == "cpu"  # elsewhere to look would be to wait
    return gradient if on_cpu and factor == 1 else gradient.mul_(factor)


def has_normaliser() -> bool:
    return False


def divergence(rows: RowPairs, of: Comparison) -> tuple[Tensor, Sums]:
    nothing = torch.zeros_like(rows.temperature)  # the gradient is taken from the definition once more
    with torch.no_grad():
        return _divergence(rows, of), Sums(nothing, nothing, nothing, nothing)


def divergence_gradients(rows: RowPairs, of: Comparison, sums: Sums, upstream: Tensor, needs: Needs) -> Grads:
    policy = of.policy
    with torch.enable_grad():
        hidden, weight, bias, lora_b = leaves = tuple(
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip((rows.hidden, policy.weight, policy.bias, policy.lora_b), needs)
        )
        assert hidden is not None
        assert weight is not None
        head = replace(policy, weight=weight, bias=bias, lora_b=lora_b)
        values = _divergence(replace(rows, hidden=hidden), replace(of, policy=head))
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(values, wanted, upstream.to(values.dtype)))
    return Grads(*(next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves))


def one_pass_pays(rows: Rows, head: Projection, needs: Needs) -> bool:
    return True


def memory(work: Work) -> float:
    """Logits, probabilities and their gradient, whole."""
    heads = 2 if work.route == "divergence" else 1
    copies = heads * (2 if work.route == "forward" else 3)
    itemsize = max(work.dtype.itemsize, 4)
    return copies * float(itemsize) * work.rows * work.vocabulary + work.gradients
