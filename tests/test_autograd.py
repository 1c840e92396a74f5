import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fused_rlhf as fr
from fused_rlhf import autograd, chunked
from fused_rlhf.kernels.interface import Grads
from tests.helpers import ALL_OUTPUTS, dense, inputs, relative, worst

BACKENDS = ["reference", "chunked"]


def leaf(tensor):
    return tensor.clone().requires_grad_()


@pytest.fixture
def backward_calls(monkeypatch):
    """What reaches the chunked backend's backward: (number of rows, needs) per call."""
    calls = []
    original = chunked.backward

    def watched(hidden, head, targets, temperature, stats, grads, needs):
        calls.append((hidden.shape[0], needs))
        return original(hidden, head, targets, temperature, stats, grads, needs)

    monkeypatch.setattr(chunked, "backward", watched)
    return calls


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("output", ["logprobs", "entropy", "lse"])
def test_gradcheck(backend, softcap, output):
    data = inputs(5, 3, 19, bias=True, per_token=True)
    data["targets"][1] = -100

    def f(hidden, weight, bias):
        options = {**data, "hidden": hidden, "weight": weight, "bias": bias}
        outputs = () if output == "logprobs" else (output,)
        found = fr.linear_logprobs(**options, logit_scale=0.8, softcap=softcap, outputs=outputs, backend=backend)
        return getattr(found, output)

    assert torch.autograd.gradcheck(f, [leaf(data[k]) for k in ("hidden", "weight", "bias")])


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


def test_rows_with_zero_upstream_never_reach_the_backend(backward_calls):
    data = inputs(20, 6, 50)
    upstream = torch.zeros(20, dtype=torch.float64)
    upstream[[2, 7, 11]] = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    results = []
    for rows in (slice(None), [2, 7, 11]):
        hidden, weight = leaf(data["hidden"]), leaf(data["weight"])
        found = fr.linear_logprobs(hidden[rows], weight, data["targets"][rows], backend="chunked")
        (found.logprobs * upstream[rows]).sum().backward()
        results.append((hidden.grad, weight.grad))
    assert [rows for rows, _ in backward_calls] == [3, 3]
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_no_row_with_a_gradient_means_no_work(backward_calls):
    data = inputs(6, 4, 30)
    hidden, weight = leaf(data["hidden"]), leaf(data["weight"])
    (fr.linear_logprobs(hidden, weight, data["targets"], backend="chunked").logprobs * 0.0).sum().backward()
    assert backward_calls == []
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize(("train_hidden", "train_weight"), [(True, False), (False, True)])
@pytest.mark.parametrize("mode", ["one_pass", "two_phase"])
def test_frozen_parts_get_no_gradient_and_no_work(monkeypatch, backward_calls, train_hidden, train_weight, mode):
    data = inputs(6, 4, 30)
    hidden = data["hidden"].requires_grad_(train_hidden)
    weight = data["weight"].requires_grad_(train_weight)
    products = []
    original = chunked.add_product_
    monkeypatch.setattr(
        chunked,
        "add_product_",
        lambda total, *rest, **more: (products.append(total.shape), original(total, *rest, **more)),
    )
    loss, _ = fr.linear_policy_loss(
        hidden, weight, data["targets"], advantages=torch.ones(6), objective=fr.GRPO(), mode=mode, backend="chunked"
    )
    loss.backward()
    assert (hidden.grad is not None, weight.grad is not None) == (train_hidden, train_weight)
    assert set(products) == {hidden.shape if train_hidden else weight.shape}


def test_ignored_rows_cost_nothing_and_may_hold_nan(monkeypatch):
    seen = []
    original = chunked.forward
    monkeypatch.setattr(
        chunked, "forward", lambda hidden, *rest: (seen.append(hidden.shape[0]), original(hidden, *rest))[1]
    )
    data = inputs(12, 4, 40, per_token=True)
    ignored = torch.tensor([0, 5, 11])
    data["targets"][ignored] = -100
    data["hidden"][ignored] = torch.nan
    data["temperature"][ignored] = 0.0
    hidden, weight = leaf(data["hidden"]), leaf(data["weight"])
    found = fr.linear_logprobs(**{**data, "hidden": hidden, "weight": weight}, outputs=ALL_OUTPUTS, backend="chunked")
    assert seen == [9]
    for name in ("logprobs", *ALL_OUTPUTS):
        assert (getattr(found, name)[ignored] == 0).all(), name
        assert not getattr(found, name).isnan().any()
    (found.logprobs + found.entropy + found.lse).sum().backward()
    assert (hidden.grad[ignored] == 0).all()
    assert not hidden.grad.isnan().any()
    assert not weight.grad.isnan().any()


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


