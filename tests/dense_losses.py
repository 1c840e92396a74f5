"""The README's formulas on dense logits, in whatever dtype the operands have: loops over sequences and tokens, no speed.

Written from the formulas alone, so that a property test has something of its own to compare with. Everything is a Python
list over the live tokens of each sequence; autograd differentiates it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.helpers import dense_logits

Sequences = list[list[int]]  # flat positions of the live tokens of each sequence


def log_probabilities(head: dict[str, Any], hidden: Tensor, temperature: Any) -> Tensor:
    """(N, V)"""
    z = dense_logits(hidden, head["weight"], head["bias"], temperature, head["logit_scale"], head["softcap"])
    return z - torch.logsumexp(z, -1, keepdim=True)


def entropy_of(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def mean(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values).sum() / len(values) if values else 0.0 * like.sum()


def surrogate(name: str, lp: Tensor, log_r: Tensor, advantage: Tensor, o: dict[str, Any]) -> Tensor:
    """Of one token; log_r with its gradient, at whatever level."""
    r = log_r.exp()
    if name == "ppo_clip":
        delta, dual = o.get("delta"), o.get("dual_clip")
        capped = r if delta is None else r.clamp(max=delta)
        low, high = 1 - o.get("epsilon_low", 0.2), 1 + o.get("epsilon_high", 0.2)
        loss = -torch.minimum(capped * advantage, r.clamp(low, high) * advantage)
        return torch.minimum(loss, -dual * advantage) if dual is not None and advantage < 0 else loss
    if name == "cispo":
        return -r.detach().clamp(min=o.get("ratio_min"), max=o.get("ratio_max", 5.0)) * advantage * lp
    if name == "sapo":
        tau = o.get("tau_pos", 1.0) if advantage > 0 else o.get("tau_neg", 1.05)
        return -4 / tau * torch.sigmoid(tau * (r - 1)) * advantage
    assert name == "reinforce"
    return -advantage * lp


def kl_estimate(name: str, lp: Tensor, ref: Tensor) -> Tensor:
    d = ref - lp
    if name == "k1":
        return -d
    if name == "k2":
        return d * d / 2
    k3 = d.exp() - d - 1
    return k3 if name == "k3" else (k3 - d * d / 2).detach() + d * d / 2


def policy(
    lp: Tensor,
    entropy: Tensor,
    sequences: Sequences,
    advantages: Tensor,  # (N,)
    old: Tensor | None,
    ref: Tensor | None,
    o: dict[str, Any],
) -> Tensor:
    """`o`: surrogate, token_weight, level, kl, beta, entropy_coef, and the surrogate's own options."""
    tokens = sum(len(s) for s in sequences)
    total = 0.0 * lp.sum()
    for s in sequences:
        log_ratios = {t: lp[t] - (lp[t].detach() if old is None else old[t]) for t in s}
        shared = sum(log_ratios.values(), 0.0 * lp.sum())
        if o["level"] in ("sequence", "sequence_token") and s:
            shared = shared / len(s)
        for t in s:
            log_r = log_ratios[t]
            if o["level"] in ("sequence", "sequence_sum"):
                log_r = shared
            elif o["level"] == "sequence_token":
                log_r = shared.detach() + lp[t] - lp[t].detach()
            loss = surrogate(o["surrogate"], lp[t], log_r, advantages[t], o["options"])
            if ref is not None:
                loss = loss + o["beta"] * kl_estimate(o["kl"], lp[t], ref[t])
            weight = {
                "sequence_mean": 1 / (len(s) * len(sequences)),
                "token_mean": 1 / tokens,
                "sequence_sum": 1 / len(sequences),
                "fixed_length": 1 / (len(sequences) * 7),
            }[o["token_weight"]]
            total = total + weight * loss
    if o["entropy_coef"] and tokens:
        total = total - o["entropy_coef"] * mean([entropy[t] for s in sequences for t in s], lp)
    return total


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.nn.functional.softplus(-x)


