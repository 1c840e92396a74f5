import math
from pathlib import Path

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf import objectives
from fused_rlhf.segments import Sequences
from tests import forks
from tests.helpers import dense, inputs, relative, worst

ROOT = Path(__file__).resolve().parents[1]


def vectors(n=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lp = -torch.rand(n, generator=generator, dtype=torch.float64) * 3
    old = lp + 0.4 * torch.randn(n, generator=generator, dtype=torch.float64)
    ref = lp + 0.4 * torch.randn(n, generator=generator, dtype=torch.float64)
    return lp, old, ref, torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("delta", [None, 1.5])
def test_ppo_clip_by_cases(delta):
    """The two-sided clip written out per token, in plain Python."""
    lp, old, _, adv = vectors()
    found = objectives.ppo_clip(lp, old, adv, epsilon_low=0.2, epsilon_high=0.28, delta=delta)
    for i in range(len(lp)):
        r, a = math.exp(lp[i] - old[i]), adv[i].item()
        first = (min(r, delta) if delta else r) * a
        second = min(max(r, 0.8), 1.28) * a
        assert found[i].item() == pytest.approx(-min(first, second), abs=1e-13)


def test_kl_estimators():
    """k1, k2, k3 against their definitions; k3 is never negative and unbiased: its mean under pi is the KL."""
    p = torch.softmax(torch.randn(40, dtype=torch.float64), -1)
    q = torch.softmax(torch.randn(40, dtype=torch.float64), -1)
    true = (p * (p / q).log()).sum()
    assert worst((p * objectives.k1(p.log(), q.log())).sum(), true) < 1e-14
    assert worst((p * objectives.k3(p.log(), q.log())).sum(), true) < 1e-14
    assert (objectives.k3(p.log(), q.log()) >= 0).all()
    assert worst(objectives.k2(p.log(), q.log()), (p / q).log() ** 2 / 2) < 1e-14


OPTIONS = {"clip_cov": {"cov_low": 0.01, "share": 0.3}, "kl_cov": {"share": 0.3}}
LEVELS = {name: ["token"] if name in ("vespo", "gmpo", "clip_cov", "kl_cov") else objectives.LEVELS
          for name in objectives.SURROGATES}  # fmt: skip
OFFSETS = torch.tensor([0, 5, 5, 12])


def bind(loss, old, ref, adv, sampling=None, offsets=OFFSETS, **counts):
    lengths = offsets.diff()
    index = torch.arange(len(lengths)).repeat_interleave(lengths)
    return loss.bind(
        advantages=adv,
        sequences=Sequences.of(index, len(lengths)),
        old_logprobs=old,
        ref_logprobs=ref,
        sampling_logprobs=sampling,
        **({"num_sequences": len(lengths), "num_tokens": len(index)} | counts),
    )


def cases():
    """Every surrogate at every level; every KL estimator, with and without bias correction; every mask."""
    for name, levels in LEVELS.items():
        for level in levels:
            yield pytest.param(
                {"surrogate": name, "level": level, "options": OPTIONS.get(name, {})}, id=f"{name}-{level}"
            )
    for kl in objectives.KL_ESTIMATORS:
        for corrected in (False, True):
            yield pytest.param({"kl": kl, "beta": 0.3, "use_bias_correction_kl": corrected}, id=f"{kl}-{corrected}")
    yield pytest.param({"off_policy_mask_threshold": 0.01, "beta": 0.2}, id="off-policy")
    yield pytest.param({"top_entropy_quantile": 0.4, "entropy_coef": 0.2}, id="entropy")
    for how in objectives.CORRECTIONS:
        bounds = {"importance_sampling_min": 0.7, "importance_sampling_max": 1.3}
        yield pytest.param({"importance_sampling": how, "beta": 0.2, **bounds}, id=how)


@pytest.mark.parametrize("case", cases())
def test_gradcheck(case):
    lp, old, ref, adv = vectors(12)
    loss = fr.PolicyLoss(**case)
    sampling = old + 0.2 if loss.importance_sampling or loss.off_policy_mask_threshold else None
    bound = bind(loss, old, ref, adv, sampling)
    entropy = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    rows = slice(0, 12)
    lp.requires_grad_()
    if loss.kl == "k3+" and loss.beta:  # its gradient is by design not that of its value
        found = torch.autograd.grad(bound.per_token(rows, lp, entropy).sum(), lp)[0]
        k2 = fr.PolicyLoss(**(case | {"kl": "k2"}))
        if not loss.use_bias_correction_kl:
            expected = torch.autograd.grad(bind(k2, old, ref, adv).per_token(rows, lp, entropy).sum(), lp)[0]
            assert worst(found, expected) < 1e-15
    elif loss.surrogate in ("cispo", "vespo") or loss.level == "sequence_token":  # weights without gradient
        weights = bound.core(rows, lp, bound.compared(rows, lp)).detach()
        assert weights.isfinite().all()
    else:
        wanted = [lp, entropy] if loss.entropy_coef else [lp]
        assert torch.autograd.gradcheck(
            lambda *x: bound.per_token(rows, x[0], x[-1] if len(x) > 1 else entropy), wanted
        )
    value, grads = bound(rows, lp, entropy)
    total = bound.per_token(rows, lp, entropy)
    truth = torch.autograd.grad(total.sum(), [lp, entropy], allow_unused=True)
    assert worst(value, total.detach()) == 0
    assert worst(grads.logprobs, truth[0]) < 1e-15
    assert (grads.entropy is None) == (loss.entropy_coef == 0)
    if loss.tokenwise:
        assert worst(bound(slice(3, 9), lp[3:9], entropy[3:9])[0], value[3:9]) == 0


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    """min(max(-A r, -A clip r), -A c) where A < 0, token by token."""
    lp, old, _, adv = vectors()
    found = objectives.ppo_clip(lp + 2, old, adv, dual_clip=3.0)
    for i in range(len(lp)):
        r, a = math.exp(lp[i] + 2 - old[i]), adv[i].item()
        two_sided = max(-a * r, -a * min(max(r, 0.8), 1.2))
        assert found[i].item() == pytest.approx(min(two_sided, -a * 3.0) if a < 0 else two_sided, abs=1e-12)
    assert (found[adv < 0] == -3.0 * adv[adv < 0]).any()


@pytest.mark.parametrize("name", ["cispo", "sapo"])
def test_soft_and_capped_ratios_by_cases(name):
    lp, old, _, adv = vectors()
    found = objectives.SURROGATES[name](lp, old, adv)
    for i in range(len(lp)):
        r, a = math.exp(lp[i] - old[i]), adv[i].item()
        tau = 1.0 if a > 0 else 1.05
        expected = {"cispo": -min(r, 5.0) * a * lp[i].item(), "sapo": -4 / tau / (1 + math.exp(-tau * (r - 1))) * a}
        assert found[i].item() == pytest.approx(expected[name], abs=1e-13)


def test_levels_compare_the_mean_or_the_sum_of_a_sequence():
    lp, old, ref, adv = vectors(12)
    rows = slice(0, 12)
    for level, reduce in (("sequence", torch.mean), ("sequence_sum", torch.sum)):
        bound = bind(fr.PolicyLoss(level=level), old, ref, adv)
        log_ratio = lp - bound.compared(rows, lp)
        for start, end in ((0, 5), (5, 12)):
            assert worst(log_ratio[start:end], reduce((lp - old)[start:end])) < 1e-14
    token = bind(fr.PolicyLoss("reinforce", level="sequence_token"), old, ref, adv)
    lp.requires_grad_()
    ratio = (lp - token.compared(rows, lp)).exp()
    (by_lp,) = torch.autograd.grad(ratio.sum(), lp)
    assert worst(by_lp, ratio.detach()) < 1e-14  # the token's own gradient, the sequence's value
    assert worst(ratio[:5].detach(), (lp - old)[:5].mean().exp().detach()) < 1e-14


def test_clip_cov_drops_and_kl_cov_penalises_only_tokens_of_high_covariance():
    lp, old, _, adv = vectors(200)
    batch = objectives.Surroundings(Sequences.of(torch.zeros(200, dtype=torch.int64), 1), None)
    cov = (adv - adv.mean()) * (lp - lp.mean())
    plain = objectives.ppo_clip(lp, old, adv)
    dropped = objectives.clip_cov(lp, old, adv, batch, share=0.05, cov_low=0.1, cov_high=1.0) == 0
    assert 0 < dropped[plain != 0].sum() <= 10
    assert ((cov > 0.1) & (cov < 1.0))[dropped & (plain != 0)].all()
    added = objectives.kl_cov(lp, old, adv, batch, share=0.05, kl_coef=2.0) + (lp - old).exp() * adv
    assert worst(added, torch.where(cov >= cov.topk(10).values[-1], 2.0 * (lp - old).abs(), 0.0)) < 1e-14


def test_quantile_is_torchs():
    values = torch.rand(1001, dtype=torch.float64)
    for q in (0.0, 0.1234, 0.5, 0.8, 1.0):
        assert worst(objectives.quantile(values, q), torch.quantile(values, q)) < 1e-15


def test_token_weights():
    lengths = torch.tensor([2.0, 2.0, 3.0, 3.0, 3.0])
    assert objectives.sequence_mean(lengths, 2, 5).sum() == pytest.approx(1.0)
    assert objectives.token_mean(lengths, 2, 5).tolist() == pytest.approx([0.2] * 5)
    assert objectives.fixed_length(lengths, 2, 5, max_completion_length=10).tolist() == pytest.approx([0.05] * 5)
    with pytest.raises(ValueError, match="max_completion_length must be given"):
        objectives.fixed_length(lengths, 2, 5)


@pytest.mark.parametrize("mode", ["one_pass", "two_phase"])
def test_grpo_with_kl_and_entropy_equals_the_dense_formula(mode):
    data = inputs(24, 6, 80)
    _, old, ref, _ = vectors(24)
    old, ref = old - 3, ref - 3
    advantages = torch.randn(4, dtype=torch.float64)
    shaped = {k: data[k].view(4, 6, *data[k].shape[1:]) for k in ("hidden", "targets")}
    mask = torch.rand(4, 6) > 0.3

    def leaves():
        return shaped["hidden"].clone().requires_grad_(), data["weight"].clone().requires_grad_()

    hidden, weight = leaves()
    loss, metrics = fr.linear_policy_loss(
        hidden, weight, shaped["targets"], advantages=advantages, completion_mask=mask, mode=mode,
        old_logprobs=old.view(4, 6), ref_logprobs=ref.view(4, 6),
        objective=fr.GRPO(beta=0.1, entropy_coef=0.05, epsilon_low=0.1, epsilon_high=0.3),
    )  # fmt: skip
    (3.7 * loss).backward()

    x, w = leaves()
    truth = dense(x, w, shaped["targets"])
    lp, m = truth["logprobs"], mask.double()
    ratio = (lp - old.view(4, 6)).exp()
    a = advantages[:, None]
    kl = (ref.view(4, 6) - lp).exp() - (ref.view(4, 6) - lp) - 1
    token = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.3) * a) + 0.1 * kl
    expected = ((token * m).sum(1) / m.sum(1).clamp(min=1)).mean() - 0.05 * (truth["entropy"] * m).sum() / m.sum()
    (3.7 * expected).backward()
    assert worst(loss, expected) < 1e-13
    assert relative(hidden.grad, x.grad) < 1e-12
    assert relative(weight.grad, w.grad) < 1e-12
    mean = {
        k: (v.detach() * m).sum() / m.sum()
        for k, v in {"kl": kl, "ratio_mean": ratio, "entropy": truth["entropy"]}.items()
    }
    low, high = (ratio < 0.9) & (a < 0), (ratio > 1.3) & (a > 0)
    for key, clipped in (("low", low), ("high", high), ("region", low | high)):
        mean[f"clip_ratio/{key}_mean"] = (clipped * m).sum() / m.sum()
    kept = [(value[keep].mean() if keep.any() else None) for value, keep in zip(low.double(), mask)]
    mean["clip_ratio/low_min"] = torch.stack([value for value in kept if value is not None]).min()
    kept = [(value[keep].mean() if keep.any() else None) for value, keep in zip(high.double(), mask)]
    mean["clip_ratio/high_max"] = torch.stack([value for value in kept if value is not None]).max()
    real = ratio.detach()[mask]
    mean["ratio_var"] = real.var(unbiased=False)
    mean["approx_kl"] = (0.5 * (lp.detach() - old.view(4, 6)) ** 2)[mask].mean()
    assert set(metrics) == set(mean)
    for key, value in mean.items():
        assert worst(metrics[key], value) < 1e-12, key


