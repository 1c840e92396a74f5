"""Ids and kept sets by the Triton backend: in Triton's interpreter on any machine, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import fused_rlhf as fr
from fused_rlhf.kernels import blocks
from tests.helpers import leaf, passes_in_the_interpreter, relative, worst


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    passes_in_the_interpreter("tests/interpreter_kept_cases.py")


@pytest.mark.parametrize("V", [1000, 50257, 151936, 262144, 2**20])
@pytest.mark.parametrize("N", [0, 1, 512, 10**6])
def test_blocks_fit_the_scratch(N: int, V: int) -> None:
    rows = blocks.truncation_rows(N, V)
    assert 1 <= rows <= max(N, 1)
    assert 4 * rows * blocks.padded(V) <= blocks.TRUNCATION_BYTES
    assert rows == max(N, 1) or 4 * (rows + 16) * blocks.padded(V) > blocks.TRUNCATION_BYTES


# What follows needs a GPU. Truth is the reference in fp64 on the same operands; of rules those alone whose border no rounding
# moves, as the likeliest k tokens of a row are far enough apart.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("told", [{"top_k": 20}, {"top_k": 600}, {"top_k": 20, "top_p": 0.9999}, "ids"])
def test_values_and_gradients_against_fp64(told: Any, dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    N, H, V = 129, 512, 5003
    hidden, weight, bias = leaf(randn(N, H).to(dtype)), leaf((randn(V, H) * 2.5 / H**0.5).to(dtype)), leaf(randn(V))
    targets = torch.randint(V, (N,), generator=g, device="cuda")
    ids = torch.randint(V, (N, 7), generator=g, device="cuda")
    given = {"ids": ids} if told == "ids" else {"truncation": fr.Truncation(**told)}
    upstream = randn(N)

    def run(backend: str, wide: torch.dtype | None = None) -> list[Tensor]:
        operands = [t if wide is None else t.detach().to(wide).requires_grad_() for t in (hidden, weight, bias)]
        x, w, b = operands
        found = fr.linear_logprobs(x, w, targets, b, outputs=("entropy",), backend=backend, **given)
        loss = (upstream.to(found.logprobs.dtype) * (found.logprobs + found.entropy)).sum()
        if found.id_logprobs is not None:
            loss = loss + found.id_logprobs.sum()
        return [found.logprobs.detach(), found.entropy.detach(), *torch.autograd.grad(loss, operands)]

    ours, again, true = run("triton"), run("triton"), run("reference", torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))
    for value, exact in zip(ours[:2], true):
        assert worst(value, exact) <= 5e-5
    for value, exact in zip(ours[2:], true[2:]):
        assert relative(value, exact) <= 2 * torch.finfo(dtype).eps + 1e-5
