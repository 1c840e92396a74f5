"""Policy objectives through the public op against TRL 1.16's own `_compute_loss`: loss, metrics and gradients."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf import objectives
from fused_rlhf.objectives import registry
from tests.helpers import dense, inputs, relative

oracle = pytest.importorskip("tests.trl_oracle", reason="needs trl")

B, T, H, V = 6, 7, 6, 23
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
# TRL takes vespo at sequence level too, with a warning: see test_where_trl_only_warns.
LEVELS = [*itertools.product(LOSS_TYPES[:-1], ("token", "sequence")), ("vespo", "token")]
NAMES = {"vespo/phi_seq_mean": "phi_mean"}  # TRL's metric: ours, where they differ
OF_THE_TRAINER = {"policy_loss", "entropy_coef"}

KLS: tuple[dict[str, Any], ...] = ({}, {"beta": 0.1}, {"beta": 0.1, "use_bias_correction_kl": True})
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"top_entropy_quantile": 0.37},
    {"off_policy_mask_threshold": 0.05},
    {"top_entropy_quantile": 0.61, "off_policy_mask_threshold": 0.05},
)
CORRECTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"importance_sampling": "token_truncate", "importance_sampling_max": 1.2},
    {"importance_sampling": "token_mask", "importance_sampling_min": 0.8, "importance_sampling_max": 1.3},
    {"importance_sampling": "sequence_truncate", "importance_sampling_min": 0.7, "importance_sampling_max": 1.2},
    {"importance_sampling": "sequence_mask", "importance_sampling_max": 1.2},
)


def batch(dtype: torch.dtype = torch.float64, seed: int = 0, fully_masked: bool = True) -> SimpleNamespace:
    """Ratios to both sides of every bound, advantages of each sign and 0, a row without tokens, a NaN sampler."""
    data = inputs(B * T, H, V, torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, targets = data["hidden"].view(B, T, H).to(dtype), data["targets"].view(B, T)
    weight = data["weight"].to(dtype)
    mask = torch.rand(B, T, generator=generator) > 0.25
    mask[3] = False if fully_masked else mask[2]
    # Each row drifts as a whole, more or less towards its targets, and each token by itself.
    drift = (
        torch.tensor([-0.4, 0.0, 0.12, 0.0, 0.2, 0.05], dtype=torch.float64)[:, None, None] * data["weight"][targets]
    )
    old = oracle.Head((hidden + drift + 0.15 * noise(B, T, H)).to(dtype), weight, targets)
    ref = oracle.Head((hidden + 0.15 * noise(B, T, H)).to(dtype), weight, targets)
    old_logprobs, ref_logprobs = (dense(h.hidden, h.weight, targets)["logprobs"] for h in (old, ref))
    sampling = old_logprobs + 0.15 * noise(B, T).to(dtype)
    sampling[0, mask[0].nonzero()[0]] = math.nan
    advantages = torch.tensor([0.9, -0.5, -1.1, 0.4, -0.7, 0.0], dtype=dtype)
    return SimpleNamespace(
        hidden=hidden,
        weight=weight,
        targets=targets,
        mask=mask,
        old=old,
        ref=ref,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling=sampling.float().to(dtype),  # as TRL keeps it
        advantages=advantages,
        token_advantages=noise(B, T).to(dtype),
        importance={(None, None, None): None},
    )


def settings_of(objective: fr.PolicyLoss, loss_type: str) -> dict[str, Any]:
    """The fields of TRL's config that say the same."""
    given = registry.options_of(objectives.SURROGATES[objective.surrogate], objective.options)
    if loss_type == "rloo":
        return {"loss_type": "rloo", "epsilon": given["epsilon_low"], "epsilon_high": given["epsilon_high"]}
    settings: dict[str, Any] = {
        "loss_type": loss_type,
        "importance_sampling_level": objective.level,
        "beta": objective.beta,
        "use_bias_correction_kl": objective.use_bias_correction_kl,
        "entropy_coef": objective.entropy_coef,
        "off_policy_mask_threshold": objective.off_policy_mask_threshold,
        "top_entropy_quantile": objective.top_entropy_quantile,
        "max_completion_length": objective.options.get("max_completion_length", 256),
    }
    names = {"epsilon_low": "epsilon", "epsilon_high": "epsilon_high", "delta": "delta", "ratio_max": "epsilon_high"}
    names |= {"tau_pos": "sapo_temperature_pos", "tau_neg": "sapo_temperature_neg"}
    names |= {key: f"vespo_{key}" for key in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
    return settings | {names[key]: value for key, value in given.items() if key in names}


def objective_of(loss_type: str, **options: Any) -> fr.PolicyLoss:
    """Ours under TRL's name, with bounds that the ratios of `batch` cross (TRL rounds sapo's tau to fp32)."""
    own: dict[str, dict[str, Any]] = {
        "cispo": {"ratio_max": 1.05},
        "dr_grpo": {"max_completion_length": 11},
        "sapo": {"tau_neg": 1.0625},
    }
    if loss_type in CLIPPED:
        options = {"epsilon_low": 0.1, "epsilon_high": 0.13} | options
    return objectives.PRESETS[loss_type](**own.get(loss_type, {}), **options)


def theirs(
    data: SimpleNamespace, objective: fr.PolicyLoss, loss_type: str, per_token: bool, with_old: bool, **counts: Any
) -> tuple[Tensor, dict[str, float], list[Tensor]]:
    leaves = [data.hidden.clone().requires_grad_(), data.weight.clone().requires_grad_()]
    correction = (
        objective.importance_sampling,
        objective.importance_sampling_min,
        objective.importance_sampling_max,
    )
    if correction not in data.importance:
        data.importance[correction] = oracle.importance_ratio(data.old, data.sampling, data.mask, *correction)
    importance = data.importance[correction]
    loss, metrics = oracle.policy_loss(
        oracle.Head(*leaves, data.targets),
        data.mask,
        data.token_advantages if per_token else data.advantages,
        old=data.old_logprobs if with_old else None,
        ref=data.ref_logprobs if objective.beta else None,
        sampling=None if importance is None else data.sampling,
        importance_ratio=importance,
        **settings_of(objective, loss_type),
        **counts,
    )
    return loss.detach(), metrics, list(torch.autograd.grad(3.7 * loss, leaves))


def ours(
    data: SimpleNamespace,
    objective: fr.PolicyLoss,
    mode: Any,
    per_token: bool,
    with_old: bool,
    frozen: bool = False,
    **counts: Any,
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    hidden, weight = data.hidden.clone().requires_grad_(), data.weight.clone().requires_grad_(not frozen)
    loss, metrics = fr.linear_policy_loss(
        hidden,
        weight,
        data.targets,
        advantages=data.token_advantages if per_token else data.advantages,
        objective=objective,
        completion_mask=data.mask,
        old_logprobs=data.old_logprobs if with_old else None,
        ref_logprobs=data.ref_logprobs if objective.beta else None,
        sampling_logprobs=None if objective.importance_sampling is None else data.sampling,
        outputs=("entropy",),
        backend="chunked",
        mode=mode,
        **counts,
    )
    return loss.detach(), metrics, list(torch.autograd.grad(3.7 * loss, [hidden] if frozen else [hidden, weight]))


def differences(found: Any, truth: Any, tolerance: float) -> list[str]:
    """What of loss, gradients and TRL's metrics is not equal."""
    wrong = []
    # A loss is a mean of terms near 1, which may cancel.
    errors = {"loss": (found[0] - truth[0]).abs().item() / max(truth[0].abs().item(), 0.1)}
    errors |= {name: relative(a, b) for name, a, b in zip(("hidden", "weight"), found[2], truth[2])}
    for name, value in truth[1].items():
        if name in OF_THE_TRAINER:
            continue
        # TRL counts what is clipped in fp32.
        allowed = 1e-6 if "clip" in name or "phi" in name else tolerance
        error = abs(found[1][NAMES.get(name, name)].item() - value)
        errors[name] = error * tolerance / allowed
    for name, error in errors.items():
        if not error <= tolerance:
            wrong.append(f"{name} is off by {error:.2e}")
    return wrong


def compare(
    data: SimpleNamespace,
    objective: fr.PolicyLoss,
    loss_type: str,
    per_token: bool = False,
    with_old: bool = True,
    tolerance: float = 1e-10,
) -> None:
    truth = theirs(data, objective, loss_type, per_token, with_old)
    for mode, frozen in (("two_phase", False), ("one_pass", False), ("one_pass", True)):
        if mode == "one_pass" and not (objective.tokenwise or (frozen and objective.entropy_coef == 0)):
            continue
        wrong = differences(ours(data, objective, mode, per_token, with_old, frozen), truth, tolerance)
        assert not wrong, (wrong, mode, objective, {"per_token": per_token, "with_old": with_old, "frozen": frozen})


@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_every_combination_equals_trl(loss_type, level):
    """delta x KL x masks x the sampler's correction x advantages; entropy bonus and on-policy batches drawn."""
    data, draw = batch(), random.Random(f"{loss_type} {level}")
    deltas = ({}, {"delta": 1.08}) if loss_type in CLIPPED else ({},)
    for delta, kl, masks, correction, per_token in itertools.product(deltas, KLS, MASKS, CORRECTIONS, (False, True)):
        if loss_type == "vespo" and str(correction.get("importance_sampling")).startswith("sequence"):
            continue  # TRL refuses it at construction
        objective = objective_of(
            loss_type, level=level, entropy_coef=draw.choice((0.0, 0.05)), **delta, **kl, **masks, **correction
        )
        compare(data, objective, loss_type, per_token, with_old=bool(correction) or draw.random() < 0.8)


def test_the_batch_crosses_every_bound():
    """Otherwise the comparison above would be of less than it says."""
    data = batch()
    log_ratio = dense(data.hidden, data.weight, data.targets)["logprobs"] - data.old_logprobs
    for ratio in (log_ratio[data.mask].exp(), torch.stack([x[m].mean() for x, m in zip(log_ratio, data.mask)]).exp()):
        assert (ratio < 0.9).any()
        assert (ratio > 1.13).any()
        assert ((ratio > 0.9) & (ratio < 1.13)).any()
    drift = torch.stack([-x[m].mean() for x, m in zip(log_ratio, data.mask)])
    assert ((drift > 0.05) & (data.advantages < 0)).any()
    assert ((drift < 0.05) & (data.advantages < 0)).any()
    for correction in CORRECTIONS[1:]:
        mode, low, high = (correction.get(f"importance_sampling{end}") for end in ("", "_min", "_max"))
        weights = oracle.importance_ratio(data.old, data.sampling, data.mask, mode, low, high)
        weights = weights[data.mask] if weights.shape == data.mask.shape else weights[data.mask.any(1)]
        assert ((weights == high) | (weights == 0)).any()
        assert ((weights != high) & (weights != 0) & (weights != 1)).any()
    assert data.sampling[data.mask].isnan().any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_fp32_equals_trl(loss_type):
    """Within the contract's 1e-5, everything at once."""
    for masks, correction in itertools.product(MASKS, CORRECTIONS[:2]):
        objective = objective_of(loss_type, entropy_coef=0.05, **KLS[2], **masks, **correction)
        compare(batch(torch.float32), objective, loss_type, tolerance=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("with_old", [False, True])
def test_gmpo_equals_trl(beta, with_old):
    objective = fr.GMPO(beta=beta, epsilon_low=0.1, epsilon_high=0.13)
    compare(batch(fully_masked=False), objective, "gmpo", with_old=with_old)


def test_rloo_equals_trl():
    """One ratio a sequence, of its summed log-probs; the KL is in the reward."""
    compare(batch(fully_masked=False), fr.RLOO(epsilon_low=0.2, epsilon_high=0.3), "rloo")


@pytest.mark.parametrize("loss_type", ["gmpo", "rloo"])
def test_a_sequence_without_tokens_adds_nothing(loss_type):
    """TRL adds the constant -A / B of it to these two losses, as of a ratio of 1. Ours adds 0; the gradients agree."""
    data, objective = batch(), objectives.PRESETS[loss_type]()
    truth, found = theirs(data, objective, loss_type, False, True), ours(data, objective, "two_phase", False, True)
    assert (truth[0] - found[0]).item() == pytest.approx(-data.advantages[3].item() / B, rel=1e-10)
    assert all(relative(a, b) < 1e-10 for a, b in zip(found[2], truth[2]))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_reference_computed_in_the_call(beta):
    data = batch()
    objective = fr.GRPO(beta=beta)
    truth = theirs(data, objective, "grpo", False, True)
    hidden, weight = data.hidden.clone().requires_grad_(), data.weight.clone().requires_grad_()
    loss, metrics = fr.linear_policy_loss(
        hidden,
        weight,
        data.targets,
        advantages=data.advantages,
        objective=objective,
        completion_mask=data.mask,
        old_logprobs=data.old_logprobs,
        ref_hidden=data.ref.hidden,
        ref_weight=data.ref.weight,
        outputs=("entropy",),
    )
    assert not differences((loss.detach(), metrics, torch.autograd.grad(3.7 * loss, [hidden, weight])), truth, 1e-10)


STEPS, NUM_ITEMS = 4, 83
COUNTS: dict[str, dict[str, Any]] = {
    **{name: {"num_sequences": B * STEPS} for name in ("grpo", "sapo", "luspo", "dr_grpo")},
    **{name: {"num_tokens": NUM_ITEMS} for name in ("dapo", "cispo", "vespo")},
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
def test_global_counts_are_trls_normalisers(loss_type, entropy_coef):
    """One of four micro-batches of a window, as the oracle's table says.

    The entropy bonus is a mean over the window's tokens in ours, over the micro-batch's in TRL.
    """
    data, objective = batch(), objective_of(loss_type, entropy_coef=entropy_coef)
    local = int(data.mask.sum())
    counts: dict[str, Any] = {"num_sequences": B * STEPS, "num_tokens": local * STEPS} | COUNTS.get(loss_type, {})
    trl = theirs(data, objective, loss_type, False, True, steps=STEPS, num_items=NUM_ITEMS, steps_per_generation=STEPS)
    found = ours(data, objective, "two_phase", False, True, **counts)
    if loss_type in ("dapo", "cispo", "vespo"):
        entropy = found[1]["entropy"] * entropy_coef
        expected = trl[0] + entropy / STEPS - entropy * local / NUM_ITEMS
        assert found[0].item() == pytest.approx(expected.item(), rel=1e-10)
    if loss_type not in ("dapo", "cispo", "vespo") or not entropy_coef:
        assert not differences(found, trl, 1e-10)


def test_where_trl_ignores_an_option_ours_refuses_it():
    """delta outside the clipped ratio, and a KL correction without a KL, change nothing in TRL."""
    data = batch()
    leaf = oracle.Head(data.hidden, data.weight, data.targets)
    for loss_type in ("cispo", "sapo", "vespo"):
        plain, ignoring = (
            oracle.policy_loss(leaf, data.mask, data.advantages, old=data.old_logprobs, loss_type=loss_type, **given)[0]
            for given in ({}, {"delta": 1.01})
        )
        assert plain == ignoring
        with pytest.raises(TypeError, match="delta is no option"):
            objective_of(loss_type, delta=1.01)
    with pytest.raises(ValueError, match="use_bias_correction_kl must be False when beta is 0"):
        fr.GRPO(use_bias_correction_kl=True)


def test_gmpo_does_not_choose_among_tokens():
    """TRL's geometric mean can be of the high-entropy tokens alone; ours is of the whole sequence, and says so."""
    data = batch(fully_masked=False)
    leaf = oracle.Head(data.hidden, data.weight, data.targets)
    given = {"old": data.old_logprobs, "loss_type": "gmpo"}
    whole, some = (
        oracle.policy_loss(leaf, data.mask, data.advantages, top_entropy_quantile=share, **given)[0]
        for share in (1.0, 0.37)
    )
    assert whole != some
    with pytest.raises(ValueError, match="top_entropy_quantile must be 1 for gmpo"):
        fr.GMPO(top_entropy_quantile=0.37)


def test_where_trl_only_warns_ours_refuses():
    """vespo has a ratio of its own: in TRL its sequence level changes nothing but the weight of a corrected KL."""
    data = batch()
    leaf = oracle.Head(data.hidden, data.weight, data.targets)
    given = {"old": data.old_logprobs, "ref": data.ref_logprobs, "loss_type": "vespo"}
    kl = {"beta": 0.1, "use_bias_correction_kl": False}
    token, sequence = (
        oracle.policy_loss(leaf, data.mask, data.advantages, **given, **kl, importance_sampling_level=level)[0]
        for level in ("token", "sequence")
    )
    assert token == sequence
    with pytest.raises(ValueError, match="level must be 'token' for vespo"):
        fr.VESPO(level="sequence")