def test_on_policy_without_old_logprobs_has_the_gradient_of_the_policy():
    data = inputs(5, 3, 11)
    grads = []
    for old in (None, fr.linear_logprobs(**data).logprobs):
        hidden = data["hidden"].clone().requires_grad_()
        loss, metrics = fr.linear_policy_loss(
            hidden, data["weight"], data["targets"], advantages=torch.ones(5), old_logprobs=old, objective=fr.GRPO()
        )
        loss.backward()
        assert metrics["ratio_mean"] == 1
        grads.append(hidden.grad)
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fr.PolicyLoss("ppo"), ValueError, r"surrogate must be one of \['cispo', .*'ppo_clip'.*\], got 'ppo'"),
        (lambda: fr.PolicyLoss(token_weight="mean"), ValueError, "token_weight must be one of"),
        (lambda: fr.GRPO(kl="k4"), ValueError, r"kl must be one of \['k1', 'k2', 'k3', 'k3\+'\], got 'k4'"),
        (lambda: fr.GRPO(beta=-1.0), ValueError, "beta must be finite and >= 0, got -1.0"),
        (lambda: fr.GRPO(entropy_coef=math.nan), ValueError, "entropy_coef must be finite"),
        (lambda: fr.GRPO(epsilon_lo=0.1), TypeError, "epsilon_lo is no .*epsilon_low"),  # type: ignore[call-arg]
        (lambda: fr.GRPO(epsilon_low=0.0), ValueError, "epsilon_low must be finite and > 0"),
        (lambda: fr.GRPO(level="word"), ValueError, r"level must be one of \['sequence', .*'token'\], got 'word'"),
        (lambda: fr.GRPO(max_completion_length=5), TypeError, "max_.* is no option"),  # type: ignore[call-arg]
        (lambda: fr.CISPO(delta=2.0), TypeError, "delta is no option of cispo"),  # type: ignore[call-arg]
        (
            lambda: fr.GRPO(use_bias_correction_kl=True),
            ValueError,
            "use_bias_correction_kl must be False when beta is 0",
        ),
        (lambda: fr.GRPO(top_entropy_quantile=0.0), ValueError, r"top_entropy_quantile must lie in \(0, 1\], got 0.0"),
        (lambda: fr.GRPO(importance_sampling="tis"), ValueError, "importance_sampling must be one of"),
        (lambda: fr.GRPO(importance_sampling="token_mask"), ValueError, "importance_sampling_min or .*got neither"),
        (lambda: fr.GRPO(importance_sampling_max=2.0), ValueError, "importance_sampling must be one of .*got None"),
        (lambda: fr.VESPO(level="sequence"), ValueError, "level must be 'token' for vespo"),
        (lambda: fr.GMPO(top_entropy_quantile=0.5), ValueError, "top_entropy_quantile must be 1 for gmpo"),
        (lambda: fr.PPO(dual_clip=0.5), ValueError, "dual_clip must be above 1, got 0.5"),
        (lambda: fr.GRPO(epsilon_low=1.5), ValueError, "epsilon_low must be below 1, got 1.5"),
    ],
)
def test_unknown_or_senseless_options_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


