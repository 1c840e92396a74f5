"""`fr.Head` in the place of a weight, in every public function; and the sink that takes a head's gradients."""

from typing import Any

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf import losses
from fused_rlhf.kernels.interface import Needs
from tests.helpers import inputs, projection, relative, worst

B, T, H, V, R = 4, 6, 8, 31, 3


def case(seed=0):
    """A head with all that one can have, the batch of a policy and of pairs, and a reference."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    parts = {
        "weight": randn(V, H).requires_grad_(),
        "bias": randn(V).requires_grad_(),
        "lora": (randn(R, H).requires_grad_(), randn(V, R).requires_grad_(), 0.5),
        "softcap": 4.0,
        "logit_scale": 0.7,
    }
    batch = {"hidden": randn(B, T, H).requires_grad_(), "targets": torch.randint(V, (B, T), generator=g)}
    ref = {"ref_hidden": randn(B, T, H), "ref_weight": randn(V, H), "ref_bias": randn(V)}
    return parts, batch, ref


def policy(hidden, weight, targets, ref, **parts):
    return fr.linear_policy_loss(
        hidden,
        weight,
        targets,
        advantages=torch.linspace(-1, 1, B).double(),
        objective=fr.GRPO(beta=0.1),
        **ref,
        **parts,
    )[0]


def pairs(hidden, weight, targets, ref, **parts):
    return fr.linear_preference_loss(hidden, weight, targets, objective=fr.DPO(), **ref, **parts)[0]


def module(hidden, weight, targets, ref, **parts):
    loss = losses.FusedLinearDPOLoss(beta=0.2)
    return loss(hidden, weight, targets, **ref, **parts)[0]


def logprobs(hidden, weight, targets, ref, **parts):
    found = fr.linear_logprobs(hidden, weight, targets, outputs=("entropy",), **parts)
    return (found.logprobs + found.entropy).sum()


@pytest.mark.parametrize("function", [logprobs, policy, pairs, module])
def test_a_head_is_its_parts(function):
    parts, batch, ref = case()
    leaves = [batch["hidden"], parts["weight"], parts["bias"], *parts["lora"][:2]]
    weight = parts.pop("weight")
    expected = function(**batch, weight=weight, ref=ref, **parts)
    found = function(**batch, weight=fr.Head(weight, **parts), ref=ref)
    assert torch.equal(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", [policy, pairs])
def test_a_reference_may_be_a_head_of_its_own(function):
    """Its own transform and adapter; given as a weight it has the policy's transform and none."""
    parts, batch, ref = case()
    weight = parts.pop("weight")
    _, other, _ = case(seed=1)
    a, b = torch.randn(R, H, dtype=torch.float64), torch.randn(V, R, dtype=torch.float64)
    reference = fr.Head(ref["ref_weight"], ref["ref_bias"], logit_scale=1.3, lora=(a, b, 0.2))
    known = fr.linear_logprobs(other["hidden"], reference, batch["targets"]).logprobs.detach()
    expected = function(**batch, weight=weight, ref={"ref_logprobs": known}, **parts)
    given = {"ref_hidden": other["hidden"], "ref_weight": reference}
    assert worst(function(**batch, weight=weight, ref=given, **parts), expected) < 1e-13
    same = fr.Head(ref["ref_weight"], ref["ref_bias"], parts["logit_scale"], parts["softcap"])
    by_head = function(**batch, weight=weight, ref={**given, "ref_weight": same}, **parts)
    by_weight = function(**batch, weight=weight, ref={**ref, "ref_hidden": other["hidden"]}, **parts)
    assert torch.equal(by_head, by_weight)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_divergence_of_two_heads_with_all_they_can_have(kind, backend):
    """An adapter is added to the weight, which is what the keywords can say."""
    parts, batch, ref = case()
    a, b, scale = parts["lora"]
    head = fr.Head(**parts)
    other = fr.Head(ref["ref_weight"], ref["ref_bias"], 1.2, lora=(a.detach() + 1, b.detach() - 1, 0.3))
    found = fr.linear_kl(batch["hidden"], head, ref["ref_hidden"], other, kind, backend=backend)
    whole = parts["weight"] + scale * b @ a
    ref_whole = ref["ref_weight"] + 0.3 * (b.detach() - 1) @ (a.detach() + 1)
    expected = fr.linear_kl(
        batch["hidden"],
        whole,
        ref["ref_hidden"],
        ref_whole,
        kind,
        bias=parts["bias"],
        ref_bias=ref["ref_bias"],
        logit_scale=0.7,
        softcap=4.0,
        ref_logit_scale=1.2,
        backend=backend,
    )
    assert worst(found, expected) < 1e-12
    leaves = [batch["hidden"], parts["weight"], parts["bias"], a, b]
    upstream = torch.linspace(-1, 2, B * T).double().view(B, T)
    grads = zip(torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream))
    assert all(relative(mine, theirs) < 1e-11 for mine, theirs in grads)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bias": torch.zeros(V)}, r"bias must be left at None where weight is a Head, which has its own; got \(31,\)"),
        ({"logit_scale": 0.5}, "logit_scale must be left at 1.0 where weight is a Head, which has its own; got 0.5"),
        ({"softcap": 3.0}, "softcap must be left at None where weight is a Head, which has its own; got 3.0"),
        ({"lora": (1, 2, 3)}, "lora must be left at None where weight is a Head, which has its own; got an adapter"),
    ],
)
@pytest.mark.parametrize("function", [logprobs, policy, pairs, module])
def test_what_a_head_has_is_not_given_twice(function, given, message):
    parts, batch, ref = case()
    with pytest.raises(ValueError, match=message):
        function(**batch, weight=fr.Head(parts["weight"]), ref=ref, **given)


