import math

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf import objectives
from tests.helpers import dense, inputs, relative, worst


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


@pytest.mark.parametrize("surrogate", sorted(objectives.SURROGATES))
@pytest.mark.parametrize("kl", sorted(objectives.KL_ESTIMATORS))
def test_gradcheck_of_every_surrogate_and_kl(surrogate, kl):
    lp, old, ref, adv = vectors(12)
    lengths = torch.full_like(lp, 4.0)
    loss = fr.PolicyLoss(surrogate, kl=kl, beta=0.3, entropy_coef=0.2)
    offsets = torch.tensor([0, 5, 5, 12])
    bound = loss.bind(
        advantages=adv,
        lengths=lengths,
        offsets=offsets,
        old_logprobs=old,
        ref_logprobs=ref,
        num_sequences=3,
        num_tokens=12,
    )
    entropy = torch.rand_like(lp).requires_grad_()
    rows = slice(0, 12)
    assert torch.autograd.gradcheck(lambda l, h: bound.per_token(rows, l, h), [lp.requires_grad_(), entropy])
    value, grads = bound(slice(3, 9), lp[3:9], entropy[3:9])
    truth = torch.autograd.grad(bound.per_token(rows, lp, entropy).sum(), [lp, entropy])
    assert worst(value, bound.per_token(rows, lp, entropy)[3:9].detach()) == 0
    assert worst(grads.logprobs, truth[0][3:9]) < 1e-15
    assert worst(grads.entropy, truth[1][3:9]) < 1e-15


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
        k: (v.detach() * m).sum() / m.sum() for k, v in {"kl": kl, "ratio": ratio, "entropy": truth["entropy"]}.items()
    }
    low, high = (ratio < 0.9) & (a < 0), (ratio > 1.3) & (a > 0)
    for key, clipped in (("low", low), ("high", high), ("region", low | high)):
        mean[f"clip_ratio/{key}_mean"] = (clipped * m).sum() / m.sum()
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
        assert metrics["ratio"] == 1
        grads.append(hidden.grad)
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fr.PolicyLoss("ppo"), ValueError, r"surrogate must be one of \['ppo_clip'\], got 'ppo'"),
        (lambda: fr.PolicyLoss(token_weight="mean"), ValueError, "token_weight must be one of"),
        (lambda: fr.GRPO(kl="k4"), ValueError, r"kl must be one of \['k1', 'k2', 'k3'\], got 'k4'"),
        (lambda: fr.GRPO(beta=-1.0), ValueError, "beta must be finite and >= 0, got -1.0"),
        (lambda: fr.GRPO(entropy_coef=math.nan), ValueError, "entropy_coef must be finite"),
        (lambda: fr.GRPO(epsilon_lo=0.1), TypeError, r"epsilon_lo is no option of ppo_clip .*epsilon_low"),
        (lambda: fr.GRPO(epsilon_low=0.0), ValueError, "epsilon_low must be finite and > 0"),
        (lambda: fr.GRPO(level="word"), ValueError, r"level must be one of \['token', 'sequence'\], got 'word'"),
        (lambda: fr.GRPO(max_completion_length=5), TypeError, "max_completion_length is no option"),
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
    assert metrics["ratio"] > 0


def test_one_pass_is_refused_at_sequence_level():
    data = inputs(4, 3, 9)
    with pytest.raises(ValueError, match=r"one_pass.* needs a token-level objective, got level='sequence'"):
        fr.linear_policy_loss(
            data["hidden"],
            data["weight"],
            data["targets"],
            advantages=torch.ones(4),
            objective=fr.GSPO(),
            mode="one_pass",
        )