def sequence_loss(lp, old, ref, adv, mask, beta):
    """GSPO written out sequence by sequence: one ratio each, (B, T) advantages."""
    total = 0.0
    for i in range(len(lp)):
        m = mask[i]
        if not m.any():
            continue
        ratio = (lp[i][m] - old[i][m]).mean().exp()
        token = -torch.minimum(ratio * adv[i][m], ratio.clamp(0.9, 1.2) * adv[i][m])
        d = ref[i][m] - lp[i][m]
        total = total + (token + beta * (d.exp() - d - 1)).mean()
    return total / len(lp)


@pytest.mark.parametrize("per_token_advantages", [False, True])
def test_sequence_level_equals_the_formula_sequence_by_sequence(per_token_advantages):
    data = inputs(24, 6, 80)
    hidden, weight = data["hidden"].view(4, 6, -1).requires_grad_(), data["weight"].requires_grad_()
    targets = data["targets"].view(4, 6)
    mask = torch.rand(4, 6) > 0.3
    mask[2] = False
    exact = dense(hidden, weight, targets)["logprobs"]
    old, ref = (exact.detach() + 0.2 * torch.randn(4, 6, dtype=torch.float64) for _ in range(2))
    adv = torch.randn(4, 6, dtype=torch.float64) if per_token_advantages else torch.randn(4, dtype=torch.float64)
    loss, metrics = fr.linear_policy_loss(
        hidden, weight, targets, advantages=adv, completion_mask=mask, old_logprobs=old, ref_logprobs=ref,
        objective=fr.GSPO(beta=0.1, epsilon_low=0.1, epsilon_high=0.2),
    )  # fmt: skip
    truth = sequence_loss(exact, old, ref, adv if adv.dim() == 2 else adv[:, None].expand(4, 6), mask, 0.1)
    assert worst(loss, truth) < 1e-13
    for ours, theirs in zip(
        torch.autograd.grad(3.7 * loss, [hidden, weight]), torch.autograd.grad(3.7 * truth, [hidden, weight])
    ):
        assert relative(ours, theirs) < 1e-12
    assert metrics["ratio_mean"] > 0


