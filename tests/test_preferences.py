import math

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf import preferences
from fused_rlhf.segments import Sequences
from tests.helpers import dense, inputs, relative, worst

PAIRED = sorted(name for name, loss in preferences.PREFERENCES.items() if loss.paired)
UNPAIRED = sorted(set(preferences.PREFERENCES) - set(PAIRED))
OFFSETS = torch.tensor([0, 3, 7, 9, 14, 15, 15])  # three pairs; the last one's rejected completion is empty
LABELS = torch.tensor([True, False, True, True, False, False])


def objective_of(name, **options):
    return fr.PreferenceLoss((name,), options={"label_smoothing": 0.1} if name == "exo_pair" else {}, **options)


def bind(objective, n=15, seed=0, **given):
    generator = torch.Generator().manual_seed(seed)
    lp = -torch.rand(n, generator=generator, dtype=torch.float64) * 2 - 0.1
    ref = lp + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    index = torch.arange(6).repeat_interleave(OFFSETS.diff())
    defaults = {
        "sequences": Sequences.of(index, 6),
        "ref_logprobs": ref if objective.needs_reference else None,
        "ref_sums": None,
        "labels": None if objective.paired else LABELS,
        "kl": None,
        "num_pairs": 3,
        "num_tokens": 9,
        "dtype": torch.float64,
    }
    bound = objective.bind(**(defaults | given))
    if objective.use_weighting:
        bound.log_sum_sq = -torch.rand(n, generator=generator, dtype=torch.float64)
    return lp, ref, bound


def cases():
    for name in PAIRED + UNPAIRED:
        yield pytest.param(objective_of(name), id=name)
    for f in preferences.F_DIVERGENCES:
        f_alpha = 0.5 if f == "alpha_divergence" else None
        yield pytest.param(fr.DPO(f_divergence=f, f_alpha=f_alpha, label_smoothing=0.1), id=f)
    yield pytest.param(fr.DPO(ld_alpha=0.3), id="ld_alpha")
    yield pytest.param(fr.DPO(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)), id="mpo")
    yield pytest.param(fr.SimPO(alpha=0.3, sft_weight=0.2), id="alphapo")


@pytest.mark.parametrize("objective", cases())
def test_gradcheck(objective):
    lp, _, bound = bind(objective)
    assert torch.autograd.gradcheck(bound.per_sequence, [lp.requires_grad_()])
    loss, grads = bound(slice(0, 15), lp, None)
    assert loss.shape == ((3,) if objective.paired else (6,))
    (truth,) = torch.autograd.grad(bound.per_sequence(lp).sum() / 3, lp)
    assert worst(grads.logprobs, truth) < 1e-15


def test_weighting_takes_no_gradient_and_scales_each_pair():
    lp, _, bound = bind(fr.DPO(use_weighting=True))
    _, _, plain = bind(fr.DPO())
    mean = bound.sequences.mean(lp - bound.log_sum_sq)
    weights = (mean[:3] + mean[3:]).exp()
    assert worst(bound.per_sequence(lp), plain.per_sequence(lp) * weights) < 1e-15
    (by_lp,) = torch.autograd.grad(bound.per_sequence(lp.requires_grad_()).sum(), lp)
    (expected,) = torch.autograd.grad((plain.per_sequence(lp) * weights.detach()).sum(), lp)
    assert worst(by_lp, expected) < 1e-15


def test_the_nll_of_all_pairs_meets_each_pairs_weight():
    """mean of (loss_i + 0.7 nll) w_i"""
    lp, _, bound = bind(fr.DPO(use_weighting=True, sft_weight=0.7))
    _, _, plain = bind(fr.DPO())
    mean = bound.sequences.mean(lp - bound.log_sum_sq)
    weights = (mean[:3] + mean[3:]).exp()
    nll = -bound.sequences.sum(lp)[:3].sum() / 9
    want = ((plain.per_sequence(lp) + 0.7 * nll) * weights).mean()
    assert worst(bound.per_sequence(lp).mean(), want) < 1e-15


def test_ld_alpha_weighs_the_tail_of_the_longer_completion():
    """Lengths 3, 4, 2 against 5, 1, 0."""
    _, _, bound = bind(fr.DPO(ld_alpha=0.3))
    expected = [[1, 1, 1], [1, 0.3, 0.3, 0.3], [0.3, 0.3], [1, 1, 1, 0.3, 0.3], [1]]
    assert [part.tolist() for part in bound.token_weights.split(OFFSETS.diff()[:5].tolist())] == expected


def test_log1mexp_on_both_sides():
    x = torch.tensor([-1e-12, -1e-3, -0.5, -math.log(2), -1.0, -30.0, -700.0], dtype=torch.float64).requires_grad_()
    found = preferences.log1mexp(x)
    for value, at in zip(found.tolist(), x.tolist()):
        exact = math.log(-math.expm1(at)) if at > -1 else math.log1p(-math.exp(at))
        assert value == pytest.approx(exact, rel=1e-14, abs=1e-300)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert relative(slope, x.detach().exp() / torch.expm1(x.detach())) < 1e-14
    assert preferences.log1mexp(torch.zeros(1)).isfinite().all()


