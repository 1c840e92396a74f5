"""Any head, any batch, any layout, any objective: what the public functions give is what dense formulas give in fp64.

300 examples of each property (a sixth of it of each objective), the same ones in every run; HYPOTHESIS_EXAMPLES asks for
another number, at random then.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf import objectives, preferences
from fused_rlhf.kernels.interface import KINDS
from fused_rlhf.kernels.statistics import OUTPUTS
from tests import dense_losses
from tests.dense_losses import entropy_of, log_probabilities

EXAMPLES = os.environ.get("HYPOTHESIS_EXAMPLES")
PROPERTY = settings(
    max_examples=int(EXAMPLES or 300),
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SHARE = settings(PROPERTY, max_examples=max(PROPERTY.max_examples // 6, 1))
BACKENDS = st.sampled_from(["chunked", "reference"])
STATISTICS = ["entropy", "lse", "sum_sq", "mean_logit", "max_logit", "argmax", "is_top1", "margin"]
DIVERGENCES: list[Any] = ["forward", "reverse", "jsd"]


class Batch:
    """Sequences of tokens in one of four layouts, a head, and per-token numbers; operands are rounded to `dtype`."""

    def __init__(self, draw: Any, even: bool = False) -> None:
        self.g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
        self.layout = draw(st.sampled_from(["padded", "left", "packed", "gaps"]))
        pairs = draw(st.integers(1, 3 if even else 4))
        lengths = [draw(st.integers(0, 5)) for _ in range(2 * pairs if even else pairs)]
        self.H, self.V = draw(st.integers(1, 6)), draw(st.integers(1, 40))
        self.head: dict[str, Any] = {
            "weight": self.randn(self.V, self.H),
            "bias": self.randn(self.V) if draw(st.booleans()) else None,
            "logit_scale": draw(st.sampled_from([1.0, 0.3, -0.7])),
            "softcap": draw(st.sampled_from([None, 2.0, 30.0])),
        }
        width = max([*lengths, 1])
        if self.layout == "packed":
            self.shape: tuple[int, ...] = (sum(lengths),)
            self.offsets: Tensor | None = torch.tensor([0, *lengths]).cumsum(0)
            starts = self.offsets[:-1].tolist()
            self.sequences = [list(range(a, a + n)) for a, n in zip(starts, lengths)]
        else:
            self.shape, self.offsets = (len(lengths), width), None
            shift = [width - n if self.layout == "left" else 0 for n in lengths]
            self.sequences = [
                list(range(i * width + s, i * width + s + n)) for i, (s, n) in enumerate(zip(shift, lengths))
            ]
        if self.layout == "gaps":  # tool tokens between those of the completion
            self.sequences = [[t for t in s if draw(st.integers(0, 3))] for s in self.sequences]
        self.n = int(torch.tensor(self.shape).prod())
        self.hidden = self.randn(*self.shape, self.H)
        self.targets = torch.randint(self.V, self.shape, generator=self.g)
        self.mask = torch.zeros(self.n, dtype=torch.bool)
        self.mask[[t for s in self.sequences for t in s]] = True
        self.mask = self.mask.view(self.shape)
        self.hidden[~self.mask] = torch.nan  # what is left out may hold anything
        self.temperature = draw(st.sampled_from([1.0, 0.7, "per token"]))
        if self.temperature == "per token":
            self.temperature = torch.rand(self.shape, generator=self.g, dtype=torch.float64) + 0.5

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.g, dtype=torch.float64).to(self.dtype)

    def near(self, lp: Tensor, scale: float) -> Tensor:
        """(shape) numbers beside the log-probs, in fp64."""
        return lp.view(self.shape) + scale * torch.randn(self.shape, generator=self.g, dtype=torch.float64)

    def leaves(self, wide: bool) -> dict[str, Any]:
        """hidden, weight and bias that take gradients; in fp64 with NaN-free rows for the dense statement."""
        hidden = self.hidden.double().nan_to_num(0.0) if wide else self.hidden.clone()
        head = {k: v.double() if wide and isinstance(v, Tensor) else v for k, v in self.head.items()}
        found = {"hidden": hidden, **head}
        for name in ("hidden", "weight", "bias"):
            if found[name] is not None:
                found[name] = found[name].clone().requires_grad_()
        return found

    def dense(self, leaves: dict[str, Any]) -> Tensor:
        """(N, V) log-probabilities in fp64."""
        temperature = self.temperature.reshape(-1) if isinstance(self.temperature, Tensor) else self.temperature
        return log_probabilities(leaves, leaves["hidden"].reshape(-1, self.H), temperature)

    def lp(self, log_p: Tensor) -> Tensor:
        return log_p.gather(1, self.targets.reshape(-1, 1))[:, 0]

    @property
    def known(self) -> dict[str, Any]:
        """Keywords of the losses that say the layout."""
        more = {} if self.offsets is None else {"cu_seqlens": self.offsets}
        return {"completion_mask": self.mask, "temperature": self.temperature, **more}


def agree(
    batch: Batch, ours: dict[str, Any], found: Tensor, dense: dict[str, Any], true: Tensor, steep: float = 1.0
) -> None:
    """Value and gradients, to a few roundings of the operands' dtype; `steep`: how much a loss magnifies them."""
    eps = max(torch.finfo(batch.dtype).eps, 1e-12)
    logits = 1e-5 if batch.dtype != torch.float64 else 1e-12
    size = max(1.0, true.detach().abs().max().item() if true.numel() else 1.0)
    assert (found.double() - true).abs().max().item() <= 30 * steep * logits * size if found.numel() else True
    names = [name for name in ("hidden", "weight", "bias") if ours[name] is not None]
    upstream = torch.linspace(1.0, 2.0, max(true.numel(), 1), dtype=torch.float64)[: true.numel()].view(true.shape)
    mine = torch.autograd.grad(found, [ours[n] for n in names], upstream.to(found.dtype), allow_unused=True)
    exact = torch.autograd.grad(true, [dense[n] for n in names], upstream, allow_unused=True)
    for a, b in zip(mine, exact):
        a, b = (torch.zeros(()) if g is None else g.double() for g in (a, b))
        scale = b.abs().max().item() if b.numel() else 0.0
        assert not a.isnan().any()
        assert ((a - b).abs().max().item() if a.numel() else 0.0) <= 40 * steep * eps * scale + 1e-6 * steep