def test_one_pass_is_refused_at_sequence_level():
    data = inputs(4, 3, 9)
    with pytest.raises(ValueError, match=r"one_pass.* needs an objective whose terms are known token by token"):
        fr.linear_policy_loss(
            data["hidden"],
            data["weight"].requires_grad_(),
            data["targets"],
            advantages=torch.ones(4),
            objective=fr.GSPO(),
            mode="one_pass",
        )


def batch(n=24, t=6, seed=3):
    data = inputs(n, 6, 80, seed=seed)
    shape = (n // t, t)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) > 0.3
    mask[1] = False
    old, ref, sampling = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 - 4 for _ in range(3))
    return {
        "hidden": data["hidden"].view(*shape, 6),
        "weight": data["weight"],
        "targets": data["targets"].view(shape),
        "advantages": torch.randn(shape[0], generator=generator, dtype=torch.float64),
        "completion_mask": mask,
        "old_logprobs": old,
        "ref_logprobs": ref,
        "sampling_logprobs": sampling,
    }


def objective_of(name):
    """Each preset with what its own options allow of KL and corrections."""
    extra = {"max_completion_length": 10} if name == "dr_grpo" else {}
    return objectives.PRESETS[name](
        beta=0.1, importance_sampling="token_truncate", importance_sampling_max=2.0, **extra
    )