def test_one_row():
    data = inputs(1, 3, 7)
    hidden = leaf(data["hidden"])
    found = fr.linear_logprobs(hidden, data["weight"], data["targets"], backend="chunked")
    found.logprobs.sum().backward()
    assert found.logprobs.shape == (1,)
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["one_pass", "two_phase"])
def test_autocast_rounds_operands_and_nothing_else(mode):
    """fp32 masters: the values of bf16 operands with fp32 logits, gradients in the dtype of the masters."""
    data = inputs(21, 16, 300, torch.float32)
    hidden, weight = leaf(data["hidden"]), leaf(data["weight"])
    options = {"advantages": torch.ones(21), "objective": fr.GRPO(), "mode": mode}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fr.linear_logprobs(hidden, weight, data["targets"], backend="chunked")
        loss, _ = fr.linear_policy_loss(hidden, weight, data["targets"], **options)
    loss.backward()
    rounded = fr.linear_logprobs(hidden.bfloat16(), weight.bfloat16(), data["targets"], backend="reference")
    assert worst(found.logprobs, rounded.logprobs) < 1e-5
    assert worst(found.logprobs, fr.linear_logprobs(**data, backend="reference").logprobs) > 1e-4
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32
    exact = [leaf(t) for t in (hidden.detach().bfloat16().double(), weight.detach().bfloat16().double())]
    fr.linear_policy_loss(*exact, data["targets"], **{**options, "mode": "two_phase"})[0].backward()
    for ours, truth in zip((hidden, weight), exact):
        assert relative(ours.grad, truth.grad) < 2**-8


@pytest.mark.parametrize(("x", "w"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_are_promoted(x, w):
    data = inputs(9, 8, 60)
    hidden, weight = leaf(data["hidden"].to(x)), leaf(data["weight"].to(w))
    found = fr.linear_logprobs(hidden, weight, data["targets"], backend="chunked")
    found.logprobs.sum().backward()
    truth = fr.linear_logprobs(hidden.double(), weight.double(), data["targets"], backend="reference")
    assert worst(found.logprobs, truth.logprobs) < 1e-5
    assert (hidden.grad.dtype, weight.grad.dtype) == (x, w)


def test_fp16_with_a_loss_scale_keeps_small_gradients():
    """Gradients of 1e-6 are below what fp16 holds; scaled by 2^16 they survive to the unscaling."""
    data = inputs(64, 16, 500)
    hidden, weight = leaf(data["hidden"].half()), leaf(data["weight"].half())
    loss, _ = fr.linear_policy_loss(
        hidden, weight, data["targets"], advantages=torch.full((64,), 1e-5), objective=fr.GRPO(), backend="chunked"
    )
    (65536.0 * loss).backward()
    exact = leaf(hidden.detach().double()), leaf(weight.detach().double())
    truth, _ = fr.linear_policy_loss(
        *exact, data["targets"], advantages=torch.full((64,), 1e-5), objective=fr.GRPO(), backend="reference"
    )
    truth.backward()
    for ours, true in zip((hidden, weight), exact):
        assert relative(ours.grad.double() / 65536, true.grad) < 2**-9
        assert relative(true.grad.half(), true.grad) > 2**-7  # what it would have been unscaled


def test_gradient_checkpointing_around_the_op():
    data = inputs(17, 6, 90)
    grads = []
    for wrap in (False, True):
        hidden, weight = leaf(data["hidden"]), leaf(data["weight"])

        def f(h, w):
            return fr.linear_logprobs(torch.tanh(h), w, data["targets"], backend="chunked").logprobs.sum()

        (checkpoint(f, hidden, weight, use_reentrant=False) if wrap else f(hidden, weight)).backward()
        grads.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_a_graph_break(masked):
    data = inputs(12, 6, 70, torch.float32)
    if masked:
        data["targets"][::3] = -100

    def f(hidden, weight, targets):
        found = fr.linear_logprobs(torch.tanh(hidden), weight, targets, outputs=("entropy",), backend="chunked")
        return (found.logprobs - 0.1 * found.entropy).sum()

    results = []
    for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        hidden, weight = leaf(data["hidden"]), leaf(data["weight"])
        value = function(hidden, weight, data["targets"])
        value.backward()
        results.append((value.detach(), hidden.grad, weight.grad))
    for a, b in zip(*results):
        assert worst(a, b) < 1e-6


def test_scatter_is_the_inverse_of_select():
    values = torch.randn(5, 3)
    rows = torch.tensor([1, 4])
    back = autograd.scatter(autograd.select(values, rows), rows, 5)
    assert torch.equal(back[rows], values[rows])
    assert (back[[0, 2, 3]] == 0).all()
    assert autograd.scatter(None, rows, 5) is None


def test_gradients_not_needed_are_empty_not_none():
    hidden, weight = torch.ones(2, 3), torch.ones(4, 3)
    needs = autograd.Needs(True, False, False)
    found = autograd._materialise(Grads(None, None, None), (hidden, weight, None, None), needs)
    assert [g.numel() for g in found] == [6, 0, 0, 0]


def lora_case(dtype, n=23, h=8, v=61, r=3, seed=0):
    data = inputs(n, h, v, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, h, generator=generator, dtype=torch.float64) / h**0.5
    b = torch.randn(v, r, generator=generator, dtype=torch.float64)
    return data, a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), 0.7


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("train_weight", [False, True])
def test_a_low_rank_head_equals_the_merged_one(backend, train_weight):
    """Values and all gradients against the dense computation on W + s B A, in fp64; a masked row holds NaN."""
    data, a, b, scale = lora_case(torch.float64)
    data["targets"][4] = -100
    data["hidden"][4] = torch.nan
    hidden, weight = data["hidden"].requires_grad_(), data["weight"].requires_grad_(train_weight)
    found = fr.linear_logprobs(
        hidden, weight, data["targets"], lora=(a, b, scale), softcap=5.0, outputs=("entropy", "lse"), backend=backend
    )
    live = data["targets"] != -100
    truth = dense(hidden[live], weight + scale * b @ a, data["targets"][live], softcap=5.0)
    wanted = [hidden, a, b, *([weight] if train_weight else [])]
    upstream = torch.linspace(-1, 2, int(live.sum()), dtype=torch.float64)
    total = (found.logprobs[live] * upstream + 0.3 * found.entropy[live] + 0.2 * found.lse[live]).sum()
    expected = (truth["logprobs"] * upstream + 0.3 * truth["entropy"] + 0.2 * truth["lse"]).sum()
    assert worst(found.logprobs[live], truth["logprobs"]) < 1e-13
    for ours, theirs in zip(torch.autograd.grad(total, wanted), torch.autograd.grad(expected, wanted)):
        assert ours.isfinite().all()
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("mode", ["one_pass", "two_phase"])
def test_objectives_take_a_low_rank_head(mode):
    data, a, b, scale = lora_case(torch.float64)
    hidden, weight = data["hidden"].requires_grad_(), data["weight"]
    batch = {"advantages": torch.linspace(-1, 1, 23, dtype=torch.float64), "objective": fr.GRPO()}
    loss, _ = fr.linear_policy_loss(hidden, weight, data["targets"], lora=(a, b, scale), mode=mode, **batch)
    merged, _ = fr.linear_policy_loss(hidden, weight + scale * b @ a, data["targets"], mode="two_phase", **batch)
    wanted = [hidden, a, b]
    for ours, theirs in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(merged, wanted)):
        assert relative(ours, theirs) < 1e-12


