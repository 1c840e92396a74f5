"""Preference objectives through the public op against TRL 1.16's own losses: loss, metrics and gradients."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf.preferences import F_DIVERGENCES, PREFERENCES
from tests.helpers import dense, inputs, relative

oracle = pytest.importorskip("tests.trl_oracle", reason="needs trl")

P, T, H, V = 3, 7, 6, 23
S = 2 * P
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # where TRL applies label_smoothing
OF_CPO_AND_ORPO = ("cpo", "simpo", "orpo")
DPO_LOSSES = tuple(name for name, loss in PREFERENCES.items() if loss.paired and name not in OF_CPO_AND_ORPO)
OUTPUTS = ("entropy", "mean_logit", "is_top1")
IN_FP32 = ("rewards/accuracies", "mean_token_accuracy")  # TRL's means of booleans

Result = tuple[Tensor, dict[str, Any], list[Tensor]]


def batch(dtype: torch.dtype = torch.float64, seed: int = 0, fully_masked: bool = True) -> SimpleNamespace:
    """Completions of different lengths, with holes; the last rejected one is empty."""
    data = inputs(S * T, H, V, torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, targets, weight = data["hidden"].view(S, T, H), data["targets"].view(S, T), data["weight"]
    mask = torch.arange(T) < torch.tensor([7, 3, 5, 4, 6, 2])[:, None]
    mask[0, 2] = mask[4, 0] = False
    if fully_masked:
        mask[5] = False
    ref_hidden, ref_weight = (hidden + 0.5 * noise(S, T, H)).to(dtype), (weight + 0.1 * noise(V, H)).to(dtype)
    return SimpleNamespace(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        targets=targets,
        mask=mask,
        ref=oracle.Head(ref_hidden, ref_weight, targets),
        ref_logprobs=dense(ref_hidden, ref_weight, targets)["logprobs"],
    )


def leaves(data: SimpleNamespace, frozen: bool = False) -> tuple[Tensor, Tensor]:
    return data.hidden.clone().requires_grad_(), data.weight.clone().requires_grad_(not frozen)


def result(loss: Tensor, metrics: dict[str, Any], of: Sequence[Tensor]) -> Result:
    wanted = [leaf for leaf in of if leaf.requires_grad]
    return loss.detach(), metrics, list(torch.autograd.grad(3.7 * loss, wanted))


def theirs(data: SimpleNamespace, loss: Any, **given: Any) -> Result:
    """One of the oracle's losses, of the policy first."""
    of = leaves(data)
    value, metrics = loss(oracle.Head(*of, data.targets), **given)
    return result(value, metrics, of)


def ours(data: SimpleNamespace, objective: fr.PreferenceLoss, frozen: bool = False, **given: Any) -> Result:
    of = leaves(data, frozen)
    loss, metrics = fr.linear_preference_loss(
        *of,
        data.targets,
        objective=objective,
        completion_mask=data.mask,
        outputs=OUTPUTS,
        backend="chunked",
        mode="one_pass" if frozen else "two_phase",
        **given,
    )
    return result(loss, metrics, of)


