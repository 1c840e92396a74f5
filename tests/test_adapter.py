"""A low-rank adapter on the head."""

from typing import Any

import pytest
import torch

import fused_rlhf as fr
from tests.helpers import dense, inputs, leaf, plausible_logits, relative, worst

BACKENDS = ["reference", "chunked"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


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
    advantages = torch.linspace(-1, 1, 23, dtype=torch.float64)
    batch: dict[str, Any] = {"advantages": advantages, "objective": fr.GRPO()}
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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def peaked_lora(base, adapter, n=200, h=896, v=2003, r=16):
    """Logits up to 25 to which the adapter adds several units: what rounding its activations would show."""
    data = plausible_logits(n, v, torch.float64, h)
    g = torch.Generator().manual_seed(1)
    a = torch.randn(r, h, generator=g, dtype=torch.float64) / h**0.5
    b = torch.randn(v, r, generator=g, dtype=torch.float64)
    return data["hidden"].to(base), data["weight"].to(base), data["targets"], a.to(adapter), b.to(adapter)


@pytest.mark.parametrize("autocast", [None, "bf16", "fp16"])
@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("base", list(DTYPES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rank_r_product_is_never_rounded(backend, base, adapter, autocast):
    """Every pair of dtypes that PEFT and autocast make, against fp64 on the operands as torch casts them."""
    dtype = DTYPES[base]
    hidden, weight, targets, a, b = peaked_lora(dtype, dtype if adapter == "same" else torch.float32)
    with torch.autocast("cpu", dtype=DTYPES[autocast or "bf16"], enabled=autocast is not None):
        found = fr.linear_logprobs(hidden, weight, targets, lora=(a, b, 0.5), backend=backend).logprobs
    cast = [t.to(DTYPES[autocast]) if autocast else t for t in (hidden, weight, a, b)]
    x, w, first, second = (t.double() for t in cast)
    z = x @ w.T + 0.5 * (x @ first.T) @ second.T
    assert (0.5 * (x @ first.T) @ second.T).abs().max() > 3
    true = torch.log_softmax(z, -1).gather(1, targets[:, None])[:, 0]
    assert worst(found, true) <= 5e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_an_fp32_adapter_on_a_bf16_head(backend):
    """As near to fp64 as dense torch with fp32 logits, whose operands of the backward are bf16 as ours."""
    hidden, weight, targets, a, b = peaked_lora(torch.bfloat16, torch.float32, n=64, h=128, v=503)
    upstream = torch.randn(64, generator=torch.Generator().manual_seed(2))
    leaves = [hidden.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    found = fr.linear_logprobs(hidden, weight, targets, lora=(a, b, 0.5), backend=backend).logprobs
    ours = torch.autograd.grad((found * upstream).sum(), leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    z = wide[0] @ weight.double().T + 0.5 * (wide[0] @ wide[1].T) @ wide[2].T
    true = torch.log_softmax(z, -1).gather(1, targets[:, None])[:, 0]
    exact = torch.autograd.grad((true * upstream).sum(), wide)
    for mine, right in zip(ours, exact):
        assert relative(mine, right) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["one_pass", "two_phase"])
def test_a_low_rank_head_on_the_device(device, adapter_dtype, mode):
    """bf16 operands, the adapter in their dtype or in fp32 as peft keeps it, against fp64 on the same numbers."""
    data, a, b, scale = lora_case(torch.bfloat16, n=67, h=64, v=301, r=4)
    data["targets"][5] = -100
    tensors = [data["hidden"], data["weight"], *(t.detach().to(adapter_dtype) for t in (a, b))]
    hidden, weight, a, b = (leaf(t.to(device)) for t in tensors)
    targets = data["targets"].to(device)
    batch: dict[str, Any] = {"advantages": torch.linspace(-1, 1, 67, device=device), "objective": fr.GRPO()}
    loss, _ = fr.linear_policy_loss(hidden, weight, targets, lora=(a, b, scale), mode=mode, **batch)
    exact = [leaf(t.detach().double()) for t in (hidden, weight, a, b)]
    merged = exact[1] + scale * exact[3] @ exact[2]
    true, _ = fr.linear_policy_loss(exact[0], merged, targets, mode="two_phase", backend="reference", **batch)
    (3.7 * loss).backward()
    (3.7 * true).backward()
    assert worst(loss, true) < 1e-5
    for ours, theirs in zip((hidden, weight, a, b), exact):
        assert ours.grad.dtype == ours.dtype
        assert relative(ours.grad, theirs.grad) < 2**-7  # of a few roundings to bf16
