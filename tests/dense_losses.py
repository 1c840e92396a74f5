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


def batch_surrogates(
    name: str,
    lp: Tensor,
    old: Tensor,
    sequences: Sequences,
    advantages: Tensor,
    o: dict[str, Any],
    correction: list[Any],
) -> dict[int, Tensor]:
    """Of all tokens, where one's depends on others'; correction: of each sequence, the summed log of its importance."""
    every = [t for s in sequences for t in s]
    log_r = {t: lp[t] - old[t] for t in every}
    found = {}
    if name in ("vespo", "gmpo"):
        for s, corrected in zip(sequences, correction):
            if name == "vespo":
                log_w = torch.stack([log_r[t].detach().clamp(-20, 20) for t in s]).sum() + corrected if s else lp.sum()
                log_w = log_w.clamp(math.log(1e-8), 20)
                for t in s:
                    sign, k, decay = ("pos", 2.0, 3.0) if advantages[t] >= 0 else ("neg", 3.0, 2.0)
                    k, decay = o.get(f"k_{sign}", k), o.get(f"lambda_{sign}", decay)
                    found[t] = -(decay + k * log_w - decay * log_w.exp()).exp() * advantages[t] * lp[t]
            else:
                low, high = -o.get("epsilon_low", 0.4), o.get("epsilon_high", 0.4)
                cut = {t: log_r[t].clamp(max=high) if advantages[t] > 0 else log_r[t].clamp(min=low) for t in s}
                found |= {t: -advantages[t] * mean(list(cut.values()), lp).exp() for t in s}
        return found
    cov, count = covariances(lp, every, advantages), max(int(o.get("share", 2e-4) * len(every)), 1)
    if name == "clip_cov":
        low, high = 1 - o.get("epsilon_low", 0.2), 1 + o.get("epsilon_high", 0.2)
        lots = dict(zip(every, torch.rand(len(every), generator=torch.Generator().manual_seed(o.get("seed", 1)))))
        eligible = [
            t
            for t in every
            if o.get("cov_low", 1.0) < cov[t] < o.get("cov_high", 5.0)
            and not (advantages[t] > 0 and log_r[t].exp() > high)
            and not (advantages[t] < 0 and log_r[t].exp() < low)
        ]
        dropped = sorted(eligible, key=lots.__getitem__, reverse=True)[:count]
        return {t: surrogate("ppo_clip", lp[t], log_r[t], advantages[t], o) * (t not in dropped) for t in every}
    assert name == "kl_cov"
    top = sorted(every, key=cov.__getitem__, reverse=True)[:count]
    penalty = o.get("kl_coef", 1.0)
    return {t: -log_r[t].exp() * advantages[t] + penalty * (t in top) * log_r[t].abs() for t in every}


def covariances(lp: Tensor, tokens: list[int], advantages: Tensor) -> dict[int, Tensor]:
    if not tokens:
        return {}
    log_p, a = lp.detach()[tokens], advantages[tokens]
    return dict(zip(tokens, (a - a.mean()) * (log_p - log_p.mean())))


BATCH_SURROGATES = ("vespo", "gmpo", "clip_cov", "kl_cov")


def kl_estimate(name: str, lp: Tensor, ref: Tensor) -> Tensor:
    d = ref - lp
    if name == "k1":
        return -d
    if name == "k2":
        return d * d / 2
    k3 = d.exp() - d - 1
    return k3 if name == "k3" else (k3 - d * d / 2).detach() + d * d / 2


def importances(name: str | None, low: Any, high: Any, old: Any, sampling: Any, sequences: Sequences) -> dict[int, Any]:
    """exp(log old - log sampler) of each token or over its sequence, cut to its bounds, or 0 outside of them."""
    if name is None:
        return {t: 1.0 for s in sequences for t in s}
    found = {}
    for s in sequences:
        logs = {t: 0.0 if math.isnan(d := (old[t] - sampling[t]).item()) else d for t in s}
        for t in s:
            r = math.exp(sum(logs.values()) if name.startswith("sequence") else logs[t])
            inside = (low is None or r >= low) and (high is None or r <= high)
            kept = 0.0 if name.endswith("mask") else low if low is not None and r < low else high
            found[t] = r if inside else kept
    return found


