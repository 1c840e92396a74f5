"""Errors of one run against fp64: every value, the loss, and samples of the gradients.

With g and e the gradients of the loss by a token's value and entropy, and p from the fp64 logsumexp,

    log-prob   dz_v = g (1[v = y] - p_v) - e p_v (log p_v + H)         KL to q   dz_v = g p_v (log p_v - log q_v - KL)

and dX[n] = sum_v dz_nv W[v], dW[v] = sum_n dz_nv X[n]. Where some of the tokens are kept, p is over these and zero elsewhere;
where the mean of K further tokens' log-probs is added, dz_v gains g (count_v / K - p_v).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        op, inputs = OPS[self.inputs.case.op], self.inputs
        z = x @ w.T
        log_p = z - self.known.kept_lse[rows, None]
        p, g = log_p.exp(), self.g[rows, None]
        if op.values == "kl":
            assert inputs.ref_hidden is not None
            log_q = inputs.ref_hidden[rows].double() @ w.T - self.known.ref_lse[rows, None]
            return g * p * (log_p - log_q - self.known.kl[rows, None])
        hits = _counts(inputs.targets[rows, None], start, len(w))
        given = None if inputs.ids is None else _counts(inputs.ids[rows], start, len(w))
        p[(z < self.known.floor[rows, None]) & (hits == 0)] = 0.0
        if given is not None and not op.whole:
            p[given == 0] = 0.0
        dz = g * (hits - p)
        if given is not None and op.whole:
            dz += g * (given / op.ids - p)
        if self.e is not None:
            dz -= self.e[rows, None] * p * (log_p + self.known.entropy[rows, None])
        return dz


def _counts(tokens: Tensor, start: int, width: int) -> Tensor:
    """(n, width): how often the columns from `start` on are among the tokens (n, K)."""
    inside = tokens - start
    here = (inside >= 0) & (inside < width)
    found = torch.zeros(len(tokens), width, dtype=torch.float64, device=tokens.device)
    return found.scatter_add_(1, inside.clamp(0, width - 1), here.double())


def errors(
    inputs: Inputs, reference: Reference, loss: Tensor | None, found: Values | None, samples: int = 64
) -> dict[str, float]:
    """`ratio_off` is the share of tokens whose policy ratio, exp of the log-prob's error, is off by more than 1 %.

    `unsettled` is the share whose kept set rounding decides: they are not compared.

    Gradients are read from `.grad` of the inputs: `samples` to 2 x `samples` rows of dX and 3 x `samples` of dW, 5 x where
    tokens are given by their ids.
    """
    case, device = inputs.case, inputs.hidden.device
    op, index = OPS[case.op], order(case, str(device))
    known = Reference(*(r[index] for r in reference))
    truth_of = {"kl": known.kl, "logprobs": known.logprobs, "sampled": known.sampled}
    values, compared = truth_of[op.values].clone().requires_grad_(), inputs.mask & known.settled
    entropy = known.entropy.clone().requires_grad_() if op.entropy else None
    result: dict[str, float] = {}
    if op.values == "sampled":
        result["unsettled"] = 1 - known.settled.double().mean().item()
    if found is not None:
        name = "kl" if op.values == "kl" else "logprob"
        result[f"{name}_max_abs"] = _largest(found.values, values, compared)
        if name == "logprob":
            off = _differences(found.values, values, compared)
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
        given = [] if inputs.ids is None else [inputs.ids[rows, -1]]
        columns = torch.cat([inputs.targets[rows], _spread(case.V, samples, device), *given]).unique()
        result |= _distance("dweight", inputs.weight.grad, columns, _d_weight(truth, columns, weight, hidden))
    return result


def _d_weight(truth: _Truth, columns: Tensor, weight: Tensor, hidden: Tensor) -> Tensor:
    """(columns, H)"""
    w = weight[columns].double()
    local = replace(truth, inputs=_among(truth.inputs, columns))
    found = torch.zeros(len(columns), hidden.shape[1], dtype=torch.float64, device=hidden.device)
    for rows in torch.arange(len(hidden), device=hidden.device).split(2048):
        x = hidden[rows].double()
        found += local.d_logits(rows, 0, w, x).T @ x
    return found


def _among(inputs: Inputs, columns: Tensor) -> Inputs:
    """The same with tokens told by where they stand in the ascending `columns`, -1 where they do not."""

    def place(tokens: Tensor) -> Tensor:
        at = torch.searchsorted(columns, tokens).clamp(max=len(columns) - 1)
        return torch.where(columns[at] == tokens, at, -1)

    return replace(inputs, targets=place(inputs.targets), ids=None if inputs.ids is None else place(inputs.ids))


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