def batch(seed=0, s=6, t=7):
    data = inputs(s * t, 6, 80, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(s, t, generator=generator) > 0.3
    return {
        "hidden": data["hidden"].view(s, t, 6),
        "weight": data["weight"],
        "targets": data["targets"].view(s, t),
        "completion_mask": mask,
        "ref_logprobs": torch.randn(s, t, generator=generator, dtype=torch.float64) * 0.3 - 4,
    }


def run(objective, data, frozen=False, **options):
    hidden = data["hidden"].clone().requires_grad_()
    weight = data["weight"].clone().requires_grad_(not frozen)
    given = data | {"hidden": hidden, "weight": weight} | options
    if not objective.needs_reference:
        given.pop("ref_logprobs", None)
    loss, metrics = fr.linear_preference_loss(**given, objective=objective)
    (3.7 * loss).backward(retain_graph=True)
    return loss.detach(), hidden.grad, weight.grad, metrics


def test_dpo_equals_the_dense_formula():
    data = batch()
    x, w = data["hidden"].clone().requires_grad_(), data["weight"].clone().requires_grad_()
    loss, d_hidden, d_weight, metrics = run(fr.DPO(beta=0.2), data, outputs=("entropy", "mean_logit", "is_top1"))
    truth = dense(x, w, data["targets"])
    m, lp = data["completion_mask"], truth["logprobs"]
    ratio = ((lp - data["ref_logprobs"]) * m).sum(1)
    margin = 0.2 * (ratio[:3] - ratio[3:])
    expected = -torch.nn.functional.logsigmoid(margin).mean()
    (3.7 * expected).backward()
    assert worst(loss, expected) < 1e-13
    assert relative(d_hidden, x.grad) < 1e-12
    assert relative(d_weight, w.grad) < 1e-12
    reward, c, r = 0.2 * ratio, m.clone(), m.clone()
    c[3:], r[:3] = False, False
    shown = {
        "rewards/chosen": reward[:3].mean(),
        "rewards/rejected": reward[3:].mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (margin > 0).double().mean(),
        "logps/chosen": (lp * m).sum(1)[:3].mean(),
        "logps/rejected": (lp * m).sum(1)[3:].mean(),
        "logits/chosen": truth["mean_logit"][c].mean(),
        "logits/rejected": truth["mean_logit"][r].mean(),
        "nll": -lp[c].mean(),
        "entropy": truth["entropy"][m].mean(),
        "mean_token_accuracy": truth["is_top1"][c].double().mean(),
    }
    assert set(metrics) == set(shown)
    for key, value in shown.items():
        assert worst(metrics[key], value) < 1e-12, key


@pytest.mark.parametrize("name", sorted(preferences.PREFERENCES))
def test_every_loss_gives_the_same_by_every_route_and_backend(name):
    data, objective = batch(), objective_of(name, use_weighting=name == "sigmoid")
    given = {} if objective.paired else {"labels": LABELS, "completion_mask": data["completion_mask"]}
    truth = run(objective, data, mode="two_phase", backend="reference", **given)
    found = {"chunked": run(objective, data, mode="two_phase", backend="chunked", **given)}
    for backend in ("chunked", "reference"):
        found[f"frozen {backend}"] = run(objective, data, frozen=True, mode="one_pass", backend=backend, **given)
    for route, (loss, d_hidden, d_weight, metrics) in found.items():
        assert worst(loss, truth[0]) < 1e-11, route
        assert relative(d_hidden, truth[1]) < 1e-11, route
        if d_weight is not None:
            assert relative(d_weight, truth[2]) < 1e-11, route
        for key, value in metrics.items():
            assert worst(value, truth[3][key]) < 1e-11, (route, key)


def test_reference_as_vectors_as_sums_and_computed_in_the_call():
    data, objective = batch(), fr.DPO(ld_alpha=0.5)
    generator = torch.Generator().manual_seed(9)
    ref_hidden = torch.randn(6, 7, 6, generator=generator, dtype=torch.float64)
    per_token = fr.linear_logprobs(ref_hidden, data["weight"], data["targets"]).logprobs
    vectors = run(objective, data | {"ref_logprobs": per_token})
    mask = data["completion_mask"]
    short = torch.minimum(mask[:3].sum(1), mask[3:].sum(1)).repeat(2)
    weights = torch.where(mask.cumsum(1) <= short[:, None], 1.0, 0.5).double() * mask
    sums = run(objective, data | {"ref_logprobs": (per_token * weights).sum(1)})
    del data["ref_logprobs"]
    inside = run(objective, data, ref_hidden=ref_hidden)
    for other in (sums, inside):
        for a, b in zip(vectors[:3], other[:3]):
            assert relative(a, b) < 1e-12


def test_an_empty_completion_counts_with_a_log_prob_of_zero():
    """Its pair still pulls at the other side, whichever of the two is empty."""
    for side in (0, 3):
        data = batch()
        data["completion_mask"][side] = False
        loss, d_hidden, _, _ = run(fr.DPO(), data)
        other = (side + 3) % 6
        assert loss.isfinite()
        assert d_hidden[other].abs().sum() > 0
        assert d_hidden[side].abs().sum() == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fr.DPO("dpo"), ValueError, r"losses must be one of \['aot'.*got 'dpo'"),
        (lambda: fr.DPO(beta=0.0), ValueError, "beta must be finite and > 0, got 0.0"),
        (lambda: fr.DPO(("sigmoid", "sft"), (1.0,)), ValueError, "weights must hold one number for each"),
        (lambda: fr.DPO(("sigmoid", "kto")), ValueError, "all over pairs or all over single completions"),
        (lambda: fr.DPO(gamma=1.0), TypeError, r"gamma is no option of \('sigmoid',\)"),
        (lambda: fr.DPO("hinge", label_smoothing=0.1), TypeError, "label_smoothing is no option"),
        (lambda: fr.DPO(label_smoothing=0.5), ValueError, r"label_smoothing must lie in \[0, 0.5\) for sigmoid"),
        (lambda: fr.DPO("exo_pair", label_smoothing=0.0), ValueError, r"label_smoothing must lie in \(0, 0.5\)"),
        (lambda: fr.DPO(f_divergence="kl"), ValueError, "f_divergence must be one of"),
        (lambda: fr.DPO(f_divergence="alpha_divergence"), ValueError, "f_alpha must be given"),
        (lambda: fr.DPO(f_alpha=0.5), ValueError, "f_alpha must be given with f_divergence='alpha_divergence'"),
        (lambda: fr.DPO(ld_alpha=2.0), ValueError, r"ld_alpha must lie in \[0, 1\]"),
        (lambda: fr.KTO(ld_alpha=0.5), ValueError, "ld_alpha must be None for"),
    ],
)
def test_unknown_or_senseless_options_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "objective", "message"),
    [
        ({"ref_logprobs": None}, fr.DPO(), "ref_logprobs or ref_hidden must be given for"),
        ({}, fr.SimPO(), "ref_logprobs must be None for .'simpo',., which have no reference"),
        ({"labels": LABELS}, fr.DPO(), "labels must be None for"),
        ({}, fr.KTO(), r"labels must be \(6,\), one for each sequence"),
        ({"kl": torch.zeros(())}, fr.DPO(), "kl must be a 0-d tensor, and given for kto alone"),
        ({"ref_logprobs": torch.zeros(3)}, fr.DPO(), "ref_logprobs must have the shape of targets"),
        ({"mode": "one_pass", "weight": torch.zeros(80, 6, dtype=torch.float64, requires_grad=True)}, fr.DPO(),
         "mode='one_pass' needs an objective whose terms are known token by token, or a frozen head"),
        ({"mode": "fast"}, fr.DPO(), "mode must be 'auto', 'one_pass' or 'two_phase', got 'fast'"),
    ],
)  # fmt: skip
def test_contradictory_arguments_raise(change, objective, message):
    with pytest.raises(ValueError, match=message):
        fr.linear_preference_loss(**(batch() | change), objective=objective)


