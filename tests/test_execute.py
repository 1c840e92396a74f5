"""How an objective is computed: in one pass, under a frozen head, in two phases."""

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf.op import execute
from tests.helpers import ALL_OUTPUTS, inputs, leaf, relative

BACKENDS = ["reference", "chunked"]


@pytest.mark.parametrize("mode", ["one_pass", "two_phase"])
def test_backward_twice_with_an_upstream_that_is_not_one(mode):
    data = inputs(37, 8, 1003)
    advantages = torch.linspace(-1, 1, 37, dtype=torch.float64)

    def gradient(*scales):
        hidden, weight = leaf(data["hidden"]), leaf(data["weight"])
        loss, _ = fr.linear_policy_loss(
            hidden, weight, data["targets"], advantages=advantages, objective=fr.GRPO(), mode=mode
        )
        for scale in scales[:-1]:
            (scale * loss).backward(retain_graph=True)
        (scales[-1] * loss).backward()
        return hidden.grad, weight.grad

    for twice, once in zip(gradient(3.7, 1.0), gradient(4.7)):
        assert relative(twice, once) < 1e-14


def test_one_pass_refuses_a_backward_that_retained_nothing():
    data = inputs(4, 3, 9)
    loss, _ = fr.linear_policy_loss(
        leaf(data["hidden"]), data["weight"], data["targets"], advantages=torch.ones(4), objective=fr.GRPO()
    )
    doubled = 2 * loss
    doubled.backward()
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 3])
def test_no_tokens_gives_differentiable_zeros(backend, rows):
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.full((rows,), -100)
    found = fr.linear_logprobs(hidden, weight, targets, outputs=ALL_OUTPUTS, backend=backend)
    loss, metrics = fr.linear_policy_loss(
        hidden, weight, targets, advantages=torch.ones(rows), objective=fr.GRPO(), outputs=("entropy",), backend=backend
    )
    assert loss == 0
    assert all(torch.isfinite(v) for v in metrics.values())
    (found.logprobs.sum() + found.entropy.sum() + loss).backward()
    assert (weight.grad == 0).all()
    assert weight.grad.shape == weight.shape
    assert hidden.grad.shape == hidden.shape


GRPO, ENTROPY, GSPO, DPO = fr.GRPO(), fr.PPO(entropy_coef=0.1), fr.GSPO(), fr.DPO()


@pytest.mark.parametrize(
    ("objective", "frozen", "mode", "route"),
    [
        (GRPO, False, "auto", "one_pass"),
        (GRPO, True, "auto", "one_pass"),
        (GRPO, False, "two_phase", "two_phase"),
        (ENTROPY, False, "auto", "one_pass"),  # token by token, the entropy too
        (GSPO, False, "auto", "two_phase"),  # looks beyond a token
        (GSPO, True, "auto", "frozen"),
        (GSPO, True, "one_pass", "frozen"),
        (fr.GSPO(entropy_coef=0.1), True, "auto", "two_phase"),  # the entropy's gradient needs the logits
        (fr.GRPO(top_entropy_quantile=0.5), True, "auto", "frozen"),  # its value alone does not
        (DPO, False, "auto", "two_phase"),
        (DPO, True, "auto", "frozen"),
        (DPO, True, "two_phase", "two_phase"),
    ],
)
def test_one_function_decides_for_policies_and_preferences(monkeypatch, objective, frozen, mode, route):
    taken = []
    for name, of in (("_one_pass_loss", "one_pass"), ("_frozen_logprobs", "frozen"), ("linear_logprobs", "two_phase")):
        original = getattr(execute, name)
        monkeypatch.setattr(execute, name, lambda *a, f=original, n=of: (taken.append(n), f(*a))[1])
    data = inputs(12, 4, 40)
    hidden, weight = leaf(data["hidden"]).view(2, 6, 4), data["weight"].clone().requires_grad_(not frozen)
    targets = data["targets"].view(2, 6)
    options = {"objective": objective, "mode": mode}

    def loss():
        if isinstance(objective, fr.PreferenceLoss):
            ref = torch.zeros(2, 6, dtype=torch.float64)
            return fr.linear_preference_loss(hidden, weight, targets, ref_logprobs=ref, **options)[0]
        return fr.linear_policy_loss(hidden, weight, targets, advantages=torch.tensor([1.0, -1.0]), **options)[0]

    gradient = torch.autograd.grad(loss(), hidden)[0]
    assert taken == [route]
    if mode == "auto":
        taken.clear()
        with torch.no_grad():
            loss()
        assert taken == ["two_phase"]  # where no gradient is wanted there is nothing to hold
        options["mode"] = "two_phase"
        assert relative(gradient, torch.autograd.grad(loss(), hidden)[0]) < 1e-12
