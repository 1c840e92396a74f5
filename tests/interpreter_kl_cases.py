"""What of `linear_kl` is Triton's own, in its interpreter: `test_linear_kl.py` sets TRITON_INTERPRET=1.

The tests that every backend passes are those of `test_divergence.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf.backends import reference
from fused_rlhf.kernels import linear_kl, ops, primitives, transforms
from fused_rlhf.kernels.interface import KINDS, Comparison, Grads, Kind, Needs, RowPairs, Sums
from fused_rlhf.kernels.transforms import Transform
from tests.helpers import HARDCAP, projection, relative

EVERYTHING = Needs(True, True, True)


def case(
    kind: Kind, N: int = 19, V: int = 103, dtype: torch.dtype = torch.float32, beta: float = 0.3
) -> tuple[RowPairs, Comparison]:
    g = torch.Generator().manual_seed(N + V)
    hidden, ref_hidden = torch.randn(N, 24, generator=g), torch.randn(N, 16, generator=g)
    weight, ref_weight = torch.randn(V, 24, generator=g) / 2, torch.randn(V, 16, generator=g) / 2
    bias, ref_bias = torch.randn(V, generator=g), torch.randn(V, generator=g)
    rows = RowPairs(hidden.to(dtype), ref_hidden.to(dtype), 0.5 + torch.rand(N, generator=g))
    policy = projection(weight.to(dtype), bias, logit_scale=0.7, softcap=5.0)
    return rows, Comparison(policy, projection(ref_weight.to(dtype), ref_bias), kind, beta)


def widened(rows: RowPairs, of: Comparison) -> tuple[RowPairs, Comparison]:
    """The same operands, as they are rounded, in fp64."""
    sides = []
    for hidden, head in ((rows.hidden, of.policy), (rows.ref_hidden, of.ref)):
        weight, bias = head.weight.to(head.compute_dtype).double(), head.bias
        bias = None if bias is None else bias.double()
        wide = replace(head, weight=weight, bias=bias, compute_dtype=torch.float64)
        sides.append((hidden.to(head.compute_dtype).double(), wide))
    (x, policy), (y, ref) = sides
    return RowPairs(x, y, rows.temperature.double()), replace(of, policy=policy, ref=ref)


def assert_gradients(found: Grads, exact: Grads, allowed: float) -> None:
    for ours, true in zip(found, exact):
        assert (ours is None) == (true is None)
        if ours is not None and true is not None:
            assert relative(ours, true) < allowed


@triton.jit
def terms_kernel(
    d_ptr, q_ptr, terms_ptr, pull_ptr, beta, count, TERMS: tl.constexpr, PUSH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    mask = offs < count
    d, q = tl.load(d_ptr + offs, mask=mask, other=0.0), tl.load(q_ptr + offs, mask=mask, other=0.0)
    p = q * tl.exp(d)
    tl.store(terms_ptr + offs, TERMS(p, q, d, beta), mask=mask)
    if PUSH is not None:
        tl.store(pull_ptr + offs, linear_kl.times(p, PUSH(d, beta)), mask=mask)


@pytest.mark.parametrize("beta", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_terms_keep_their_digits_wherever_p_lies(kind: Kind, beta: float) -> None:
    """Each to its own size, from log p - log q = 1e-6 on; the terms of the definition lose all of theirs there."""
    distances = torch.logspace(-6, 1.5, 60)
    d = torch.cat([-distances, distances])
    q = torch.full_like(d, 1e-3)
    terms, pull = torch.empty_like(d), torch.zeros_like(d)
    twin = linear_kl.TWINS[kind]
    terms_kernel[(1,)](d, q, terms, pull, beta, len(d), TERMS=twin.terms, PUSH=twin.push, BLOCK=128)
    wide, q_wide = d.double(), q.double()
    p = q_wide * wide.exp()

    def kl(a: Tensor, b: Tensor, gap: Tensor) -> Tensor:
        """Of fp64, by a series where that would cancel as well."""
        near = gap.square() / 2 * (1 + gap / 3 * (1 + gap / 4 * (1 + gap / 5)))
        return torch.where(gap.abs() < 1e-3, a * near, (b - a) - a * gap)

    over_p = torch.log1p(beta * torch.expm1(-wide))
    over_q = torch.log1p((1 - beta) * torch.expm1(wide))
    m = beta * q_wide + (1 - beta) * p
    true, score = {
        "forward": (kl(q_wide, p, wide), None),
        "reverse": (kl(p, q_wide, -wide), wide),
        "jsd": (beta * kl(q_wide, m, over_q) + (1 - beta) * kl(p, m, over_p), (beta - 1) * over_p),
    }[kind]
    assert (terms >= 0).all()
    # The two logarithms of a mixture have an error of an ulp of the larger one.
    assert ((terms - true).abs() / true).max() < (1e-6 if kind != "jsd" else 3e-6 / min(beta, 1 - beta))
    if score is not None:
        assert ((pull - p * score).abs() / (p * score).abs()).max() < (1e-6 if kind != "jsd" else 2e-6 / beta)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_a_head_of_another_dtype_is_cast_by_blocks(
    kind: Kind, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_columns", lambda device: 32)
    monkeypatch.setattr(ops, "divergence_columns", lambda *_: 32)
    rows, of = case(kind)
    rows = replace(rows, hidden=rows.hidden.to(dtypes[0]))
    policy = replace(of.policy, weight=of.policy.weight.to(dtypes[1]), compute_dtype=torch.float16)
    of = replace(of, policy=policy)  # the reference stays fp32
    value, sums = ops.divergence(rows, of)
    exact, nothing = reference.divergence(*widened(rows, of))
    assert relative(value, exact) < 1e-5
    upstream = torch.linspace(-1, 1, 19)
    grads = ops.divergence_gradients(rows, of, sums, upstream, EVERYTHING)
    true = reference.divergence_gradients(*widened(rows, of), nothing, upstream.double(), EVERYTHING)
    assert grads.weight is not None
    assert grads.weight.dtype == dtypes[1]
    assert_gradients(grads, true, 2e-3)


@pytest.mark.parametrize("needs", [Needs(*(i == j for j in range(3))) for i in range(3)])
def test_what_is_frozen_costs_no_product(needs: Needs, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, of = case("jsd")
    _, sums = ops.divergence(rows, of)
    products = []
    matmul = ops.matmul
    monkeypatch.setattr(
        ops, "matmul", lambda a, b, out, **options: (products.append(tuple(out.shape)), matmul(a, b, out, **options))
    )
    grads = ops.divergence_gradients(rows, of, sums, torch.ones(19), needs)
    logits = [(19, 103), (19, 103)]
    own = [shape for shape, need in zip([(19, 24), (103, 24)], needs[:2]) if need]
    assert products == logits + own
    assert [g is not None for g in grads] == list(needs)


@pytest.mark.parametrize("side", ["policy", "ref"])
def test_fp64_is_refused_by_name(side: str) -> None:
    rows, of = case("forward")
    of = replace(of, **{side: replace(getattr(of, side), compute_dtype=torch.float64)})
    with pytest.raises(RuntimeError, match=r'bf16, fp16 or fp32, got torch.float64; use backend="reference"'):
        ops.divergence(rows, of)


def test_infinite_rows_leave_the_gradients_of_fp16_as_they_are() -> None:
    """The scale of fp16 is that of the finite rows; an infinite row is seen in its own gradient alone, as in torch."""
    rows, of = case("reverse", dtype=torch.float16)
    _, sums = ops.divergence(rows, of)
    upstream = torch.linspace(1, 2, 19)
    whole = ops.divergence_gradients(rows, of, sums, upstream, Needs(True, False, False)).hidden
    mean = sums.mean.index_fill(0, torch.tensor([4]), float("inf"))
    found = ops.divergence_gradients(rows, of, sums._replace(mean=mean), upstream, Needs(True, False, False)).hidden
    others = torch.arange(19) != 4
    assert whole is not None
    assert found is not None
    assert torch.equal(found[others], whole[others])
    assert not found[4].isfinite().any()


@triton.jit
def hardcap(product, gain, cap):
    return tl.clamp(product * gain, -cap, cap)


@triton.jit
def hardcap_slope(score, unit, cap):
    return tl.where(tl.abs(score) < cap * (1 - 1e-6) * unit, 1.0, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_registered_curve(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transforms.CURVES, "hardcap", HARDCAP)
    rows, of = case(kind)
    of = replace(of, policy=replace(of.policy, transform=Transform(0.7, "hardcap", 1.1)))
    with pytest.raises(NotImplementedError, match=r"'hardcap' has no twin in kernels/primitives.py"):
        ops.divergence(rows, of)
    monkeypatch.setitem(primitives.CURVES, "hardcap", primitives.Curve(hardcap, hardcap_slope))
    value, sums = ops.divergence(rows, of)
    exact, nothing = reference.divergence(*widened(rows, of))
    assert relative(value, exact) < 1e-6
    upstream = torch.linspace(-1, 1, 19)
    grads = ops.divergence_gradients(rows, of, sums, upstream, EVERYTHING)
    true = reference.divergence_gradients(*widened(rows, of), nothing, upstream.double(), EVERYTHING)
    assert_gradients(grads, true, 1e-5)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """As far as the kernel goes: the products come from cuBLAS, on a CPU from numpy's own."""
    g = torch.Generator().manual_seed(0)
    z, r = (3 * torch.randn(9, 300, generator=g) for _ in range(2))
    of = Comparison(projection(torch.zeros(300, 1)), projection(torch.zeros(300, 1)), "jsd", 0.3)

    def values(rows: slice) -> Tensor:
        n = len(z[rows])
        found = [torch.empty(n) for _ in range(5)]
        linear_kl.launch_divergence(
            of, z[rows].contiguous(), r[rows].contiguous(), torch.ones(n), found[0], Sums(*found[1:])
        )
        return torch.stack(found)

    assert torch.equal(values(slice(0, 9))[:, 3:5], values(slice(3, 5)))


def test_auto_takes_it_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RLHF_BACKEND", "triton")
    seen: list[Any] = []
    divergence = ops.divergence
    monkeypatch.setattr(ops, "divergence", lambda rows, of: (seen.append(of.kind), divergence(rows, of))[1])
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    fr.linear_kl(hidden, weight, hidden + 1, weight, "reverse")
    assert seen == ["reverse"]
