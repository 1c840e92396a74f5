"""The divergences of the Triton backend: in Triton's interpreter on any machine, and on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fused_rlhf.backends import reference
from fused_rlhf.kernels import blocks, ops, tiles
from fused_rlhf.kernels.interface import KINDS, Comparison, Grads, Kind, Needs, RowPairs, Work
from tests.helpers import passes_in_the_interpreter, projection, relative

Arguments = tuple[RowPairs, Comparison]


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """What every backend passes, and what is Triton's own."""
    files = ("tests/test_divergence.py", "tests/interpreter_kl_cases.py")
    passes_in_the_interpreter("-k", "triton or interpreter_kl_cases", *files)


@pytest.mark.parametrize("V", [1000, 50257, 151936, 262144, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "H"), [(0, 896), (1, 896), (512, 4096), (10**6, 8192)])
def test_blocks_fit_the_scratch(N: int, H: int, V: int, dtype: torch.dtype) -> None:
    rows, columns = blocks.divergence_rows(N, V), blocks.divergence_columns(N, V, H, dtype.itemsize)
    assert 1 <= rows <= max(N, 1)
    assert 8 * rows * V <= blocks.DIVERGENCE_BYTES
    assert rows == max(N, 1) or 8 * (rows + 16) * blocks.padded(V) > blocks.DIVERGENCE_BYTES
    assert columns == V or columns % 256 == 0
    work = Work("divergence", N, H, V, dtype, Needs(True, True, False))
    assert ops.memory(work) <= blocks.DIVERGENCE_BYTES + (64 + 4 * H) * N + work.gradients
    no_gradient = replace(work, needs=Needs(False, False, False))
    assert ops.memory(no_gradient) <= blocks.DIVERGENCE_BYTES + 64 * N


# What follows needs a GPU. Truth is fp64 on the same operands; "torch" is dense torch with fp32 logits, whose gradient of
# the logits is rounded to the operands' dtype before its two products.


def inputs(
    N: int, H: int, V: int, kind: Kind, dtype: torch.dtype = torch.bfloat16, *, distance: float = 0.3, **options: Any
) -> Arguments:
    """A policy, and a reference whose hidden states lie `distance` away; logits of about 10."""
    g = torch.Generator("cuda").manual_seed(N + V)
    hidden = torch.randn(N, H, generator=g, device="cuda")
    weight = (torch.randn(V, H, generator=g, device="cuda") * 2.5 / H**0.5).to(dtype)
    ref_hidden = (hidden * (1 + distance * torch.randn(N, H, generator=g, device="cuda"))).to(dtype)
    bias = torch.randn(V, generator=g, device="cuda") if options.pop("bias", False) else None
    rows = RowPairs(hidden.to(dtype), ref_hidden, 0.7 + 0.6 * torch.rand(N, generator=g, device="cuda"))
    return rows, Comparison(projection(weight, bias, **options), projection(weight), kind, 0.3)


def wide(rows: RowPairs, of: Comparison) -> Arguments:
    def head(side: Any) -> Any:
        bias = None if side.bias is None else side.bias.double()
        return replace(side, weight=side.weight.double(), bias=bias, compute_dtype=torch.float64)

    return RowPairs(*(t.double() for t in (rows.hidden, rows.ref_hidden, rows.temperature))), replace(
        of, policy=head(of.policy), ref=head(of.ref)
    )


def torch_gradients(arguments: Arguments, upstream: Tensor) -> Grads:
    rows, of = arguments
    x, w = rows.hidden, of.policy.weight
    products = (x.float() @ w.float().T).requires_grad_()
    eye = torch.eye(w.shape[0], device="cuda", dtype=torch.float32)
    # The reference's definition over given products: a head of ones and zeros, in fp32.
    head = replace(of.policy, weight=eye, compute_dtype=torch.float32)
    value = reference.divergence(replace(rows, hidden=products), replace(of, policy=head))[0]
    dz = torch.autograd.grad(value, products, upstream)[0].to(x.dtype)
    return Grads((dz @ w).to(x.dtype), (dz.T @ x).to(w.dtype), None)


CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "plain": ((300, 512, 5003), {}),
    "one row": ((1, 512, 5003), {}),
    "near": ((300, 512, 5003), {"distance": 1e-2}),
    "unaligned": ((129, 100, 777), {}),
    "transforms": ((300, 512, 5003), {"bias": True, "softcap": 8.0, "logit_scale": 0.5}),
    "fp16": ((300, 512, 5003), {"dtype": torch.float16}),
    "fp32": ((300, 512, 5003), {"dtype": torch.float32}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_against_fp64(case: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, options = CASES[case]
    arguments = inputs(*shape, kind, **options)
    exact, nothing = reference.divergence(*wide(*arguments))
    plain, _ = reference.divergence(*arguments)
    g = torch.Generator("cuda").manual_seed(1)
    upstream = torch.randn(shape[0], generator=g, device="cuda")
    needs = Needs(True, True, arguments[1].policy.bias is not None)
    true = reference.divergence_gradients(*wide(*arguments), nothing, upstream.double(), needs)
    torchs = torch_gradients(arguments, upstream)

    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    torch.cuda.set_sync_debug_mode("error")  # nothing waits for the device
    try:
        value, sums = ops.divergence(*arguments)
        again, _ = ops.divergence(*arguments)
        grads, same = (ops.divergence_gradients(*arguments, sums, upstream, needs) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (value >= 0).all()
    assert relative(value, exact) <= 2 * relative(plain, exact) + 1e-6
    assert torch.equal(value, again)
    for found, repeated, dense, right in zip(grads[:2], same, torchs, true):
        assert found is not None
        assert repeated is not None
        assert dense is not None
        assert right is not None
        assert relative(found, right) <= 2 * relative(dense, right) + 1e-6
        assert torch.equal(found, repeated)
    if needs.bias:
        assert grads.bias is not None
        assert true.bias is not None
        assert relative(grads.bias, true.bias) <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_input_on_both_sides_is_exactly_zero(kind: Kind) -> None:
    rows, of = inputs(300, 512, 32000, kind)
    rows, of = replace(rows, ref_hidden=rows.hidden.clone()), replace(of, ref=of.policy)
    value, sums = ops.divergence(rows, of)
    grads = ops.divergence_gradients(rows, of, sums, torch.ones_like(value), Needs(True, True, False))
    assert (value == 0).all()
    assert all((g == 0).all() for g in grads[:2] if g is not None)


@pytest.mark.gpu
def test_several_blocks_of_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(700, 256, 20000, "jsd")
    upstream = torch.ones(700, device="cuda")

    def everything() -> tuple[Tensor, ...]:
        value, sums = ops.divergence(*arguments)
        grads = ops.divergence_gradients(*arguments, sums, upstream, Needs(True, True, False))
        assert grads.hidden is not None
        assert grads.weight is not None
        return value, grads.hidden, grads.weight

    whole = everything()
    monkeypatch.setattr(blocks, "DIVERGENCE_BYTES", 32 << 20)
    monkeypatch.setattr(ops, "ROWS", 256)
    for found, expected in zip(everything(), whole):
        assert relative(found, expected) <= 3e-3  # both are rounded to bf16


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1000, 9000])
def test_memory_is_the_formula(N: int) -> None:
    H, V, needs = 512, 64000, Needs(True, True, False)
    arguments = inputs(N, H, V, "reverse")
    upstream = torch.ones(N, device="cuda")

    def run() -> None:
        _, sums = ops.divergence(*arguments)
        ops.divergence_gradients(*arguments, sums, upstream, needs)

    run()  # compiles, and lets cuBLAS take its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    multiprocessors = tiles.multiprocessors(torch.device("cuda"))
    work = Work("divergence", N, H, V, torch.bfloat16, needs, multiprocessors=multiprocessors)
    assert peak <= ops.memory(work) + (8 << 20)
