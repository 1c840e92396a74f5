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
    BoundObjective,
    Comparison,
    Grads,
    Needs,
    Projection,
    RowPairs,
    Rows,
    Stats,
    Sums,
    TokenGrads,
    Work,
)
from fused_rlhf.kernels.statistics import STATISTICS, reference_of

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
) -> Grads:
    z = logits(rows.hidden, head, rows.temperature)
    temperature = rows.temperature.to(z.dtype)
    log_p = z - stats.lse[:, None]
    p = log_p.exp()
    zero = torch.zeros_like(stats.lse)
    g, h, k = ((zero if grad is None else grad.to(z.dtype))[:, None] for grad in upstream)
    dz = (k - g) * p
    dz.scatter_add_(1, rows.targets[:, None], g)
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
    sink.close(block)
    d_hidden = (du @ head.rows(EVERYTHING).to(z.dtype)).to(rows.hidden.dtype) if needs.hidden else None
    return sink.grads(d_hidden)


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