def test_a_low_rank_head_in_bf16_does_not_round_its_activations():
    """h A^T comes in two bf16 parts: within the numerics contract of fp64 on the same bf16 operands."""
    data, a, b, scale = lora_case(torch.bfloat16, n=64, h=64, v=301, r=4)
    data["hidden"] = data["hidden"] * 4
    found = fr.linear_logprobs(data["hidden"], data["weight"], data["targets"], lora=(a, b, scale)).logprobs
    exact = [t.double() for t in (data["hidden"], data["weight"], a.detach(), b.detach())]
    truth = dense(exact[0], exact[1] + scale * exact[3] @ exact[2], data["targets"])["logprobs"]
    rounded = (exact[0] @ exact[2].T).bfloat16().double() @ exact[3].T * scale + exact[0] @ exact[1].T
    rough = rounded.log_softmax(-1).gather(1, data["targets"][:, None])[:, 0]
    assert worst(found, truth) < 2e-2 * worst(rough, truth)


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        ("adapter", TypeError, r"lora must be \(A, B, scale\), got str"),
        ((torch.zeros(3, 7), torch.zeros(61, 3), 1.0), ValueError, r"lora must be A \(r, H\) and B \(V, r\) with H=8"),
        ((torch.zeros(3, 8), torch.zeros(61, 2), 1.0), ValueError, "lora must be A"),
        ((torch.zeros(3, 8), torch.zeros(61, 3), torch.inf), ValueError, "lora scale must be finite"),
        ((None, torch.zeros(61, 3), 1.0), TypeError, "lora A must be a tensor"),
    ],
)
def test_a_wrong_adapter_is_refused(lora, error, message):
    data, *_ = lora_case(torch.float32)
    with pytest.raises(error, match=message):
        fr.linear_logprobs(data["hidden"], data["weight"], data["targets"], lora=lora)