def policy(
    lp: Tensor,
    entropy: Tensor,
    sequences: Sequences,
    advantages: Tensor,  # (N,)
    old: Tensor | None,
    ref: Tensor | None,
    sampling: Tensor | None,
    o: dict[str, Any],
) -> Tensor:
    """`o`: the fields of a PolicyLoss."""
    every = [t for s in sequences for t in s]
    tokens, name = len(every), o["surrogate"]
    old = lp.detach() if old is None else old
    bounds = o.get("importance_sampling_min"), o.get("importance_sampling_max")
    importance = importances(o.get("importance_sampling"), *bounds, old, sampling, sequences)
    known: dict[int, Tensor] = {}
    if name in BATCH_SURROGATES:
        correction = [sum(math.log(max(importance[t], 1e-8)) for t in s) for s in sequences]
        known = batch_surrogates(name, lp, old, sequences, advantages, o["options"], correction)
    certain = o.get("top_entropy_quantile", 1.0)
    least = torch.quantile(entropy.detach()[every], 1 - certain) if tokens and certain < 1 else -math.inf
    kept = [t for t in every if entropy[t] >= least]
    total = 0.0 * lp.sum()
    for s in sequences:
        log_ratios = {t: lp[t] - old[t] for t in s}
        shared = sum(log_ratios.values(), 0.0 * lp.sum())
        if o["level"] in ("sequence", "sequence_token") and s:
            shared = shared / len(s)
        sampler = old if sampling is None else sampling
        drifts = [(sampler[t] - lp[t]).detach().nan_to_num(0.0).item() for t in s]
        threshold = o.get("off_policy_mask_threshold")
        off = threshold is not None and bool(s) and sum(drifts) / len(s) > threshold
        for t in s:
            log_r = log_ratios[t]
            if o["level"] in ("sequence", "sequence_sum"):
                log_r = shared
            elif o["level"] == "sequence_token":
                log_r = shared.detach() + lp[t] - lp[t].detach()
            loss = known[t] if known else surrogate(name, lp[t], log_r, advantages[t], o["options"])
            if t not in kept or (off and advantages[t] < 0):
                loss = 0.0 * loss
            if name != "vespo":
                loss = importance[t] * loss
            if ref is not None:
                kl = kl_estimate(o["kl"], lp[t], ref[t])
                loss = loss + o["beta"] * (kl * log_r.exp() if o.get("use_bias_correction_kl") else kl)
            weight = {
                "sequence_mean": 1 / (len(s) * len(sequences)),
                "token_mean": 1 / tokens,
                "sequence_sum": 1 / len(sequences),
                "fixed_length": 1 / (len(sequences) * 7),
            }[o["token_weight"]]
            total = total + weight * loss
    if o["entropy_coef"] and tokens:
        total = total - o["entropy_coef"] * mean([entropy[t] for t in kept], lp)
    return total


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.nn.functional.softplus(-x)


def score(kind: str, alpha: float | None, lr: Tensor) -> Tensor:
    """u of a log-ratio, by the f-divergence."""
    if kind == "forward_kl":
        return 1 - (-lr).exp()
    if kind == "js_divergence":
        return math.log(2) + log_sigmoid(lr)
    if kind == "alpha_divergence" and alpha != 1:
        assert alpha is not None
        return ((alpha - 1) * lr).exp() / (alpha - 1) - 1 / (alpha - 1)
    return lr