def pair_loss(name: str, beta: float, c: dict[str, Any], r: dict[str, Any], o: dict[str, Any]) -> Tensor:
    """Of one pair; each side has lp and ref, summed, their difference lr, and n tokens (at least 1)."""
    d, e = c["lr"] - r["lr"], o.get("label_smoothing", 0.0)
    bc, br = beta * c["lr"], beta * r["lr"]
    sig = torch.sigmoid

    def smoothed(x: Tensor) -> Tensor:
        return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)

    if name == "exo_pair":
        e = o.get("label_smoothing", 1e-3)
        q = sig(beta * d)
        return q * (log_sigmoid(beta * d) - math.log(1 - e)) + (1 - q) * (log_sigmoid(-beta * d) - math.log(e))
    if name == "robust":
        return (-(1 - e) * log_sigmoid(beta * d) + e * log_sigmoid(-beta * d)) / (1 - 2 * e)
    if name == "simpo":
        return smoothed(beta * (c["lp"] / c["n"] - r["lp"] / r["n"]) - o.get("gamma", 0.5))
    if name == "orpo":
        odds = [side["lp"] / side["n"] - torch.log(-torch.expm1(side["lp"] / side["n"])) for side in (c, r)]
        return -beta * log_sigmoid(odds[0] - odds[1])
    if name == "discopop":
        m = sig(beta * d / o.get("discopop_tau", 0.05))
        return (1 - m) * -log_sigmoid(beta * d) + m * (-beta * d).exp()
    formulas = {
        "sigmoid": lambda: smoothed(beta * d),
        "hinge": lambda: torch.relu(1 - beta * d),
        "ipo": lambda: (c["lr"] / c["n"] - r["lr"] / r["n"] - 1 / (2 * beta)) ** 2,
        "nca_pair": lambda: -log_sigmoid(bc) - log_sigmoid(-bc) / 2 - log_sigmoid(-br) / 2,
        "bco_pair": lambda: -log_sigmoid(bc) - log_sigmoid(-br),
        "sppo_hard": lambda: (c["lr"] - 1 / (2 * beta)) ** 2 + (r["lr"] + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - sig(bc) + sig(br),
        "apo_down": lambda: sig(bc) + 1 - sig(bc - br),
        "sigmoid_norm": lambda: -log_sigmoid(beta * (c["lr"] / c["n"] - r["lr"] / r["n"])),
        "cpo": lambda: smoothed(beta * (c["lp"] - r["lp"])),
    }
    return formulas[name]()


def preference(
    name: str, lp: Tensor, sequences: Sequences, ref: Tensor | None, beta: float, o: dict[str, Any]
) -> Tensor:
    """Mean over pairs: the first half of the sequences are the chosen ones."""
    sides: list[dict[str, Any]] = []
    for s in sequences:
        total = sum((lp[t] for t in s), 0.0 * lp.sum())
        against = sum((ref[t] for t in s), torch.zeros_like(total)) if ref is not None else torch.zeros_like(total)
        sides.append({"lp": total, "ref": against, "lr": total - against, "n": max(len(s), 1)})
    half = len(sides) // 2
    if name == "sft":
        chosen = [-lp[t] for s in sequences[:half] for t in s]
        return mean(chosen, lp)
    return mean([pair_loss(name, beta, c, r, o) for c, r in zip(sides[:half], sides[half:])], lp)


def kto(lp: Tensor, sequences: Sequences, ref: Tensor, labels: list[bool], beta: float, kl: float) -> Tensor:
    losses = []
    for s, good in zip(sequences, labels):
        lr = sum((lp[t] - ref[t] for t in s), 0.0 * lp.sum())
        losses.append(1 - torch.sigmoid(beta * (lr - kl) if good else beta * (kl - lr)))
    return mean(losses, lp)


def divergence(kind: str, log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """(N,)"""
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward":
        return (q * (log_q - log_p)).sum(-1)
    if kind == "reverse":
        return (p * (log_p - log_q)).sum(-1)
    log_m = (beta * q + (1 - beta) * p).log()
    return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1)