def test_an_odd_number_of_sequences_or_flat_input_without_offsets_raises():
    data = batch()
    odd = {k: v if k == "weight" else v[:5] for k, v in data.items()}
    with pytest.raises(ValueError, match="as many rejected as chosen sequences, got 5"):
        fr.linear_preference_loss(**odd, objective=fr.DPO())
    flat = {k: v if k == "weight" else v.flatten(0, 1) for k, v in data.items()}
    with pytest.raises(ValueError, match="cu_seqlens must be given for flat"):
        fr.linear_preference_loss(**flat, objective=fr.DPO())


@pytest.mark.parametrize("given", ["logprobs", "sums"])
def test_thousands_of_tokens_do_not_drown_the_margin(given):
    """Sums of -12,000 nats whose log-ratios are a few: fp32 log-probs give the gradient of fp64 to fp32's own precision."""
    generator = torch.Generator().manual_seed(0)
    lp = -3 * torch.rand(4 * 8192, generator=generator)
    ref = lp + 0.02 * torch.randn(lp.shape, generator=generator)
    sequences = Sequences.of(torch.arange(4).repeat_interleave(8192), 4)
    found = {}
    for dtype in (torch.float32, torch.float64):
        reference = {"ref_logprobs": ref.to(dtype), "ref_sums": None}
        if given == "sums":
            reference = {"ref_logprobs": None, "ref_sums": sequences.sum(ref.double())}
        _, _, bound = bind(fr.DPO(), sequences=sequences, num_pairs=2, num_tokens=1, dtype=dtype, **reference)
        loss, grads = bound(slice(0, len(lp)), lp.to(dtype), None)
        assert loss.dtype == grads.logprobs.dtype == dtype
        found[dtype] = loss, grads.logprobs
    for rough, exact in zip(found[torch.float32], found[torch.float64]):
        assert relative(rough, exact) < 1e-6