def test_what_a_reference_head_has_is_not_given_twice():
    parts, batch, ref = case()
    head = fr.Head(ref["ref_weight"])
    with pytest.raises(ValueError, match="ref_bias must be left at None where ref_weight is a Head"):
        policy(**batch, weight=parts["weight"], ref={**ref, "ref_weight": head})
    with pytest.raises(ValueError, match="ref_weight must be None without ref_hidden, got a Head"):
        policy(**batch, weight=parts["weight"], ref={"ref_logprobs": torch.zeros(B, T), "ref_weight": head})
    given: dict[str, Any] = {"ref_logit_scale": 0.5, "ref_softcap": 2.0, "softcap": 2.0, "bias": torch.zeros(V)}
    for name, value in given.items():
        with pytest.raises(ValueError, match=f"{name} must be left at"):
            fr.linear_kl(batch["hidden"], fr.Head(parts["weight"]), ref["ref_hidden"], head, **{name: value})


def test_a_head_is_checked_like_its_parts():
    data = inputs(5, 4, 9)
    for head, error, message in (
        (fr.Head(data["weight"][:, :3]), ValueError, r"weight must be \(V, H\) with H=4"),
        (fr.Head(data["weight"], torch.zeros(8)), ValueError, r"bias must be \(V,\) with V=9"),
        (fr.Head(data["weight"], softcap=-1.0), ValueError, "softcap must be finite and positive"),
        (fr.Head(data["weight"], logit_scale="1"), TypeError, "logit_scale must be a number"),  # type: ignore[arg-type]
        (fr.Head([1.0]), TypeError, "weight must be a tensor, got list"),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=message):
            fr.linear_logprobs(data["hidden"], head, data["targets"])


def test_kwargs_are_the_head_in_keywords():
    parts, batch, ref = case()
    head = fr.Head(**parts)
    assert torch.equal(
        logprobs(**batch, weight=head.weight, ref=ref, **head.kwargs()), logprobs(**batch, weight=head, ref=ref)
    )
    with pytest.raises(ValueError, match="curve must be None to be told in keywords"):
        fr.Head(parts["weight"], curve=("softcap", 1.0)).kwargs()


# ------------------------------------------------------------------------------------------------------------ the sink


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("again", [False, True])
def test_a_sink_takes_what_the_rows_of_a_head_gave(dtype, again):
    """Blocks in any order, with `again` several times each: what was added arrives, in the tensors' dtypes."""
    g = torch.Generator().manual_seed(0)
    head = projection(torch.zeros(10, 3, dtype=dtype), torch.zeros(10, dtype=dtype), lora_b=torch.zeros(10, 2))
    sink = head.sink(Needs(True, True, True, True), 4, again=again)
    weight, bias, lora = torch.zeros(10, 3), torch.zeros(10), torch.zeros(10, 2)
    for columns in [slice(4, 8), slice(0, 4), slice(8, 10)] * (3 if again else 1):
        block = sink.open(columns)
        v = columns.stop - columns.start
        more = torch.randn(v, 3, generator=g), torch.randn(v, generator=g), torch.randn(v, 2, generator=g)
        block.weight.copy_(more[0]) if block.fresh else block.weight.add_(more[0])
        block.bias.add_(more[1])
        block.lora.add_(more[2])
        block.fresh = False
        sink.close(block)
        for whole, part in zip((weight, bias, lora), more):
            whole[columns] += part
    found = sink.grads(None)
    assert (found.hidden, found.weight.dtype, found.bias.dtype, found.lora.dtype) == (None, dtype, dtype, torch.float32)
    step = torch.finfo(dtype).eps
    assert worst(found.weight, weight) <= step * weight.abs().max()
    assert worst(found.bias, bias) <= step * bias.abs().max()
    assert torch.equal(found.lora, lora)


@pytest.mark.parametrize("again", [False, True])
def test_a_block_that_nothing_was_added_to_is_zero(again):
    head = projection(torch.ones(10, 3))
    sink = head.sink(Needs(False, True, False), 4, again=again)
    for columns in (slice(0, 4), slice(4, 8), slice(8, 10)):
        sink.close(sink.open(columns))
    assert torch.equal(sink.grads(None).weight, torch.zeros(10, 3))
    assert sink.grads(None)[2:] == (None, None)


def test_a_block_is_scaled_on_its_way_home():
    head = projection(torch.zeros(4, 2, dtype=torch.float16), torch.zeros(4))
    sink = head.sink(Needs(False, True, True), 4)
    block = sink.open(slice(0, 4))
    block.weight.fill_(2.0)
    block.bias.fill_(3.0)
    block.fresh = False
    sink.close(block, torch.tensor(0.5))
    found = sink.grads(None, torch.tensor(0.5))
    assert (found.weight == 1).all()
    assert (found.bias == 1.5).all()