def run(objective, data, frozen=False, **options):
    hidden = data["hidden"].clone().requires_grad_()
    weight = data["weight"].clone().requires_grad_(not frozen)
    loss, metrics = fr.linear_policy_loss(
        **(data | {"hidden": hidden, "weight": weight}), objective=objective, **options
    )
    (3.7 * loss).backward(retain_graph=True)
    return loss.detach(), hidden.grad, weight.grad, metrics


@pytest.mark.parametrize("name", sorted(objectives.PRESETS))
def test_every_preset_gives_the_same_by_every_route_and_backend(name):
    """one_pass, two_phase and the frozen head's route, chunked and reference, against each other."""
    data, objective = batch(), objective_of(name)
    truth = run(objective, data, mode="two_phase", backend="reference")
    found = {"two_phase": run(objective, data, mode="two_phase", backend="chunked")}
    if objective.tokenwise:
        found["one_pass"] = run(objective, data, mode="one_pass", backend="chunked")
    for backend in ("chunked", "reference"):
        found[f"frozen {backend}"] = run(objective, data, frozen=True, mode="one_pass", backend=backend)
    for route, (loss, d_hidden, d_weight, metrics) in found.items():
        assert worst(loss, truth[0]) < 1e-12, route
        assert relative(d_hidden, truth[1]) < 1e-11, route
        assert (d_weight is None) == route.startswith("frozen")
        if d_weight is not None:
            assert relative(d_weight, truth[2]) < 1e-11, route
        for key, value in metrics.items():
            assert worst(value, truth[3][key]) < 1e-11, (route, key)


