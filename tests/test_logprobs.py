"""The op itself: which rows reach a backend, in which dtypes, and what comes back."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fused_rlhf as fr
from fused_rlhf.backends import chunked, tiling
from fused_rlhf.kernels.interface import Grads, Needs
from fused_rlhf.op import logprobs
from tests.helpers import ALL_OUTPUTS, inputs, leaf, placed, projection, relative, worst

BACKENDS = ["reference", "chunked"]
GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture
def backward_calls(monkeypatch):
    """What reaches the chunked backend's backward: (number of rows, needs) per call."""
    calls = []
    original = chunked.gradients

    def watched(rows, head, stats, upstream, needs, *rest):
        calls.append((rows.count, needs))
        return original(rows, head, stats, upstream, needs, *rest)

    monkeypatch.setattr(chunked, "gradients", watched)
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
    original = tiling.add_product_
    monkeypatch.setattr(
        tiling,
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
    original = chunked.statistics
    monkeypatch.setattr(chunked, "statistics", lambda some, *rest: (seen.append(some.count), original(some, *rest))[1])
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
    fr.linear_policy_loss(exact[0], exact[1], data["targets"], **{**options, "mode": "two_phase"})[0].backward()
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
@pytest.mark.parametrize(
    ("device", "options"),
    [
        ("cpu", {"backend": "aot_eager"}),
        pytest.param("cuda", {}, marks=GPU),
        pytest.param("cuda", {"mode": "reduce-overhead"}, marks=GPU),
    ],
    ids=["aot_eager", "inductor", "reduce-overhead"],
)
def test_compiles_without_a_graph_break(device, options, masked):
    """Under CUDA graphs the later calls replay what the first ones recorded, on other numbers."""
    data = placed(inputs(12, 6, 70, torch.float32), device)
    if masked:
        data["targets"][::3] = -100

    def f(hidden, weight, targets):
        found = fr.linear_logprobs(torch.tanh(hidden), weight, targets, outputs=("entropy", "sum_sq", "max_logit"))
        return (found.logprobs - 0.1 * found.entropy + found.sum_sq - found.max_logit).sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, **options)
    for shift in (0.0, 0.1, 0.2, 0.3):
        results = []
        for function in (f, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            hidden, weight = leaf(data["hidden"] + shift), leaf(data["weight"])
            value = function(hidden, weight, data["targets"])
            value.backward()
            results.append([t.detach().clone() for t in (value, hidden.grad, weight.grad)])
        for a, b in zip(*results):
            assert worst(a, b) <= 1e-5 * max(1.0, a.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad_filter", [0.0, 1e-3])
@pytest.mark.parametrize("with_ids", [False, True])
def test_torch_finds_nothing_wrong_with_the_custom_ops(device, grad_filter, with_ids):
    """Their schemas, results without data, and derivatives, also under a compiler and with sizes that it does not know."""
    data = placed(inputs(12, 16, 70, torch.float32, bias=True), device)
    data["targets"][2] = -100
    head = projection(data["weight"], data["bias"], logit_scale=0.7, softcap=5.0, grad_filter=grad_filter)
    options = logprobs._Options.of(head, -100, ("entropy", "max_logit", "argmax", "is_top1"), "auto")
    temperature, absent = torch.ones(12, device=device), torch.empty(0, device=device)
    free = [leaf(data["weight"]), leaf(data["bias"]), absent]
    ids = torch.arange(36, device=device).view(12, 3).index_fill(0, torch.tensor([4], device=device), -100)
    ids = ids if with_ids else None
    forward = (leaf(data["hidden"]), free, data["targets"], temperature, ids, *options)
    torch.library.opcheck(torch.ops.fused_rlhf.logprobs.default, forward)

    found = dict(zip(logprobs.RESULTS, torch.ops.fused_rlhf.logprobs(*forward)))
    kept = [found[name].detach() for name in logprobs.KEPT]
    operands = [t.detach() for t in free]
    by_ids = absent if ids is None else torch.linspace(-1, 1, 36, device=device).view(12, 3)
    of_rows = {"logprobs": torch.linspace(-1, 1, 12, device=device), "entropy": torch.zeros(12, device=device)}
    of_rows |= {"max_logit": torch.ones(12, device=device), "id_logits": by_ids}
    upstream = [of_rows.get(name, absent) for name in logprobs.UPSTREAM]
    backward = (
        upstream,
        data["hidden"],
        operands,
        data["targets"],
        temperature,
        ids,
        kept,
        [True, True, True, False],
        *options,
    )
    torch.library.opcheck(torch.ops.fused_rlhf.logprobs_backward.default, backward)


def test_gradients_not_needed_are_empty_not_none():
    hidden, weight = torch.ones(2, 3), torch.ones(4, 3)
    absent = torch.empty(0)
    found = logprobs._materialise(Grads(None, None, None), (hidden, weight, absent, absent), Needs(True, False, False))
    assert [g.numel() for g in found] == [6, 0, 0, 0]