def check(found: Result, truth: Result, tolerance: float, case: Any = None, without: Sequence[str] = ()) -> None:
    """Equal losses, gradients and metrics, of those that TRL logs."""
    # Losses are means of terms near 1, which may cancel.
    errors = {"loss": (found[0] - truth[0]).abs().item() / max(truth[0].abs().item(), 0.1)}
    errors |= {name: relative(a, b) for name, a, b in zip(("hidden", "weight"), found[2], truth[2])}
    for name, value in truth[1].items():
        if name not in without and name != "num_tokens":
            error = abs(found[1][name].item() - value) / max(abs(value), 1.0)
            errors[name] = error * (tolerance / 1e-6 if name in IN_FP32 else 1.0)
    wrong = {name: f"{error:.2e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, (wrong, case)


def smoothing_of(name: str) -> tuple[float, ...]:
    return (0.1,) if name == "exo_pair" else (0.0, 0.1) if name in SMOOTHED else (0.0,)


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_every_dpo_combination_equals_trl(name):
    """f-divergence x ld_alpha x WPO x label smoothing; how the reference is given is drawn; both routes."""
    draw = random.Random(name)
    data = {dtype: batch(dtype) for dtype in (torch.float64, torch.float32)}
    for f_divergence, ld_alpha, weighting, e in itertools.product(
        F_DIVERGENCES, (None, 0.0, 0.6), (False, True), smoothing_of(name)
    ):
        if name in ("sft", "hinge") and weighting:
            continue  # see test_where_trl_fails
        alpha = draw.choice((0.5, 1.7, 1.0)) if f_divergence == "alpha_divergence" else None
        # TRL knows no fp64 alpha divergence, and rounds EXO's label smoothing to fp32.
        low = f_divergence == "alpha_divergence"
        case = data[torch.float32 if low else torch.float64]
        options: dict[str, Any] = {"label_smoothing": e} if e else {}
        objective = fr.DPO(
            name,
            beta=0.3,
            f_divergence=f_divergence,
            f_alpha=alpha,
            ld_alpha=ld_alpha,
            use_weighting=weighting,
            **options,
        )
        settings = {
            "beta": 0.3,
            "f_divergence_type": f_divergence,
            "f_alpha_divergence_coef": alpha or 0.5,
            "ld_alpha": ld_alpha,
            "use_weighting": weighting,
            "label_smoothing": e,
            "loss_type": name,
        }
        truth = theirs(case, oracle.dpo_loss, ref=case.ref, mask=case.mask, **settings)
        tolerance = 1e-5 if low else 1e-7 if name == "exo_pair" else 1e-10
        for frozen in (False, True):
            given = reference(case, objective, draw.choice(("logprobs", "sums", "hidden")))
            # Without a reference, ours rewards the log-prob itself; TRL runs one even for sft.
            without = [key for key in truth[1] if key.startswith("rewards")] if name == "sft" else []
            check(ours(case, objective, frozen, **given), truth, tolerance, (objective, list(given), frozen), without)


def reference(data: SimpleNamespace, objective: fr.PreferenceLoss, how: str) -> dict[str, Tensor]:
    if not objective.needs_reference:
        return {}
    if how == "logprobs":
        return {"ref_logprobs": data.ref_logprobs}
    if how == "hidden":
        return {"ref_hidden": data.ref.hidden, "ref_weight": data.ref.weight}
    return {"ref_logprobs": oracle.dpo_reference(data.ref, data.mask, ld_alpha=objective.ld_alpha)}


def test_precomputed_sums_equal_trls_precomputed_path():
    data, objective = batch(), fr.DPO(ld_alpha=0.4)
    sums = oracle.dpo_reference(data.ref, data.mask, ld_alpha=0.4)
    truth = theirs(data, oracle.dpo_loss, ref=None, ref_logprobs=sums, mask=data.mask, ld_alpha=0.4)
    check(ours(data, objective, ref_logprobs=sums), truth, 1e-10)
    check(ours(data, objective, ref_logprobs=data.ref_logprobs), truth, 1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_lists_of_losses_with_weights_equal_trl(seed):
    """MPO (sigmoid, bco_pair, sft), and drawn ones."""
    draw = random.Random(seed)
    names: tuple[str, ...] = ("sigmoid", "bco_pair", "sft")
    weights: tuple[float, ...] = (0.8, 0.2, 1.0)
    if seed:
        names = tuple(draw.sample(sorted(set(DPO_LOSSES) - {"exo_pair"}), 3))
        weights = tuple(round(draw.uniform(-0.5, 2.0), 3) for _ in names)
    weighting = "sft" not in names and draw.random() < 0.5
    ld_alpha = draw.choice((None, 0.3))
    # TRL would not smooth a sigmoid beside the others.
    smooth: dict[str, Any] = {"label_smoothing": 0.2} if set(names) & set(SMOOTHED) and "sigmoid" not in names else {}
    objective = fr.DPO(names, weights, ld_alpha=ld_alpha, use_weighting=weighting, **smooth)
    data = batch()
    truth = theirs(
        data,
        oracle.dpo_loss,
        ref=data.ref,
        mask=data.mask,
        loss_type=names,
        loss_weights=list(weights),
        ld_alpha=ld_alpha,
        use_weighting=weighting,
        **smooth,
    )
    for frozen in (False, True):
        check(ours(data, objective, frozen, ref_logprobs=data.ref_logprobs), truth, 1e-10, (objective, frozen))


def test_rpo_is_sigmoid_plus_sft():
    data = batch()
    truth = theirs(
        data, oracle.dpo_loss, ref=data.ref, mask=data.mask, loss_type=("sigmoid", "sft"), loss_weights=[1.0, 0.7]
    )
    check(ours(data, fr.DPO(sft_weight=0.7), ref_logprobs=data.ref_logprobs), truth, 1e-10)


def test_where_trl_fails():
    """WPO multiplies in place: sft's expanded scalar cannot, hinge's relu then has no backward. Ours weighs both."""
    data = batch()
    given = {"ref": data.ref, "mask": data.mask, "use_weighting": True}
    with pytest.raises(RuntimeError, match="written-to tensor"):
        theirs(data, oracle.dpo_loss, loss_type="sft", **given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        theirs(data, oracle.dpo_loss, loss_type="hinge", **given)
    loss, metrics = oracle.dpo_loss(oracle.Head(data.hidden, data.weight, data.targets), loss_type="hinge", **given)
    found = ours(data, fr.DPO("hinge", use_weighting=True), ref_logprobs=data.ref_logprobs)
    check((*found[:2], []), (loss, metrics, []), 1e-10)
    # EXO without label smoothing is infinite.
    assert theirs(data, oracle.dpo_loss, ref=data.ref, mask=data.mask, loss_type="exo_pair")[0].isinf()
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        fr.DPO("exo_pair", label_smoothing=0.0)


def test_label_smoothing_where_trl_ignores_it():
    """Ours refuses it, but for sigmoid: that is cDPO, TRL's sigmoid of the pairs and of the swapped pairs."""
    data, e = batch(), 0.3
    given = {"ref": data.ref, "mask": data.mask}
    for name in sorted(set(DPO_LOSSES) - set(SMOOTHED)):
        plain, smooth = (theirs(data, oracle.dpo_loss, loss_type=name, label_smoothing=x, **given)[0] for x in (0.0, e))
        assert plain == smooth
        if name != "sigmoid":
            with pytest.raises(TypeError, match="label_smoothing is no option"):
                fr.DPO(name, label_smoothing=e)
    swap = torch.arange(S).roll(P)
    of = leaves(data)
    swapped = oracle.Head(of[0][swap], of[1], data.targets[swap])
    swapped_ref = oracle.Head(data.ref.hidden[swap], data.ref.weight, data.targets[swap])
    loss, metrics = oracle.dpo_loss(oracle.Head(*of, data.targets), **given)
    flipped, _ = oracle.dpo_loss(swapped, swapped_ref, data.mask[swap])
    truth = result((1 - e) * loss + e * flipped, metrics, of)
    check(ours(data, fr.DPO(label_smoothing=e), ref_logprobs=data.ref_logprobs), truth, 1e-10)


# ---------------------------------------------------------------------------------------------------------------- KTO


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("labels", [(1, 0, 1, 1, 0, 0), (1, 1, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0)])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_unpaired_losses_equal_trl(loss_type, labels, shift):
    """With class weights; KTO's KL, of mismatched completions, above and below zero."""
    data, other = batch(), batch(seed=5)
    # The reference likes the mismatched completions more, the larger the shift: then their KL is negative, and 0.
    other_ref = oracle.Head(other.hidden + shift * data.weight[other.targets], data.weight, other.targets)
    own_ref = oracle.Head(data.ref.hidden, data.weight, data.targets)
    desirable = torch.tensor(labels, dtype=torch.bool)
    weights: dict[str, Any] = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    of = leaves(data)
    loss, metrics = oracle.kto_loss(
        oracle.Head(*of, data.targets),
        own_ref,
        data.mask,
        desirable,
        mismatched=(oracle.Head(other.hidden, of[1], other.targets), other_ref, other.mask),
        loss_type=loss_type,
        beta=0.3,
        **weights,
    )
    truth = result(loss, metrics, of)
    kl = {}
    if loss_type == "kto":
        lp, ref = (dense(h, data.weight, other.targets)["logprobs"] for h in (other.hidden, other_ref.hidden))
        mean = ((lp - ref) * other.mask).sum(1).mean()
        assert (mean < 0) == (shift > 0)
        kl = {"kl": mean.clamp(min=0)}
    objective = fr.KTO(loss_type, beta=0.3, **weights)
    for frozen in (False, True):
        given = {"ref_hidden": own_ref.hidden, "ref_weight": own_ref.weight, "labels": desirable, **kl}
        check(ours(data, objective, frozen, **given), truth, 1e-10)


# ------------------------------------------------------------------------------------------------- without a reference

# Theirs average over every position, prompt and padding included; ours over the completions' tokens.
OVER_EVERYTHING = ("logits/chosen", "logits/rejected")


@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0, 0.4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cpo_equals_trl(cpo_alpha, label_smoothing):
    data = batch(fully_masked=False)
    settings = {"beta": 0.2, "cpo_alpha": cpo_alpha, "label_smoothing": label_smoothing}
    truth = theirs(data, oracle.cpo_loss, mask=data.mask, **settings)
    objective = fr.CPO(beta=0.2, sft_weight=cpo_alpha, label_smoothing=label_smoothing)
    for frozen in (False, True):
        check(ours(data, objective, frozen), nll_named(truth), 1e-10, without=OVER_EVERYTHING)


def nll_named(truth: Result) -> Result:
    """TRL logs an NLL of 0 where it does not need it."""
    loss, metrics, gradients = truth
    metrics = {"nll" if name == "nll_loss" else name: value for name, value in metrics.items()}
    if metrics["nll"] == 0:
        del metrics["nll"]
    return loss, metrics, gradients


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
@pytest.mark.parametrize("sft_weight", [0.0, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_and_alphapo_equal_trl(alpha, sft_weight, label_smoothing):
    data = batch(fully_masked=False)
    settings = {"beta": 2.0, "simpo_gamma": 0.7, "label_smoothing": label_smoothing}
    truth = theirs(
        data, oracle.cpo_loss, mask=data.mask, loss_type="simpo", alpha=alpha, cpo_alpha=sft_weight, **settings
    )
    objective = fr.SimPO(beta=2.0, gamma=0.7, alpha=alpha, sft_weight=sft_weight, label_smoothing=label_smoothing)
    for frozen in (False, True):
        check(ours(data, objective, frozen), nll_named(truth), 1e-10, (objective, frozen), without=OVER_EVERYTHING)


@pytest.mark.parametrize("name", ["hinge", "ipo"])
def test_cpos_hinge_and_ipo_are_dpos_with_a_reference_of_zero(name):
    data = batch(fully_masked=False)
    truth = theirs(data, oracle.cpo_loss, mask=data.mask, loss_type=name, beta=0.2, cpo_alpha=0.6)
    found = ours(data, fr.DPO(name, beta=0.2, sft_weight=0.6), ref_logprobs=torch.zeros(S))
    # TRL's rewards and log-probs are the mean ones under ipo.
    own = [key for key in truth[1] if key.startswith(("rewards", "logps"))] if name == "ipo" else []
    check(found, nll_named(truth), 1e-10, without=(*OVER_EVERYTHING, *own))


def test_orpo_equals_trl():
    """TRL rounds the log-probs to fp32 before the odds."""
    data = batch(fully_masked=False)
    truth = theirs(data, oracle.orpo_loss, mask=data.mask, beta=0.2)
    for frozen in (False, True):
        found = ours(data, fr.ORPO(beta=0.2), frozen)
        check(found, nll_named(truth), 1e-6, without=(*OVER_EVERYTHING, "log_odds_ratio", "log_odds_chosen"))


def test_orpos_nll_leaves_out_the_prompt():
    """TRL's runs over the chosen prompt too. Both values."""
    data = batch(fully_masked=False)
    prompt = torch.arange(T) < 2
    mask, attention = data.mask & ~prompt, data.mask | prompt
    mask[5, 2] = True
    data.mask = mask
    truth = theirs(data, oracle.orpo_loss, mask=mask, attention=attention, beta=0.2)
    found = ours(data, fr.ORPO(beta=0.2))
    lp = dense(data.hidden, data.weight, data.targets)["logprobs"][:P]
    own, whole = (-(lp * m[:P]).sum() / m[:P].sum() for m in (mask, attention))
    assert found[1]["nll"].item() == pytest.approx(own.item(), rel=1e-10)
    assert truth[1]["nll_loss"] == pytest.approx(whole.item(), rel=1e-10)
    assert (found[0] - own).item() == pytest.approx((truth[0] - whole).item(), rel=1e-6)


def test_averages_of_an_empty_completion_are_zero():
    """TRL's are 0 / 0."""
    data = batch()
    assert theirs(data, oracle.cpo_loss, mask=data.mask, loss_type="simpo")[0].isnan()
    assert theirs(data, oracle.orpo_loss, mask=data.mask)[0].isnan()
    for objective in (fr.SimPO(), fr.ORPO()):
        loss, metrics, gradients = ours(data, objective)
        assert loss.isfinite()
        assert all(value.isfinite() for value in metrics.values())
        assert all(gradient.isfinite().all() for gradient in gradients)
