"""A low-rank adapter on the head."""

from typing import Any

import pytest
import torch

import fused_rlhf as fr
from tests.helpers import dense, inputs, relative, worst

BACKENDS = ["reference", "chunked"]


def leaf(tensor):
    return tensor.clone().requires_grad_()


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
