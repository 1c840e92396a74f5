"""The definition of correct: dense, obvious, any floating dtype (fp64 too).

Everything is written on the whole `[N, V]` matrix of logits. Operands are rounded to `head.compute_dtype`, products and
logits are fp32 (fp64 when that is the compute dtype); gradients are the closed forms in `kernels/interface.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_rlhf.kernels.interface import BoundObjective, Grads, Head, Needs, Stats, TokenGrads


def logits(hidden: Tensor, head: Head, temperature: Tensor) -> Tensor:
    wide = torch.promote_types(head.compute_dtype, torch.float32)
    u = hidden.to(head.compute_dtype).to(wide) @ head.rows(slice(None)).to(wide).T
    if head.bias is not None:
        u = u + head.bias.to(wide)
    u = u * head.logit_scale
    if head.softcap is not None:
        u = head.softcap * torch.tanh(u / head.softcap)
    return u / temperature.to(wide)[:, None]


def _stats(z: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Stats:
    lse = torch.logsumexp(z, dim=-1)
    p = torch.exp(z - lse[:, None])
    target_logits = z.gather(-1, targets[:, None]).squeeze(-1)
    # p z is 0 where a logit is -inf, as for the columns of a padded vocabulary.
    pz = torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, z))
    return Stats(
        logprobs=target_logits - lse,
        lse=lse,
        entropy=lse - pz.sum(-1) if "entropy" in outputs else None,
        sum_sq=(p * p).sum(-1) if "sum_sq" in outputs else None,
        mean_logit=z.mean(-1) if "mean_logit" in outputs else None,
        is_top1=z.argmax(-1) == targets if "is_top1" in outputs else None,
    )


def mass_blocks(vocabulary: int, device: torch.device) -> int:
    return 0  # nothing is left out here, whatever the filter


def forward(hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor, outputs: tuple[str, ...]) -> Stats:
    return _stats(logits(hidden, head, temperature), targets, outputs)


def backward(
    hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor, stats: Stats, grads: TokenGrads, needs: Needs
) -> Grads:
    z = logits(hidden, head, temperature)
    log_p = z - stats.lse[:, None]
    p = log_p.exp()
    zero = torch.zeros_like(stats.lse)
    g, h, k = ((zero if grad is None else grad.to(z.dtype))[:, None] for grad in grads)
    dz = (k - g) * p
    dz.scatter_add_(1, targets[:, None], g)
    if grads.entropy is not None:
        assert stats.entropy is not None
        dz = dz - h * p * torch.where(p == 0, 0.0, log_p + stats.entropy[:, None])
    du = dz / temperature.to(z.dtype)[:, None]
    if head.softcap is not None:
        du = du * (1 - (z * temperature.to(z.dtype)[:, None] / head.softcap).square())
    du = du * head.logit_scale
    x, parts = head.split(hidden.to(head.compute_dtype).to(z.dtype))
    return Grads(
        (du @ head.rows(slice(None)).to(z.dtype)).to(hidden.dtype) if needs.hidden else None,
        (du.T @ x).to(head.weight.dtype) if needs.weight else None,
        du.sum(0).to(head.bias.dtype) if needs.bias and head.bias is not None else None,
        (du.T @ sum(parts)).to(head.lora_b.dtype) if needs.lora and head.lora_b is not None else None,
    )


def evaluate(objective: BoundObjective, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
    return objective(slice(0, logprobs.numel()), logprobs, entropy)


def one_pass(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: Tensor,
    outputs: tuple[str, ...],
    objective: BoundObjective,
    needs: Needs,
) -> tuple[Stats, Tensor, Grads]:
    stats = forward(hidden, head, targets, temperature, outputs)
    loss, grads = objective(slice(0, hidden.shape[0]), stats.logprobs, stats.entropy)
    return stats, loss, backward(hidden, head, targets, temperature, stats, grads, needs)