def pair_loss(name: str, beta: float, c: dict[str, Any], r: dict[str, Any], o: dict[str, Any]) -> Tensor:
    """Of one pair; each side has lp and ref, summed, their difference lr, its score u, and n tokens (at least 1)."""
    d, e = c["u"] - r["u"], o.get("label_smoothing", 0.0)
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
        a, means = o.get("alpha", 0.0), [side["lp"] / side["n"] for side in (c, r)]
        better, worse = means if a == 0 else [(1 - (-a * x).exp()) / a for x in means]
        return smoothed(beta * (better - worse) - o.get("gamma", 0.5))
    if name == "orpo":
        odds = [side["lp"] / side["n"] - torch.log(-torch.expm1(side["lp"] / side["n"])) for side in (c, r)]
        return -beta * log_sigmoid(odds[0] - odds[1])
    if name == "discopop":
        m = sig(beta * d / o.get("discopop_tau", 0.05))
        return (1 - m) * -log_sigmoid(beta * d) + m * (-beta * d).exp()
    formulas = {
        "sigmoid": lambda: smoothed(beta * d),
        "hinge": lambda: torch.relu(1 - beta * d),
        "ipo": lambda: (c["u"] / c["n"] - r["u"] / r["n"] - 1 / (2 * beta)) ** 2,
        "nca_pair": lambda: -log_sigmoid(bc) - log_sigmoid(-bc) / 2 - log_sigmoid(-br) / 2,
        "bco_pair": lambda: -log_sigmoid(bc) - log_sigmoid(-br),
        "sppo_hard": lambda: (c["lr"] - 1 / (2 * beta)) ** 2 + (r["lr"] + 1 / (2 * beta)) ** 2,
        "aot": lambda: smoothed(beta * (c["by_margin"] - r["by_margin"])),
        "aot_unpaired": lambda: smoothed(beta * (c["by_side"] - r["by_side"])),
        "apo_zero": lambda: 1 - sig(bc) + sig(br),
        "apo_down": lambda: sig(bc) + 1 - sig(bc - br),
        "sigmoid_norm": lambda: -log_sigmoid(beta * (c["u"] / c["n"] - r["u"] / r["n"])),
        "cpo": lambda: smoothed(beta * (c["lp"] - r["lp"])),
    }
    return formulas[name]()


def preference(
    name: str,
    lp: Tensor,
    sequences: Sequences,
    ref: Tensor | None,
    o: dict[str, Any],
    log_sum_sq: Tensor | None = None,
) -> Tensor:
    """Mean over pairs: the first half of the sequences are the chosen ones. `o`: the fields of a PreferenceLoss."""
    half, nothing = len(sequences) // 2, 0.0 * lp.sum()
    sides: list[dict[str, Any]] = []
    for i, s in enumerate(sequences):
        shorter = min(len(s), len(sequences[(i + half) % (2 * half)]))
        tail = 1.0 if o.get("ld_alpha") is None else o["ld_alpha"]
        weights = [1.0 if at < shorter else tail for at in range(len(s))]
        total = sum((w * lp[t] for w, t in zip(weights, s)), nothing)
        against = nothing if ref is None else sum((w * ref[t] for w, t in zip(weights, s)), nothing)
        lr = total - against
        u = score(o.get("f_divergence", "reverse_kl"), o.get("f_alpha"), lr)
        sides.append({"lp": total, "ref": against, "lr": lr, "u": u, "n": max(len(s), 1)})
    pairs = list(zip(sides[:half], sides[half:]))
    orders = {
        "by_margin": [[c["lp"] - r["lp"] for c, r in pairs], [c["ref"] - r["ref"] for c, r in pairs]],
        "by_side": [[c["lr"] for c, _ in pairs], [r["lr"] for _, r in pairs]],
    }
    for key, columns in orders.items():  # the i-th pair gets the i-th smallest of either
        for side, column in enumerate(columns):
            for pair, value in zip(pairs, sorted(column, key=lambda x: x.item())):
                pair[side][key] = value
    worth = [torch.ones(()).double() for _ in pairs]
    if o.get("use_weighting"):
        assert log_sum_sq is not None
        confidence = [
            (sum((lp[t] - log_sum_sq[t]).detach() for t in s) / max(len(s), 1) + nothing.detach()).exp()
            for s in sequences
        ]
        worth = [c * r for c, r in zip(confidence[:half], confidence[half:])]
    if name == "sft":
        return mean(worth, lp) * mean([-lp[t] for s in sequences[:half] for t in s], lp)
    return mean([w * pair_loss(name, o["beta"], c, r, o["options"]) for w, (c, r) in zip(worth, pairs)], lp)


def unpaired(
    name: str,
    lp: Tensor,
    sequences: Sequences,
    ref: Tensor,
    labels: list[bool],
    beta: float,
    kl: float,
    o: dict[str, Any],
) -> Tensor:
    """KTO and its like; mean over the completions."""
    losses = []
    for s, good in zip(sequences, labels):
        lr = sum((lp[t] - ref[t] for t in s), 0.0 * lp.sum()) - (kl if name == "kto" else 0.0)
        assert name in ("kto", "apo_zero_unpaired")
        weight = o.get("desirable_weight" if good else "undesirable_weight", 1.0)
        losses.append(weight * (1 - torch.sigmoid(beta * lr if good else -beta * lr)))
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