@PROPERTY
@given(st.data())
def test_logprobs(data: st.DataObject) -> None:
    batch, backend = Batch(data.draw), data.draw(BACKENDS)
    outputs = tuple(data.draw(st.sets(st.sampled_from(STATISTICS))))
    ours, dense = batch.leaves(False), batch.leaves(True)
    targets = batch.targets.masked_fill(~batch.mask, -100)
    found = fr.linear_logprobs(
        ours["hidden"],
        fr.Head(ours["weight"], ours["bias"], ours["logit_scale"], ours["softcap"]),
        targets,
        temperature=batch.temperature,
        outputs=outputs,
        backend=backend,
    )
    log_p, live = batch.dense(dense), batch.mask.reshape(-1)
    z_lse = {"logprobs": batch.lp(log_p)}
    if "entropy" in outputs:
        z_lse["entropy"] = entropy_of(log_p)
    total, expected = (
        sum(weight * values.reshape(-1)[live].sum() for weight, values in zip((1.0, 0.3), some))
        for some in ((getattr(found, name).double() for name in z_lse), z_lse.values())
    )
    for name in ("logprobs", *outputs):
        value = getattr(found, name)
        assert value.shape == batch.shape
        assert (value.reshape(-1)[~live] == 0).all()
    if "sum_sq" in outputs:
        assert (found.sum_sq.reshape(-1)[live].double() - log_p.exp().square().sum(-1)[live]).abs().le(1e-4).all()
    if "is_top1" in outputs and batch.dtype == torch.float64:
        assert torch.equal(found.is_top1.reshape(-1)[live], (log_p.argmax(-1) == batch.targets.reshape(-1))[live])
    if "argmax" in outputs and batch.dtype == torch.float64:
        assert torch.equal(found.argmax.reshape(-1)[live], log_p.argmax(-1)[live])
    if "margin" in outputs and batch.V > 1:
        top = log_p.topk(2, -1).values
        assert (found.margin.reshape(-1)[live].double() - (top[:, 0] - top[:, 1])[live]).abs().le(1e-3).all()
    agree(batch, ours, total, dense, expected, steep=max(1, int(live.sum())))