def test_the_reference_computed_in_the_call_equals_the_one_given():
    data = batch()
    generator = torch.Generator().manual_seed(9)
    ref_hidden = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)
    ref_weight = torch.randn(80, 5, generator=generator, dtype=torch.float64)
    given = fr.linear_logprobs(ref_hidden, ref_weight, data["targets"], temperature=0.7).logprobs
    objective = fr.GRPO(beta=0.3, off_policy_mask_threshold=0.1)
    first = run(objective, data | {"ref_logprobs": given}, temperature=0.7)
    del data["ref_logprobs"]
    second = run(objective, data, temperature=0.7, ref_hidden=ref_hidden, ref_weight=ref_weight)
    for a, b in zip(first[:3], second[:3]):
        assert relative(a, b) < 1e-13


@pytest.mark.parametrize(
    ("change", "objective", "message"),
    [
        ({}, fr.GRPO(), "sampling_logprobs must be None unless"),
        ({"sampling_logprobs": None}, fr.GRPO(importance_sampling="token_mask", importance_sampling_max=2.0),
         "sampling_logprobs must be given for importance_sampling='token_mask'"),
        ({"old_logprobs": None}, fr.GRPO(importance_sampling="token_mask", importance_sampling_max=2.0),
         "old_logprobs must be given for importance_sampling='token_mask'"),
        ({"ref_hidden": torch.zeros(4, 6, 6)}, fr.GRPO(off_policy_mask_threshold=1.0),
         "ref_logprobs must be None where ref_hidden is given"),
        ({"ref_weight": torch.zeros(80, 6)}, fr.GRPO(off_policy_mask_threshold=1.0), "ref_weight must be None without"),
        ({"ref_logprobs": None, "ref_hidden": torch.zeros(4, 5, 6)}, fr.GRPO(off_policy_mask_threshold=1.0),
         r"ref_hidden must be \(4, 6, 6\), got \(4, 5, 6\)"),
        ({"ref_logprobs": None}, fr.GRPO(beta=0.1, off_policy_mask_threshold=1.0),
         "ref_logprobs or ref_hidden must be given when beta is not 0"),
    ],
)  # fmt: skip
def test_contradictory_arguments_raise(change, objective, message):
    with pytest.raises(ValueError, match=message):
        fr.linear_policy_loss(**(batch() | change), objective=objective)


RANKS = """
import sys, torch
from fused_rlhf.objectives import high_entropy
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
entropy = torch.load(f"{folder}/entropy.pt")[rank]
torch.save(high_entropy(entropy, 0.3), f"{folder}/keep{rank}.pt")
torch.distributed.destroy_process_group()  # waits for the threads that still hold its tensors
"""


@pytest.mark.slow
def test_the_entropy_threshold_is_that_of_all_ranks(tmp_path):
    """Three processes with 7, 0 and 20 tokens choose the tokens that one process would."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand(27, generator=generator, dtype=torch.float64)
    torch.save(whole.split([7, 0, 20]), tmp_path / "entropy.pt")
    log = tmp_path / "log"
    running = [forks.start(["-c", RANKS, str(r), str(tmp_path)], tmp_path, {}, log) for r in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0], log.read_text()
    found = torch.cat([torch.load(tmp_path / f"keep{rank}.pt") for rank in range(3)])
    assert torch.equal(found, objectives.high_entropy(whole, 0.3))
    assert 0 < found[:7].sum() < 7


def test_which_surrogates_say_nothing_of_sequences_without_an_advantage():
    """Tried, not listed: one of a user's may have a term that asks for no advantage, or compare sequences."""
    from fused_rlhf.objectives.surrogates import SURROGATES, silent_at_zero

    @fr.objectives.surrogate
    def tethered(logprob, old, advantage):
        return -(logprob - old).exp() * advantage + 0.1 * (logprob - old).square()

    @fr.objectives.surrogate
    def ranked(logprob, old, advantage, batch):
        return -(logprob - old).exp() * advantage * (1 + (logprob - old).mean().detach())

    try:
        assert not silent_at_zero("tethered", {})
        assert not silent_at_zero("ranked", {})
    finally:
        del SURROGATES["tethered"], SURROGATES["ranked"]
    for name in ("grpo", "gspo", "cispo", "sapo", "vespo", "gmpo", "ppo", "reinforce"):
        assert objectives.PRESETS[name]().silent_at_zero, name
    assert not fr.GRPO(top_entropy_quantile=0.5).silent_at_zero
