"""Errors of one run against fp64: every value, the loss, and samples of the gradients.

With g and e the gradients of the loss by a token's value and entropy, and p from the fp64 logsumexp,

    log-prob   dz_v = g (1[v = y] - p_v) - e p_v (log p_v + H)         KL to q   dz_v = g p_v (log p_v - log q_v - KL)

and dX[n] = sum_v dz_nv W[v], dW[v] = sum_n dz_nv X[n].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rlhf.bench import objectives
from fused_rlhf.bench.inputs import Inputs, Reference, blocks, order
from fused_rlhf.bench.ops import OPS, Values


@dataclass
class _Truth:
    """What dz needs, (N,) or (N, H) each."""

    inputs: Inputs
    known: Reference
    g: Tensor
    e: Tensor | None

    def d_logits(self, rows: Tensor, start: int, w: Tensor, x: Tensor) -> Tensor:
        """(n, v) of these rows and of the columns from `start`, whose rows of W are w (v, H); x (n, H)."""
        log_p = x @ w.T - self.known.lse[rows, None]
        p, g = log_p.exp(), self.g[rows, None]
        if OPS[self.inputs.case.op].values == "kl":
            assert self.inputs.ref_hidden is not None
            log_q = self.inputs.ref_hidden[rows].double() @ w.T - self.known.ref_lse[rows, None]
            return g * p * (log_p - log_q - self.known.kl[rows, None])
        dz = -g * p
        if self.e is not None:
            dz -= self.e[rows, None] * p * (log_p + self.known.entropy[rows, None])
        inside = self.inputs.targets[rows] - start
        hit = (inside >= 0) & (inside < len(w))
        return dz.scatter_add_(1, inside.clamp(0, len(w) - 1)[:, None], torch.where(hit[:, None], g, 0.0))


def errors(
    inputs: Inputs, reference: Reference, loss: Tensor | None, found: Values | None, samples: int = 64
) -> dict[str, float]:
    """`ratio_off` is the share of tokens whose policy ratio, exp of the log-prob's error, is off by more than 1 %.

    Gradients are read from `.grad` of the inputs: `samples` to 2 x `samples` rows of dX and 3 x `samples` of dW.
    """
    case, device = inputs.case, inputs.hidden.device
    op, index = OPS[case.op], order(case, str(device))
    known = Reference(*(r[index] for r in reference))
    values = (known.kl if op.values == "kl" else known.logprobs).clone().requires_grad_()
    entropy = known.entropy.clone().requires_grad_() if op.entropy else None
    result: dict[str, float] = {}
    if found is not None:
        name = "kl" if op.values == "kl" else "logprob"
        result[f"{name}_max_abs"] = _largest(found.values, values, inputs.mask)
        if name == "logprob":
            off = _differences(found.values, values, inputs.mask)
            result["logprob_mean_abs"] = off.abs().mean().item()
            result["ratio_off"] = (off.expm1().abs() > 0.01).double().mean().item()
        if found.entropy is not None and entropy is not None:
            result["entropy_max_abs"] = _largest(found.entropy, entropy, inputs.mask)
    loss_of = objectives.loss_of(case)
    if loss_of is None:
        return result
    true_loss = loss_of(Values(values, entropy), inputs)
    g, *rest = torch.autograd.grad(true_loss, [v for v in (values, entropy) if v is not None])
    if loss is not None:
        result["loss_abs"] = (loss.detach().double() - true_loss.detach()).abs().item()
        # The error of the values, the same in all of them, that would explain it.
        result["loss_per_nat"] = result["loss_abs"] / max(g.abs().sum().item(), 0.1)

    truth = _Truth(inputs, known, g, rest[0] if rest else None)
    weight, hidden = inputs.weight.detach(), inputs.hidden.detach()
    live = g.nonzero().squeeze(1)
    rows = torch.cat([_spread(case.N, samples, device), live[_spread(len(live), samples, device)]]).unique()
    x = hidden[rows].double()
    d_x = torch.zeros_like(x)
    for start, w in blocks(weight):
        d_x += truth.d_logits(rows, start, w, x) @ w
    result |= _distance("dhidden", inputs.hidden.grad, rows, d_x)
    if inputs.weight.requires_grad:
        columns = torch.cat([inputs.targets[rows], _spread(case.V, samples, device)]).unique()
        result |= _distance("dweight", inputs.weight.grad, columns, _d_weight(truth, columns, weight, hidden))
    return result


def _d_weight(truth: _Truth, columns: Tensor, weight: Tensor, hidden: Tensor) -> Tensor:
    """(columns, H)"""
    w = weight[columns].double()
    targets = truth.inputs.targets
    # `columns` is sorted: where each target stands in it, if it does.
    place = torch.searchsorted(columns, targets).clamp(max=len(columns) - 1)
    place = torch.where(columns[place] == targets, place, -1)
    local = _Truth(_with_targets(truth.inputs, place), truth.known, truth.g, truth.e)
    found = torch.zeros(len(columns), hidden.shape[1], dtype=torch.float64, device=hidden.device)
    for rows in torch.arange(len(hidden), device=hidden.device).split(2048):
        x = hidden[rows].double()
        found += local.d_logits(rows, 0, w, x).T @ x
    return found


def _with_targets(inputs: Inputs, targets: Tensor) -> Inputs:
    return Inputs(**{**vars(inputs), "targets": targets})


def _spread(count: int, samples: int, device: torch.device) -> Tensor:
    return torch.linspace(0, count - 1, min(samples, count), device=device).long()


def _largest(found: Tensor, truth: Tensor, mask: Tensor) -> float:
    return _differences(found, truth, mask).abs().max().item()


def _differences(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    return (found.detach().double() - truth.detach())[mask]


def _distance(name: str, grad: Tensor | None, rows: Tensor, truth: Tensor) -> dict[str, float]:
    if grad is None:
        raise RuntimeError(f"no gradient arrived for {name}")
    difference = grad[rows].double() - truth
    return {
        f"{name}_rel": (difference.norm() / truth.norm().clamp_min(1e-300)).item(),
        f"{name}_max_abs": difference.abs().max().item(),
    }