def chosen(**options: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the options, each one of its values."""
    return st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in options.items()})


CLIPS = {"epsilon_low": [0.1, 0.4], "epsilon_high": [0.1, 0.5]}
SURROGATES = {
    "ppo_clip": chosen(**CLIPS, delta=[1.05, 2.0], dual_clip=[1.5, 3.0]),
    "cispo": chosen(ratio_max=[1.1, 2.0], ratio_min=[0.9]),
    "sapo": chosen(tau_pos=[2.0], tau_neg=[0.5]),
    "reinforce": chosen(),
    "vespo": chosen(k_pos=[1.0], lambda_pos=[2.0], k_neg=[2.0], lambda_neg=[1.0]),
    "gmpo": chosen(epsilon_low=[0.05], epsilon_high=[0.05]),
    "clip_cov": chosen(**CLIPS, share=[0.3, 1.0], cov_low=[0.01], cov_high=[0.5], seed=[7]),
    "kl_cov": chosen(share=[0.3, 1.0], kl_coef=[0.5]),
}
TOKEN_WEIGHTS = ["sequence_mean", "token_mean", "sequence_sum", "fixed_length"]
LEVELS = ["token", "sequence", "sequence_sum", "sequence_token"]
KL_ESTIMATORS = ["k1", "k2", "k3", "k3+"]
CORRECTIONS = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
GSPO = {"epsilon_low": 3e-4, "epsilon_high": 4e-4}
POLICIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "grpo": ("ppo_clip", "sequence_mean", "token", {}),
    "bnpo": ("ppo_clip", "token_mean", "token", {}),
    "dr_grpo": ("ppo_clip", "fixed_length", "token", {}),
    "dapo": ("ppo_clip", "token_mean", "token", {"epsilon_low": 0.2, "epsilon_high": 0.28}),
    "luspo": ("ppo_clip", "sequence_sum", "sequence", {}),
    "gspo": ("ppo_clip", "sequence_mean", "sequence", GSPO),
    "gspo_token": ("ppo_clip", "sequence_mean", "sequence_token", GSPO),
    "cispo": ("cispo", "token_mean", "token", {}),
    "sapo": ("sapo", "sequence_mean", "token", {}),
    "vespo": ("vespo", "token_mean", "token", {}),
    "gmpo": ("gmpo", "sequence_mean", "token", {}),
    "ppo": ("ppo_clip", "token_mean", "token", {}),
    "reinforce": ("reinforce", "token_mean", "token", {}),
    "reinforce_pp": ("ppo_clip", "token_mean", "token", {}),
    "rloo": ("ppo_clip", "sequence_mean", "sequence_sum", {}),
    "clip_cov": ("clip_cov", "token_mean", "token", {}),
    "kl_cov": ("kl_cov", "token_mean", "token", {}),
}
PAIRED = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "cpo", "simpo", "orpo"),
]
PAIR_PRESETS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "dpo": (("sigmoid",), {}),
    "ipo": (("ipo",), {}),
    "cpo": (("cpo", "sft"), {}),
    "simpo": (("simpo",), {"gamma": 1.0}),
    "orpo": (("orpo", "sft"), {}),
}
UNPAIRED = ["kto", "apo_zero_unpaired"]
F_DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
REGISTERED = {  # before any other test registers one of its own
    "statistics": (STATISTICS, OUTPUTS),
    "divergences": (DIVERGENCES, KINDS),
    "surrogates": (SURROGATES, objectives.SURROGATES),
    "token weights": (TOKEN_WEIGHTS, objectives.TOKEN_WEIGHTS),
    "levels": (LEVELS, objectives.LEVELS),
    "KL estimators": (KL_ESTIMATORS, objectives.KL_ESTIMATORS),
    "corrections": (CORRECTIONS, objectives.CORRECTIONS),
    "policy presets": (POLICIES, objectives.PRESETS),
    "preferences": ([*PAIRED, *UNPAIRED], preferences.PREFERENCES),
    "preference presets": ([*PAIR_PRESETS, "kto"], preferences.PRESETS),
    "f-divergences": (F_DIVERGENCES, preferences.F_DIVERGENCES),
}
MISSED = {kind: set(registered) - set(covered) for kind, (covered, registered) in REGISTERED.items()}


def test_every_registered_name_has_its_property():
    assert {kind: names for kind, names in MISSED.items() if names} == {}


def policies(draw: Any, name: str) -> tuple[fr.PolicyLoss, dict[str, Any]]:
    """An objective with this surrogate, by its parts or as a preset, and what a dense statement reads."""
    preset = draw(st.sampled_from([None, *(preset for preset, parts in POLICIES.items() if parts[0] == name)]))
    o: dict[str, Any] = {
        "kl": draw(st.sampled_from(KL_ESTIMATORS)),
        "beta": draw(st.sampled_from([0.0, 0.1])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.05])),
        "off_policy_mask_threshold": draw(st.sampled_from([None, None, -0.03, 0.03])),
        "importance_sampling": draw(st.sampled_from([None, None, *CORRECTIONS])),
    }
    o["use_bias_correction_kl"] = o["beta"] > 0 and draw(st.booleans())
    if o["importance_sampling"]:
        o |= draw(st.sampled_from([{"_max": 1.05}, {"_min": 0.95}, {"_min": 0.9, "_max": 1.1}]).map(bounds))
    if preset is None:
        weight, options = draw(st.sampled_from(TOKEN_WEIGHTS)), draw(SURROGATES[name])
        level = "token" if name in dense_losses.BATCH_SURROGATES else draw(st.sampled_from(LEVELS))
    else:
        _, weight, level, options = POLICIES[preset]
    if name != "gmpo":
        o["top_entropy_quantile"] = draw(st.sampled_from([1.0, 1.0, 0.5, 0.25]))
    if name == "vespo" and str(o["importance_sampling"]).startswith("sequence"):
        o["importance_sampling"] = o["importance_sampling"].replace("sequence", "token")
    fixed = {"max_completion_length": 7} if weight == "fixed_length" else {}
    dense = {**o, "surrogate": name, "token_weight": weight, "level": level, "options": options}
    if preset is not None:
        return objectives.PRESETS[preset](**o, **fixed), dense
    return fr.PolicyLoss(**{**dense, "options": options | fixed}), dense


def bounds(of: dict[str, float]) -> dict[str, float]:
    return {f"importance_sampling{end}": value for end, value in of.items()}


def apart(values: list[float], from_each_other: bool = False, *edges: float) -> bool:
    """Whether none of the values lies so near an edge, or another, that a rounding could choose its side."""
    near = [abs(value - edge) for value in values for edge in edges]
    ordered = sorted(values)
    near += [b - a for a, b in itertools.pairwise(ordered)] if from_each_other else []
    return min(near, default=1.0) > 1e-4


def decided(
    o: dict[str, Any],
    lp: Tensor,
    entropy: Tensor,
    old: Tensor,
    sampling: Tensor | None,
    batch: Batch,
    advantages: Tensor,
) -> bool:
    """Whether the operands' roundings change nothing that the objective chooses by comparison."""
    sequences = [s for s in batch.sequences if s]
    every, options = [t for s in sequences for t in s], o["options"]
    logs = [lp[s] - old[s] for s in sequences]
    ratios = (
        torch.cat(
            [torch.zeros(0), *logs]
            if o["level"] == "token"
            else [torch.zeros(0), *(x.sum()[None] if o["level"] == "sequence_sum" else x.mean()[None] for x in logs)]
        )
        .exp()
        .tolist()
    )
    low, high = options.get("epsilon_low", 0.2), options.get("epsilon_high", 0.2)
    if o["surrogate"] == "gmpo":
        low, high = 1 - math.exp(-options.get("epsilon_low", 0.4)), math.exp(options.get("epsilon_high", 0.4)) - 1
    fine = apart(ratios, False, 1 - low, 1 + high, *(options.get(k, 0.0) for k in ("delta", "dual_clip")))
    cov = [c.item() for c in dense_losses.covariances(lp, every, advantages).values()]
    if o["surrogate"] == "clip_cov":
        fine = fine and apart(cov, False, options.get("cov_low", 1.0), options.get("cov_high", 5.0))
    if o["surrogate"] == "kl_cov":
        fine = fine and (options.get("share") == 1.0 or apart(cov, True))
    if o.get("top_entropy_quantile", 1.0) < 1:
        fine = fine and apart(entropy[every].tolist(), True)
    if o["off_policy_mask_threshold"] is not None:
        sampler = old if sampling is None else sampling
        drifts = [(sampler[s] - lp[s]).nan_to_num(0.0).mean().item() for s in sequences]
        fine = fine and apart(drifts, False, o["off_policy_mask_threshold"])
    return fine


@pytest.mark.parametrize("name", SURROGATES)
@SHARE
@given(data=st.data())
def test_policies(name: str, data: st.DataObject) -> None:
    batch, backend, draw = Batch(data.draw), data.draw(BACKENDS), data.draw
    objective, o = policies(draw, name)
    ours, dense = batch.leaves(False), batch.leaves(True)
    log_p = batch.dense(dense)
    lp, entropy = batch.lp(log_p), entropy_of(log_p)
    corrected = o["importance_sampling"] is not None
    old = batch.near(lp.detach(), 0.1) if corrected or draw(st.booleans()) else None
    ref = batch.near(lp.detach(), 0.3) if o["beta"] else None
    sampling = batch.near(lp.detach(), 0.1) if corrected else None
    if sampling is not None and draw(st.booleans()):  # a sampler that reports nothing for some tokens
        sampling[torch.rand(batch.shape, generator=batch.g) < 0.2] = torch.nan
    per_sequence = draw(st.booleans())
    count = len(batch.sequences)
    values = torch.randn(count, generator=batch.g, dtype=torch.float64)
    advantages = torch.zeros(batch.n, dtype=torch.float64)
    for i, s in enumerate(batch.sequences):
        advantages[s] = values[i] if per_sequence else torch.randn(len(s), generator=batch.g, dtype=torch.float64)
    # A vector that could be either is one for each sequence; then they must be.
    assume(per_sequence or batch.shape != (count,))
    flat_old, flat_ref, flat_sampling = (None if t is None else t.reshape(-1) for t in (old, ref, sampling))
    before = lp.detach() if flat_old is None else flat_old
    assume(decided(o, lp.detach(), entropy.detach(), before, flat_sampling, batch, advantages))
    loss, _ = fr.linear_policy_loss(
        ours["hidden"],
        fr.Head(ours["weight"], ours["bias"], ours["logit_scale"], ours["softcap"]),
        batch.targets,
        advantages=values if per_sequence else advantages.view(batch.shape),
        objective=objective,
        old_logprobs=old,
        ref_logprobs=ref,
        sampling_logprobs=sampling,
        backend=backend,
        mode=draw(st.sampled_from(["auto", "two_phase"])),
        **batch.known,
    )
    true = dense_losses.policy(lp, entropy, batch.sequences, advantages, flat_old, flat_ref, flat_sampling, o)
    agree(batch, ours, loss, dense, true, 1.0 if batch.dtype == torch.float64 else 30.0)


def pair_objectives(draw: Any, name: str) -> tuple[fr.PreferenceLoss, dict[str, Any]]:
    """An objective over pairs, of this loss alone or beside another or as a preset, and what a dense statement reads."""
    preset = draw(st.sampled_from([None, None, *(key for key, (names, _) in PAIR_PRESETS.items() if names[0] == name)]))
    o: dict[str, Any] = {
        "beta": draw(st.sampled_from([0.1, 0.5, 2.0])),
        "f_divergence": draw(st.sampled_from(["reverse_kl", *F_DIVERGENCES])),
        "ld_alpha": draw(st.sampled_from([None, None, 0.0, 0.3])),
        "use_weighting": draw(st.sampled_from([False, False, True])),
    }
    if o["f_divergence"] == "alpha_divergence":
        o["f_alpha"] = draw(st.sampled_from([0.5, 1.0, 1.7]))
    if preset is None:
        names = (name, *draw(st.lists(st.sampled_from([other for other in PAIRED if other != name]), max_size=1)))
        weights, options = tuple(draw(st.sampled_from([1.0, 0.4])) for _ in names), {}
        takes = set().union(*(preferences.PREFERENCES[n].function.__kwdefaults__ or {} for n in names))
        every = {"label_smoothing": 0.1, "gamma": 0.2, "alpha": 0.3, "discopop_tau": 0.5}
        options = {name: value for name, value in every.items() if name in takes and draw(st.booleans())}
        objective = fr.PreferenceLoss(names, weights, **o, options=options)
    else:
        names, options = PAIR_PRESETS[preset]
        weights, objective = (1.0,) * len(names), preferences.PRESETS[preset](**o)
    return objective, {**o, "losses": dict(zip(names, weights)), "options": options}


@pytest.mark.parametrize("name", PAIRED)
@SHARE
@given(data=st.data())
def test_preferences_over_pairs(name: str, data: st.DataObject) -> None:
    batch, backend, draw = Batch(data.draw, even=True), data.draw(BACKENDS), data.draw
    objective, o = pair_objectives(draw, name)
    assume("orpo" not in o["losses"] or (batch.V > 1 and all(batch.sequences)))  # no odds of 1, nor of no tokens
    ours, dense = batch.leaves(False), batch.leaves(True)
    log_p = batch.dense(dense)
    lp = batch.lp(log_p)
    ref = batch.near(lp.detach(), 0.3) if objective.needs_reference else None
    given_ref = ref
    if ref is not None and o["ld_alpha"] is None and draw(st.booleans()):  # summed by the caller, of the live tokens
        flat = ref.reshape(-1)
        given_ref = torch.stack([flat[s].sum() for s in batch.sequences])
    elif ref is not None:
        assume(batch.shape != (len(batch.sequences),))
    loss, _ = fr.linear_preference_loss(
        ours["hidden"],
        fr.Head(ours["weight"], ours["bias"], ours["logit_scale"], ours["softcap"]),
        batch.targets,
        objective=objective,
        ref_logprobs=given_ref,
        backend=backend,
        **batch.known,
    )
    flat_ref = None if ref is None else ref.reshape(-1)
    certain = log_p.exp().square().sum(-1).log()
    parts = (w * dense_losses.preference(n, lp, batch.sequences, flat_ref, o, certain) for n, w in o["losses"].items())
    true = sum(parts, torch.zeros(()).double())
    if "hinge" not in o["losses"] or batch.dtype == torch.float64:
        agree(batch, ours, loss, dense, true, 1.0 if batch.dtype == torch.float64 else 1e2)
    else:  # it has a corner, on either side of which a rounding may lie
        assert abs(loss.item() - true.item()) <= 1e-3 * max(1.0, abs(true.item()))


@PROPERTY
@given(st.data())
def test_preferences_over_single_completions(data: st.DataObject) -> None:
    batch, backend, draw = Batch(data.draw), data.draw(BACKENDS), data.draw
    ours, dense = batch.leaves(False), batch.leaves(True)
    lp = batch.lp(batch.dense(dense))
    assume(batch.shape != (len(batch.sequences),))
    ref = batch.near(lp.detach(), 0.3)
    labels = [draw(st.booleans()) for _ in batch.sequences]
    name, options = draw(st.sampled_from(UNPAIRED)), draw(chosen(desirable_weight=[1.5], undesirable_weight=[0.5]))
    kl = draw(st.sampled_from([None, 0.0, 0.7])) if name == "kto" else None
    loss, _ = fr.linear_preference_loss(
        ours["hidden"],
        fr.Head(ours["weight"], ours["bias"], ours["logit_scale"], ours["softcap"]),
        batch.targets,
        objective=fr.KTO(name, beta=0.4, **options),
        labels=torch.tensor(labels),
        kl=None if kl is None else torch.tensor(kl, dtype=torch.float64),
        ref_logprobs=ref,
        backend=backend,
        **batch.known,
    )
    true = dense_losses.unpaired(name, lp, batch.sequences, ref.reshape(-1), labels, 0.4, kl or 0.0, options)
    agree(batch, ours, loss, dense, true, 1.0 if batch.dtype == torch.float64 else 1e2)


@PROPERTY
@given(st.data())
def test_divergences(data: st.DataObject) -> None:
    batch, backend, draw = Batch(data.draw), data.draw(BACKENDS), data.draw
    kind = draw(st.sampled_from(DIVERGENCES))
    beta = draw(st.sampled_from([0.2, 0.5])) if kind == "jsd" else 0.5
    ours, dense = batch.leaves(False), batch.leaves(True)
    width = draw(st.integers(1, 5))
    ref_hidden, ref_weight = batch.randn(*batch.shape, width), batch.randn(batch.V, width)
    value = fr.linear_kl(
        ours["hidden"],
        fr.Head(ours["weight"], ours["bias"], ours["logit_scale"], ours["softcap"]),
        ref_hidden,
        ref_weight,
        kind,
        mask=batch.mask,
        temperature=batch.temperature,
        beta=beta,
        backend=backend,
    )
    plain = {"weight": ref_weight.double(), "bias": None, "logit_scale": 1.0, "softcap": None}
    temperature = batch.temperature.reshape(-1) if isinstance(batch.temperature, Tensor) else batch.temperature
    log_q = log_probabilities(plain, ref_hidden.double().reshape(-1, width), temperature)
    true = dense_losses.divergence(kind, batch.dense(dense), log_q, beta)
    live = batch.mask.reshape(-1)
    assert (value.reshape(-1)[~live] == 0).all()
    steep = 1.0 if batch.dtype == torch.float64 else 1e2
    agree(batch, ours, value.reshape(-1)[live], dense, true[live], steep)
